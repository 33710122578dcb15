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
SPEEDUP = 2.0  # what compiling is expected to bring, until it is measured
COMPILE_SECONDS = (2.0, 0.02)  # and to cost: at least, and for each node of the graph
NODES_A_STEP = 140  # of the graph, for a small model


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

    def wants(self, signature: Hashable) -> bool:
        """Whether a chunk of this shape may be compiled: always when asked to, else when the shape comes back."""
        return self.wanted == "compile" or self._seen[signature] >= SEEN

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
            if candidate == "compile" and not self._repaid(signature, depth):
                self._note()  # perhaps later, when the shape has come back often enough
                return
            self._trial = self._untried.pop(0)
            return
        shown = ", ".join(f"{m} {r:,.0f}" for m, r in self._rates.items())
        log.info("execution auto: %s (local steps a second: %s)", self.best, shown)
        self._note()

    def _repaid(self, signature: Hashable, depth: int) -> bool:
        """Whether the steps to come would gain more by a compiled program than it is expected to cost."""
        base, node = COMPILE_SECONDS
        cost = base + node * NODES_A_STEP * depth
        gain = self.steps_to_come / self._rates[self.best] * (1 - 1 / SPEEDUP)
        return self._seen[signature] >= SEEN and gain > 2 * cost

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
