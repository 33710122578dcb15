"""`execution = auto`: which way of computing a chunk is fastest here, found on the run's own chunks."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Hashable
from statistics import fmean
from typing import Literal, NamedTuple, get_args

from vfl.choices import Choice, kept, program_folder, recall, remember
from vfl.chunks import HEAVY, WORTH, ChunkSize

log = logging.getLogger("vfl")

Execution = Literal["auto", "vmap", "trace", "compile", "loop"]
Mode = Literal["vmap", "trace", "compile", "loop"]
MODES: tuple[Mode, ...] = get_args(Mode)

TRIES = 3  # chunks in which another way is timed, after one that warms it up,
ENOUGH = 0.2  # or as many, at least one, as take so many seconds with it
SEEN = 4  # a shape must come back so often before a program for it is worth making
FEW = 0.05  # of the steps to come, the most that two clients may take for ways by one thread to be tried
PATIENCE = 200  # chunks after which a program that has not paid by then is given up, and timing ends
AGAIN = 0.3  # of its cost, what a compiled program takes that lies on disk since an earlier process


class Kind(NamedTuple):
    """What a kind of program is expected to bring and to cost, until that is measured."""

    speedup: float  # over the best other way
    start: float  # seconds for any program,
    each: float  # and for each of its operators
    most: int  # operators of a program that is made without being asked for
    margin: float  # how many times its cost it must be expected to save
    heaviest: float  # seconds of a step, of a longer one these alone, in which it is expected to bring that


PROGRAMS: dict[Mode, Kind] = {
    "trace": Kind(1.5, 0.02, 0.0002, 50_000, 1, HEAVY / 4),  # calls alone, of which heavier steps have no more
    "compile": Kind(1.5, 4.0, 0.025, 2_000, 2, math.inf),  # a minute, on one core
}


class Way(NamedTuple):
    """One way of computing a chunk."""

    mode: Mode
    alone: bool = False  # by one thread, however many torch has

    def __str__(self) -> str:
        return f"{self.mode} by one thread" if self.alone else self.mode


class Tuner:
    """Starts with vmap, whose chunk size finds itself; then times the loop; then programs, if the rest repays them.

    Where torch has several `threads`, one alone is tried, too: what a small model shares out costs more than it gains.
    Programs are made for as many threads as the best way without one uses. Each shape of chunks takes a program of its
    own, and only those shapes get one whose part of the steps to come repays it; the rest go without, in the best way.

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
        self._times: list[float] = []  # local steps a second in the chunks of a trial
        self._spent = 0.0  # seconds on them
        self._rates: dict[Way, float] = {}  # local steps a second
        self._compiled: list[float] = []  # seconds that each compiled program took
        self._operators: float | None = None  # of a local step
        self._seen: Counter[Hashable] = Counter()  # chunks of each shape
        self._worth: set[tuple[Mode, Hashable]] = set()  # the shapes whose programs are repaid
        self._passed = 0  # chunks since the trial began that were computed in another way
        shared = [Way("loop", alone=True), Way("vmap", alone=True)] if threads > 1 else []
        ways = [Way("loop"), Way("trace"), *shared, Way("compile")]  # what may bring most for what it costs first
        self._untried = ways if wanted == "auto" else []
        # What an earlier run of this kind has measured:
        self._known = recall(name) if name is not None and wanted == "auto" else None
        self._kept = False  # whether the compiler's cache on disk still holds that run's programs
        self._expected: float | None = None  # seconds for a compiled program, by that run
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

    def ways(self) -> list[Way]:
        """How to run the next chunk: as the first of these whose program it is worth, the last of which needs none."""
        now = self.way()
        if now.mode not in PROGRAMS:
            return [now]
        least = WORTH * self._rates.get(self.eager, 0.0)
        others = [w for w, rate in self._rates.items() if w.mode in PROGRAMS and w.mode != now.mode and rate > least]
        return [now, *others, self.eager]

    @property
    def heavy(self) -> bool:
        """Whether a client's step takes so long that calls cost nothing beside it."""
        return self._rates.get(self.eager, math.inf) * HEAVY < 1

    @property
    def counting(self) -> bool:
        """Whether the next chunk's operators are to be counted."""
        return self._operators is None and self.wanted in ("auto", *PROGRAMS)

    def counted(self, operators: int, depth: int) -> None:
        """Learns how many operators a chunk took, of `depth` local steps one after the other."""
        self._operators = operators / depth
        if self.wanted == "compile" and operators > PROGRAMS["compile"].most:
            log.warning("compiling %s operators may take %.0f minutes or more; execution trace starts in seconds",
                        f"{operators:,}", self._cost("compile", depth) / 60)  # fmt: skip

    def most_operators(self, mode: Mode) -> int | None:
        """How many a program may have; None: any number."""
        return None if self.wanted == mode else PROGRAMS[mode].most

    def met(self, signature: Hashable, chunks: int = 1) -> None:
        """Learns that so many chunks of this shape came."""
        self._seen[signature] += chunks

    def wants(self, mode: Mode, signature: Hashable, depth: int, share: float = 1.0) -> bool:
        """Whether chunks of this shape, so many steps deep, which take this share of the steps, get such a program.

        Always when asked to; else when the shape comes back, its program is not too large, and the steps to come repay
        it.
        """
        if self.wanted == mode or (mode, signature) in self._worth:
            return True
        if self._seen[signature] < SEEN or not self._small(mode, depth) or not self._repaid(mode, depth, share):
            return False
        self._worth.add((mode, signature))
        return True

    def _small(self, mode: Mode, depth: int) -> bool:
        return self._operators is not None and self._operators * depth <= PROGRAMS[mode].most

    def _cost(self, mode: Mode, depth: int) -> float:
        """Seconds that a program of so many steps is expected to take."""
        if mode == "compile" and self._expected is not None:
            return self._expected
        return PROGRAMS[mode].start + PROGRAMS[mode].each * (self._operators or 0.0) * depth

    def _repaid(self, mode: Mode, depth: int, share: float) -> bool:
        """Whether this share of the steps to come gains more by a program than it is expected to cost."""
        if self.eager not in self._rates:
            return False
        kind, steps, best = PROGRAMS[mode], share * self.steps_to_come, self._rates[self.eager]
        if mode == "compile":
            best = max(best, self._rate("trace") or 0.0)
        if (rate := self._rate(mode)) is not None:
            return steps * (1 / best - 1 / rate) > self._cost(mode, depth)
        if mode == "compile" and self._known:  # such runs keep coming, and find the program
            steps += share * self._known.steps
        return steps * min(1 / best, kind.heaviest) * (1 - 1 / kind.speedup) > kind.margin * self._cost(mode, depth)

    def _rate(self, mode: Mode) -> float | None:
        return next((rate for way, rate in self._rates.items() if way.mode == mode), None)

    def give_up(self, mode: Mode) -> None:
        """Goes on without such programs, or, where vmap itself cannot run this, one client at a time."""
        lost = ("vmap", *PROGRAMS) if mode == "vmap" else (mode,)  # a program is made of what vmap runs
        if mode == "vmap":
            self.eager = Way("loop", self.way().alone)
        elif mode == "compile" and self._known:  # else each of many short runs would try what fails
            self._known, self._planned = self._known._replace(steps=0.0), 0.0
            self._note()
        left = {way: rate for way, rate in self._rates.items() if way.mode not in lost}
        self.best = max(left, key=left.__getitem__, default=self.eager)
        self._trial = None
        self._untried = [] if mode == "vmap" else [way for way in self._untried if way.mode not in lost]

    def compiled(self, seconds: float) -> None:
        """Learns what compiling a program took."""
        self._compiled.append(seconds)
        self._note()

    def report(
        self, mode: Mode, signature: Hashable, steps: int, depth: int, seconds: float, *, warm: bool = False
    ) -> None:
        """Learns from a finished chunk of so many local steps in all, `depth` one after the other.

        `warm`: chunks that were not reported have warmed this way up.
        """
        if self.wanted != "auto" or not self.chunk.settled:
            return
        if mode != self.mode():  # a shape too rare for the mode in force
            self._passed += 1
            if self._passed > PATIENCE:
                self._conclude(signature, depth)
            return
        if warm and not self._times:
            self._times.append(0.0)
        self._times.append(steps / seconds)
        self._spent += seconds
        if len(self._times) == 1 or (len(self._times) <= TRIES and self._spent < ENOUGH):
            return
        self._rates[self.way()] = max(self._times[1:])
        self._times, self._spent = [], 0.0  # the next timings may be another mode's
        self._conclude(signature, depth)

    def _conclude(self, signature: Hashable, depth: int) -> None:
        """After enough timings of the mode in force: keep the best, and try the next one that can pay."""
        if self._trial and self._rates.get(self._trial, 0.0) > WORTH * self._rates[self.best]:
            self.best = self._trial
            self.eager = self.best if self.best.mode not in PROGRAMS else self.eager
        self._trial, self._passed = None, 0
        if 2 * depth > FEW * self.steps_to_come:
            self._untried = [way for way in self._untried if not way.alone]
        back = self._seen[signature] >= SEEN
        for n, (mode, alone) in enumerate(self._untried):
            program = mode in PROGRAMS
            if not program or (back and self._small(mode, depth) and self._repaid(mode, depth, share=1.0)):
                self._trial = Way(mode, self.best.alone if program else alone)
                self._untried = self._untried[:n] + self._untried[n + 1 :]
                return
        if self._untried and self._seen.total() < PATIENCE:
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
        eager = {way: rate for way, rate in rates.items() if way.mode not in PROGRAMS}
        if not eager:
            return
        self._rates = rates
        fastest = max(eager, key=lambda way: eager[way])
        self.eager = fastest if eager[fastest] > WORTH * eager.get(Way("vmap"), 0) else Way("vmap")
        self.best = self.eager
        self._kept = known.programs is not None and kept(known.programs)
        self._expected = known.compile_seconds
        if self._kept and known.compile_seconds is not None:
            self._expected = known.again_seconds or AGAIN * known.compile_seconds
        self._untried = [Way(mode) for mode in PROGRAMS if self._rate(mode) is None]
        for way in sorted((way for way in rates if way.mode in PROGRAMS), key=lambda way: rates[way]):
            if rates[way] > WORTH * rates[self.best] and self._repaid(way.mode, 1, share=1.0):
                self.best = way
        log.info("execution auto: %s, by an earlier run's timings", self.best)
