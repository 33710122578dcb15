"""`execution = auto`: which way of computing a chunk is fastest here, found on the run's own chunks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from typing import Literal

from vfl.choices import Choice, recall, remember
from vfl.chunks import WORTH, ChunkSize

log = logging.getLogger("vfl")

Execution = Literal["auto", "vmap", "compile", "loop"]
Mode = Literal["vmap", "compile", "loop"]

TRIES = 3  # chunks in which another way is timed, after one that warms it up
SEEN = 4  # a shape must come back so often before a program for it is worth its compilation
PATIENCE = 200  # chunks after which a program that has not paid by then is given up, and timing ends
SPEEDUP = 2.0  # what compiling is expected to bring, until it is measured
COMPILE_SECONDS = (4.0, 0.025)  # and to cost: at least, and for each operator of the program
MOST_OPERATORS = 2_000  # of a program that is compiled without being asked for: a minute, on one core


class Tuner:
    """Starts with vmap, whose chunk size finds itself; then times the loop; then compiles, if the rest repays it.

    A way that is not measurably faster than the best so far is not taken. What is learnt concerns speed alone: the
    results are the same up to rounding. It is remembered under `name`, and the next run of this kind starts with it.
    """

    def __init__(self, wanted: Execution, chunk: ChunkSize, name: str | None = None) -> None:
        self.wanted, self.chunk, self.name = wanted, chunk, name
        self.best: Mode = "vmap" if wanted == "auto" else wanted
        self.steps_to_come = 0.0  # local steps until the end of the run
        self._trial: Mode | None = None
        self._times: list[float] = []
        self._rates: dict[Mode, float] = {}  # local steps a second
        self._compile_seconds: float | None = None
        self._operators: float | None = None  # of a local step
        self._seen: Counter[Hashable] = Counter()
        self._untried: list[Mode] = ["loop", "compile"] if wanted == "auto" else []
        self._known = recall(name) if name is not None and wanted == "auto" else None

    @property
    def learning(self) -> bool:
        """Whether timings are still of use."""
        return not self.chunk.settled or (self.wanted == "auto" and (bool(self._untried) or self._trial is not None))

    def begin(self, steps_to_come: float) -> None:
        """Says how many local steps the run still holds."""
        self.steps_to_come = steps_to_come
        if self._known:
            self._start_from(self._known)
            self._known = None

    def mode(self) -> Mode:
        """How to run the next chunk."""
        return self._trial or self.best

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
        self.best, self._trial, self._untried = "loop" if mode == "vmap" else "vmap", None, []

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
        self._rates[mode] = max(self._times[1:])
        self._times = []  # the next timings may be another mode's
        self._conclude(signature, depth)

    def _conclude(self, signature: Hashable, depth: int) -> None:
        """After enough timings of the mode in force: keep the best, and try the next one that can pay."""
        if self._trial and self._rates[self._trial] > WORTH * self._rates[self.best]:
            self.best = self._trial
        self._trial = None
        if self._untried:
            candidate = self._untried[0]
            if candidate != "compile" or self._repaid(signature, depth):
                self._trial = self._untried.pop(0)
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
            remember(self.name, Choice(self.chunk.size, dict(self._rates), self._compile_seconds))

    def _start_from(self, known: Choice) -> None:
        """Takes over what an earlier run of this kind has measured."""
        self.chunk.keep(known.chunk)
        eager: dict[Mode, float] = {m: known.rates[m] for m in ("vmap", "loop") if m in known.rates}
        if not eager:
            return
        self._rates = dict(eager)
        self.best = "loop" if eager.get("loop", 0) > WORTH * eager.get("vmap", 0) else "vmap"
        self._untried = ["compile"]
        if "compile" in known.rates:
            self._untried = []
            saved = self.steps_to_come * (1 / eager[self.best] - 1 / known.rates["compile"])
            if saved > (known.compile_seconds or 0):
                self.best = "compile"
        log.info("execution auto: %s, by an earlier run's timings", self.best)
