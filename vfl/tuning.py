"""`execution = auto`: which way of computing a chunk is fastest here, found on the run's own chunks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from typing import Literal

from vfl.chunks import WORTH, ChunkSize

log = logging.getLogger("vfl")

Execution = Literal["auto", "vmap", "compile", "loop"]
Mode = Literal["vmap", "compile", "loop"]

TRIES = 3  # chunks in which another way is timed, after one that warms it up
SEEN = 4  # a shape must come back so often before a program for it is worth its compilation
SPEEDUP = 1.5  # what compiling is expected to bring, until it is measured
COMPILE_SECONDS = (2.0, 0.02)  # and to cost: at least, and for each node of the graph
NODES_A_STEP = 140  # of the graph, for a small model


class Tuner:
    """Starts with vmap, whose chunk size finds itself; then times the loop; then compiles, if the rest repays it.

    A way that is not measurably faster than the best so far is not taken. What is learnt concerns speed alone: the
    results are the same up to rounding.
    """

    def __init__(self, wanted: Execution, chunk: ChunkSize) -> None:
        self.wanted, self.chunk = wanted, chunk
        self.best: Mode = "vmap" if wanted == "auto" else wanted
        self.steps_to_come = 0.0  # local steps until the end of the run
        self._trial: Mode | None = None
        self._times: list[float] = []
        self._rates: dict[Mode, float] = {}  # local steps a second
        self._seen: Counter[Hashable] = Counter()
        self._untried: list[Mode] = ["loop", "compile"] if wanted == "auto" else []

    @property
    def learning(self) -> bool:
        """Whether timings are still of use."""
        return not self.chunk.settled or (self.wanted == "auto" and (bool(self._untried) or self._trial is not None))

    def mode(self) -> Mode:
        """How to run the next chunk."""
        return self._trial or self.best

    def wants(self, signature: Hashable) -> bool:
        """Whether a chunk of this shape may be compiled: always when asked to, else when the shape comes back."""
        return self.wanted == "compile" or self._seen[signature] >= SEEN

    def give_up(self, mode: Literal["vmap", "compile"]) -> None:
        """Goes on without compiling, or, where vmap itself cannot run this, one client at a time."""
        self.best, self._trial, self._untried = "loop" if mode == "vmap" else "vmap", None, []

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
            if candidate == "compile" and not self._repaid(signature, depth):
                return  # perhaps later, when the shape has come back often enough
            self._trial = self._untried.pop(0)
            return
        shown = ", ".join(f"{m} {r:,.0f}" for m, r in self._rates.items())
        if self._rates:
            log.info("execution auto: %s (local steps a second: %s)", self.best, shown)
            self._rates = {}

    def _repaid(self, signature: Hashable, depth: int) -> bool:
        """Whether the steps to come would gain more by a compiled program than it is expected to cost."""
        base, node = COMPILE_SECONDS
        cost = base + node * NODES_A_STEP * depth
        gain = self.steps_to_come / self._rates[self.best] * (1 - 1 / SPEEDUP)
        return self._seen[signature] >= SEEN and gain > 2 * cost
