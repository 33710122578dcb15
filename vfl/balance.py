"""Who computes which client, so that all ranks are done at about the same time. W ranks, S a cohort.

What a client costs is known before a round: its local steps and their examples. How long a rank takes for that is
measured: two GPUs may differ, and so may two cores of which one is busy. The timings travel in the round's one
all-reduce, so every rank learns the same and finds the same assignment. It decides nothing but where a client is
computed, and with that the order of a sum.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

STEP = 16  # so many examples more a local step is taken to cost: passes over the model, and calls
NEWEST = 0.2  # of a rank's newest timing in its average
# What ranks' paces may drift apart by before clients move, so that equal ranks keep equal shares, whatever else a core
# does now and then; and compiled programs, of which each size of chunk takes one.
NOISE = 1.25
SHORT = 0.02  # seconds; a round that is done before is mostly calls, which are no client's and would pass for slowness
PATIENCE = 10  # timed rounds before clients move, and between two moves: the first ones after one are not like the rest


def client_work(steps: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """What clients with so many local steps of so many examples cost beside each other, in examples: int64 [S]."""
    return steps * (batch + STEP)


def assign(ids: np.ndarray, work: np.ndarray, owners: Mapping[int, int], slowness: np.ndarray) -> np.ndarray:
    """The rank of each client [S]: its owner where it has one, else the one that is done first, longest work first.

    `slowness` [W] is what a unit of work takes on each rank, in any unit.
    """
    if len(slowness) == 1:
        return np.zeros(len(ids), dtype=np.int64)
    rank = np.array([owners.get(i, -1) for i in ids.tolist()], dtype=np.int64)
    load = np.bincount(rank[rank >= 0], work[rank >= 0], minlength=len(slowness)) * slowness
    for i in np.argsort(-work, kind="stable"):
        if rank[i] < 0:
            done = load + work[i] * slowness
            rank[i] = done.argmin()
            load[rank[i]] = done[rank[i]]
    return rank


class Pace(NamedTuple):
    """How long each rank takes for a unit of work."""

    average: np.ndarray  # [W] seconds, by the rounds so far, the newest counting most; NaN before the first
    slowness: np.ndarray  # [W] what clients are assigned by: 1 for the fastest
    rounds: int = 0  # timed since that was learnt

    def after(self, seconds: np.ndarray, work: np.ndarray) -> Pace:
        """The pace after a round in which the ranks took these seconds [W] for this work [W].

        0 seconds: not timed. Rounds that are `SHORT` teach nothing. A rank without work is slowly taken for one of the
        fastest, so that it gets some again.
        """
        if seconds.max() < SHORT:
            return self
        timed = (seconds > 0) & (work > 0)
        newest = np.where(timed, seconds, np.nan) / np.maximum(work, 1)
        known = ~np.isnan(self.average)
        if known.any():
            newest = np.where(work > 0, newest, np.nanmin(self.average))
        blend = np.where(known, (1 - NEWEST) * self.average + NEWEST * newest, newest)
        average = np.where(np.isnan(newest), self.average, blend)
        drift, rounds = average / self.slowness, self.rounds + bool(timed.any())
        if rounds < PATIENCE or not drift.max() > NOISE * drift.min():  # nor where one is not known
            return Pace(average, self.slowness, rounds)
        return Pace(average, average / average.min())


def even(world: int) -> Pace:
    """All ranks alike, nothing known yet."""
    return Pace(np.full(world, np.nan), np.ones(world))


class _Moment(NamedTuple):
    """A time of the host, read as CUDA's events are."""

    at: float

    def elapsed_time(self, later: _Moment) -> float:
        """Milliseconds until then."""
        return 1e3 * (later.at - self.at)


class Stopwatch:
    """Seconds of this rank's work between two moments; on a GPU by events in its queue, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()
        self.stop()

    def start(self) -> None:
        """The first moment."""
        self._first: Any = self._now()

    def stop(self) -> None:
        """The second one."""
        self._second: Any = self._now()

    def seconds(self) -> float:
        """Between the two; on a GPU only when something has waited for all that came before `stop`."""
        return self._first.elapsed_time(self._second) / 1e3

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return _Moment(time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
