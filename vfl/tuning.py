"""`execution = auto`: which way of computing a chunk is fastest here, found on the run's own chunks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from typing import Literal, NamedTuple, get_args

from vfl.choices import Choice, recall, remember
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
    A program is compiled for as many threads as the best way without one uses.

    A way that is not measurably faster than the best so far is not taken. What is learnt concerns speed alone: the
    results are the same up to rounding. It is remembered under `name`, and the next run of this kind starts with it.
    """

    def __init__(self, wanted: Execution, chunk: ChunkSize, name: str | None = None, threads: int = 1) -> None:
        self.wanted, self.chunk, self.name = wanted, chunk, name
        self.best = Way("vmap" if wanted == "auto" else wanted)
        self.steps_to_come = 0.0  # local steps until the end of the run
        self._trial: Way | None = None
        self._times: list[float] = []
        self._rates: dict[Way, float] = {}  # local steps a second
        self._compile_seconds: float | None = None
        self._operators: float | None = None  # of a local step
        self._seen: Counter[Hashable] = Counter()
        shared = [Way("loop", alone=True), Way("vmap", alone=True)] if threads > 1 else []
        self._untried = [Way("loop"), *shared, Way("compile")] if wanted == "auto" else []
        self._known = recall(name) if name is not None and wanted == "auto" else None

    @property
    def learning(self) -> bool:
        """Whether ways of computing a chunk are still to be compared."""
        return self.wanted == "auto" and (bool(self._untried) or self._trial is not None)

    def begin(self, steps_to_come: float) -> None:
        """Says how many local steps the run still holds."""
        self.steps_to_come = steps_to_come
        if self._known:
            self._start_from(self._known)
            self._known = None

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

    def wants(self, signature: Hashable, depth: int) -> bool:
        """Whether a chunk of this shape, so many steps deep, may be compiled.

        Always when asked to; else when the shape comes back, and its program is not too large to compile within a
        minute.
        """
        return self.wanted == "compile" or (self._seen[signature] >= SEEN and self._small(depth))

    def _small(self, depth: int) -> bool:
        return self._operators is not None and self._operators * depth <= MOST_OPERATORS

    def _cost(self, depth: int) -> float:
        """Seconds that compiling so many steps is expected to take."""
        base, each = COMPILE_SECONDS
        return base + each * (self._operators or 0.0) * depth

    def give_up(self, mode: Literal["vmap", "compile"]) -> None:
        """Goes on without compiling, or, where vmap itself cannot run this, one client at a time."""
        self.best = Way("loop" if mode == "vmap" else "vmap", self.way().alone)
        self._trial, self._untried = None, []

    def compiled(self, seconds: float) -> None:
        """Learns what making a program took."""
        self._compile_seconds = seconds

    def report(self, mode: Mode, signature: Hashable, steps: int, depth: int, seconds: float) -> None:
        """Learns from a finished chunk of so many local steps in all, `depth` one after the other."""
        self._seen[signature] += 1
        if self.wanted != "auto" or not self.chunk.settled:
            return
        if mode != self.mode():  # a shape too rare for the mode in force
            return
        self._times.append(steps / seconds)
        if len(self._times) <= TRIES:
            return
        self._rates[self.way()] = max(self._times[1:])
        self._times = []  # the next timings may be another mode's
        self._conclude(signature, depth)

    def _conclude(self, signature: Hashable, depth: int) -> None:
        """After enough timings of the mode in force: keep the best, and try the next one that can pay."""
        if self._trial and self._rates[self._trial] > WORTH * self._rates[self.best]:
            self.best = self._trial
        self._trial = None
        if self._untried:
            candidate = self._untried[0]
            if candidate.mode == "compile":
                candidate = Way("compile", self.best.alone)
            if candidate.mode != "compile" or self._repaid(signature, depth):
                self._trial, self._untried = candidate, self._untried[1:]
                return
            if self._seen.total() < PATIENCE:
                self._note()  # perhaps later, when the shape has come back often enough
                return
            self._untried = []
        shown = ", ".join(f"{m} {r:,.0f}" for m, r in self._rates.items())
        log.info("execution auto: %s (local steps a second: %s)", self.best, shown)
        self._note()

    def _repaid(self, signature: Hashable, depth: int) -> bool:
        """Whether the steps to come would gain more by a compiled program than it is expected to cost."""
        gain = self.steps_to_come / self._rates[self.best] * (1 - 1 / SPEEDUP)
        return self.wants(signature, depth) and gain > 2 * self._cost(depth)

    def _note(self) -> None:
        """Remembers what was measured."""
        if self.name is not None:
            rates = {str(way): rate for way, rate in self._rates.items()}
            remember(self.name, Choice(self.chunk.size, rates, self._compile_seconds))

    def _start_from(self, known: Choice) -> None:
        """Takes over what an earlier run of this kind has measured."""
        self.chunk.keep(known.chunk)
        ways = {str(way): way for way in (Way(mode, alone) for mode in MODES for alone in (False, True))}
        rates = {ways[name]: rate for name, rate in known.rates.items() if name in ways}
        eager = {way: rate for way, rate in rates.items() if way.mode != "compile"}
        if not eager:
            return
        self._rates = dict(eager)
        fastest = max(eager, key=lambda way: eager[way])
        self.best = fastest if eager[fastest] > WORTH * eager.get(Way("vmap"), 0) else Way("vmap")
        compiled = [way for way in rates if way.mode == "compile"]
        self._untried = [] if compiled else [Way("compile")]
        if compiled:
            saved = self.steps_to_come * (1 / eager[self.best] - 1 / rates[compiled[0]])
            if saved > (known.compile_seconds or 0):
                self.best = compiled[0]
        log.info("execution auto: %s, by an earlier run's timings", self.best)
