"""`execution = auto`: which way of computing a chunk is fastest here, found on the run's own chunks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from statistics import fmean
from typing import Literal, NamedTuple, get_args

from vfl.choices import Choice, kept, program_folder, recall, remember
from vfl.chunks import WORTH, ChunkSize

log = logging.getLogger("vfl")

Execution = Literal["auto", "vmap", "compile", "loop"]
Mode = Literal["vmap", "compile", "loop"]
MODES: tuple[Mode, ...] = get_args(Mode)

TRIES = 3  # chunks in which another way is timed, after one that warms it up
SEEN = 4  # a shape must come back so often before a program for it is worth its compilation
PATIENCE = 200  # chunks after which a program that has not paid by then is given up, and timing ends
SPEEDUP = 2.0  # what compiling is expected to bring, until it is measured
COMPILE_SECONDS = (4.0, 0.025)  # and to cost: at least, and for each operator of the program
AGAIN = 0.3  # of that, what a program costs that an earlier process has made, from the compiler's cache on disk
MOST_OPERATORS = 2_000  # of a program that is compiled without being asked for: a minute, on one core


class Way(NamedTuple):
    """One way of computing a chunk."""

    mode: Mode
    alone: bool = False  # by one thread, however many torch has

    def __str__(self) -> str:
        return f"{self.mode} by one thread" if self.alone else self.mode


class Tuner:
    """Starts with vmap, whose chunk size finds itself; then times the loop; then compiles, if the rest repays it.

    Where torch has several `threads`, one alone is tried, too: what a small model shares out costs more than it gains.
    A program is compiled for as many threads as the best way without one uses. Each shape of chunks takes a program of
    its own, and only those shapes are compiled whose part of the steps to come repays it; the rest go without, in the
    best way.

    A way that is not measurably faster than the best so far is not taken. What is learnt concerns speed alone: the
    results are the same up to rounding. It is remembered under `name`, and the next run of this kind starts with it; so
    runs that are too short for it alone compile once they would have repaid it together.
    """

    def __init__(self, wanted: Execution, chunk: ChunkSize, name: str | None = None, threads: int = 1) -> None:
        self.wanted, self.chunk, self.name = wanted, chunk, name
        self.best = Way("vmap" if wanted == "auto" else wanted)
        self.eager = Way("loop" if wanted == "loop" else "vmap")  # the best way without a program
        self.steps_to_come = 0.0  # local steps until the end of the run
        self._trial: Way | None = None
        self._times: list[float] = []
        self._rates: dict[Way, float] = {}  # local steps a second
        self._compiled: list[float] = []  # seconds that each program took
        self._operators: float | None = None  # of a local step
        self._seen: Counter[Hashable] = Counter()  # chunks of each shape
        self._worth: set[Hashable] = set()  # the shapes whose programs are repaid
        self._passed = 0  # chunks since the trial began that were computed in another way
        shared = [Way("loop", alone=True), Way("vmap", alone=True)] if threads > 1 else []
        self._untried = [Way("loop"), *shared, Way("compile")] if wanted == "auto" else []
        # What an earlier run of this kind has measured:
        self._known = recall(name) if name is not None and wanted == "auto" else None
        self._kept = False  # whether the compiler's cache on disk still holds that run's programs
        self._expected: float | None = None  # seconds for a program, by that run
        self._planned: float | None = None  # local steps of this run

    @property
    def learning(self) -> bool:
        """Whether ways of computing a chunk are still to be compared."""
        return self.wanted == "auto" and (bool(self._untried) or self._trial is not None)

    def begin(self, steps_to_come: float) -> None:
        """Says how many local steps the run still holds."""
        self.steps_to_come = steps_to_come
        if self._planned is None:
            self._planned = steps_to_come
            if self._known:
                self._start_from(self._known)

    def way(self) -> Way:
        """How to run the next chunk."""
        return self._trial or self.best

    def mode(self) -> Mode:
        """`way` without the threads."""
        return self.way().mode

    @property
    def counting(self) -> bool:
        """Whether the next chunk's operators are to be counted."""
        return self._operators is None and self.wanted in ("auto", "compile")

    def counted(self, operators: int, depth: int) -> None:
        """Learns how many operators a chunk took, of `depth` local steps one after the other."""
        self._operators = operators / depth
        if self.wanted == "compile" and operators > MOST_OPERATORS:
            log.warning("compiling %s operators may take %.0f minutes or more; execution vmap starts at once",
                        f"{operators:,}", self._cost(depth) / 60)  # fmt: skip

    @property
    def most_operators(self) -> int | None:
        """How many a program may have; None: any number."""
        return None if self.wanted == "compile" else MOST_OPERATORS

    def met(self, signature: Hashable, chunks: int = 1) -> None:
        """Learns that so many chunks of this shape came."""
        self._seen[signature] += chunks

    def wants(self, signature: Hashable, depth: int, share: float = 1.0) -> bool:
        """Whether chunks of this shape, so many steps deep, which take this share of the steps, may be compiled.

        Always when asked to; else when the shape comes back, its program is not too large to compile within a minute,
        and the steps to come repay it.
        """
        if self.wanted == "compile" or signature in self._worth:
            return True
        if self._seen[signature] < SEEN or not self._small(depth) or not self._repaid(depth, share):
            return False
        self._worth.add(signature)
        return True

    def _small(self, depth: int) -> bool:
        return self._operators is not None and self._operators * depth <= MOST_OPERATORS

    def _cost(self, depth: int) -> float:
        """Seconds that compiling so many steps is expected to take."""
        if self._expected is not None:
            return self._expected
        base, each = COMPILE_SECONDS
        return base + each * (self._operators or 0.0) * depth

    def _repaid(self, depth: int, share: float) -> bool:
        """Whether this share of the steps to come gains more by a program than it is expected to cost."""
        if self.eager not in self._rates:
            return False
        steps, eager = share * self.steps_to_come, self._rates[self.eager]
        compiled = next((rate for way, rate in self._rates.items() if way.mode == "compile"), None)
        if compiled is None:
            steps += share * (self._known.steps if self._known else 0.0)  # such runs keep coming, and find the program
            return steps / eager * (1 - 1 / SPEEDUP) > 2 * self._cost(depth)
        return steps * (1 / eager - 1 / compiled) > self._cost(depth)

    def give_up(self, mode: Literal["vmap", "compile"]) -> None:
        """Goes on without compiling, or, where vmap itself cannot run this, one client at a time."""
        if mode == "vmap":
            self.eager = Way("loop", self.way().alone)
        elif self._known:  # else each of many short runs would try what fails
            self._known, self._planned = self._known._replace(steps=0.0), 0.0
            self._note()
        self.best = self.eager
        self._trial, self._untried = None, []

    def compiled(self, seconds: float) -> None:
        """Learns what making a program took."""
        self._compiled.append(seconds)
        self._note()

    def report(self, mode: Mode, signature: Hashable, steps: int, depth: int, seconds: float) -> None:
        """Learns from a finished chunk of so many local steps in all, `depth` one after the other."""
        if self.wanted != "auto" or not self.chunk.settled:
            return
        if mode != self.mode():  # a shape too rare for the mode in force
            self._passed += 1
            if self._passed > PATIENCE:
                self._conclude(signature, depth)
            return
        self._times.append(steps / seconds)
        if len(self._times) <= TRIES:
            return
        self._rates[self.way()] = max(self._times[1:])
        self._times = []  # the next timings may be another mode's
        self._conclude(signature, depth)

    def _conclude(self, signature: Hashable, depth: int) -> None:
        """After enough timings of the mode in force: keep the best, and try the next one that can pay."""
        if self._trial and self._rates.get(self._trial, 0.0) > WORTH * self._rates[self.best]:
            self.best = self._trial
            self.eager = self.best if self.best.mode != "compile" else self.eager
        self._trial, self._passed = None, 0
        if self._untried:
            candidate = self._untried[0]
            if candidate.mode == "compile":
                candidate = Way("compile", self.best.alone)
            back = self._seen[signature] >= SEEN and self._small(depth)
            if candidate.mode != "compile" or (back and self._repaid(depth, share=1.0)):
                self._trial, self._untried = candidate, self._untried[1:]
                return
            if self._seen.total() < PATIENCE:
                self._note()  # perhaps later, when the shape has come back often enough
                return
            self._untried = []
        shown = ", ".join(f"{m} {r:,.0f}" for m, r in self._rates.items())
        log.info("execution auto: %s (local steps a second: %s)", self.best, shown)
        self._note()

    def _note(self) -> None:
        """Remembers what was measured."""
        if self.name is None or self.wanted != "auto":
            return
        before = self._known or Choice(self.chunk.size, {}, None, None, None, 0.0)
        first, again, programs = before.compile_seconds, before.again_seconds, before.programs
        if self._compiled:
            made, programs = fmean(self._compiled), program_folder()
            first, again = (first, made) if self._kept else (made, again)
        rates = {str(way): rate for way, rate in self._rates.items()}
        steps = before.steps + (self._planned or 0.0)
        remember(self.name, Choice(self.chunk.size, rates, first, again, programs, steps))

    def _start_from(self, known: Choice) -> None:
        """Takes over what an earlier run of this kind has measured."""
        self.chunk.keep(known.chunk)
        ways = {str(way): way for way in (Way(mode, alone) for mode in MODES for alone in (False, True))}
        rates = {ways[name]: rate for name, rate in known.rates.items() if name in ways}
        eager = {way: rate for way, rate in rates.items() if way.mode != "compile"}
        if not eager:
            return
        self._rates = rates
        fastest = max(eager, key=lambda way: eager[way])
        self.eager = fastest if eager[fastest] > WORTH * eager.get(Way("vmap"), 0) else Way("vmap")
        self.best = self.eager
        compiled = [way for way in rates if way.mode == "compile"]
        self._untried = [] if compiled else [Way("compile")]
        self._kept = known.programs is not None and kept(known.programs)
        self._expected = known.compile_seconds
        if self._kept and known.compile_seconds is not None:
            self._expected = known.again_seconds or AGAIN * known.compile_seconds
        if compiled and self._repaid(1, share=1.0):
            self.best = compiled[0]
        log.info("execution auto: %s, by an earlier run's timings", self.best)
