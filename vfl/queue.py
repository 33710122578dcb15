"""A rank's clients of one round, in the order and the slices in which they are computed.

Letters: S the cohort, R this rank's clients of it, C clients in a slice, G in a group, K local steps, B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfl import random
from vfl.base import Tree
from vfl.execute import Bounds, Inputs
from vfl.local import Minibatches, Work, minibatches
from vfl.profiling import Clock

PADDING = 0.5  # clients with fewer steps than this share of the longest one's are not computed beside it
GROUP = 2**20  # visits of examples whose order is drawn at once


def alike(counts: np.ndarray) -> int:
    """How many of the clients with these local steps, descending [n], have about as many as the first."""
    return int(np.searchsorted(-counts, -PADDING * counts[0], side="right"))


class Slice(NamedTuple):
    """The clients that are computed next."""

    now: np.ndarray  # [C] positions in the cohort
    ids: np.ndarray  # [C]
    counts: np.ndarray  # [C] local steps, descending
    bounds: Bounds
    inputs: Inputs

    @property
    def signature(self) -> tuple[object, ...]:
        """What a compiled program is good for, within one experiment."""
        return self.bounds, *self.inputs.rows.shape


class Clients(NamedTuple):
    """A rank's clients, most local steps first."""

    now: np.ndarray  # [R] positions in the cohort
    ids: np.ndarray  # [R]
    counts: np.ndarray  # [R] local steps, descending
    starts: np.ndarray  # [R] first row of their examples
    sizes: np.ndarray  # [R] examples
    keys: Tensor  # [R]
    factor: Tensor  # [R] their weights' factors from the sampler


class Queue:
    """Hands out slices of like clients; their minibatches are drawn for a whole group at once."""

    def __init__(
        self,
        work: Work,
        clients: Clients,
        buffers: tuple[Tensor, ...],
        states: Callable[[np.ndarray], Tree],
        clock: Clock,
    ) -> None:
        self.work, self.clients, self.buffers, self.states, self.clock = work, clients, buffers, states, clock
        self.done = 0  # clients handed out
        self._group: tuple[int, int, Minibatches, Tensor, Tensor] | None = None  # from, to, and what each client has

    @property
    def left(self) -> int:
        """Clients still to be computed."""
        return len(self.clients.now) - self.done

    @property
    def alike(self) -> int:
        """How many of the clients to come have about as many local steps as the next one."""
        return alike(self.clients.counts[self.done :])

    def peek(self, count: int) -> Slice:
        """The next `count` clients, which must be alike; `advance` takes them out."""
        with self.clock("data"):
            return self._peek(count)

    def _peek(self, count: int) -> Slice:
        c, first, last = self.clients, self.done, self.done + count
        begin, _, plan, starts, sizes = self._drawn(first, last, count)
        of, at = slice(first, last), slice(first - begin, last - begin)
        largest, shortest = int(c.sizes[of].max()), int(c.counts[of].min())
        steps, batch = int(c.counts[first]), min(self.work.batch_size or largest, largest)
        inputs = Inputs(
            self.states(c.ids[of]), plan.rows[at, :steps, :batch].contiguous(),
            plan.mask[at, :steps, :batch].contiguous(), plan.steps[at], starts[at], sizes[at], c.keys[of], c.factor[of],
            tuple(b.expand(count, *b.shape) for b in self.buffers),
        )  # fmt: skip
        return Slice(c.now[of], c.ids[of], c.counts[of], Bounds(shortest, largest), inputs)

    def advance(self, count: int) -> None:
        """Takes these many clients out."""
        self.done += count

    def _drawn(self, first: int, last: int, count: int) -> tuple[int, int, Minibatches, Tensor, Tensor]:
        """The group that holds these clients, its minibatches drawn."""
        if self._group is None or not self._group[0] <= first < last <= self._group[1]:
            c = self.clients
            visits = int(c.counts[first]) * min(self.work.batch_size or int(c.sizes[first:].max()), int(c.sizes.max()))
            many = max(GROUP // visits, count) // count * count
            end = max(min(first + many, first + self.alike), last)
            of, device = slice(first, end), c.keys.device
            plan = minibatches(self.work, random.fold_in(c.keys[of], 0), c.starts[of], c.sizes[of])
            starts, sizes = (torch.from_numpy(a[of]).to(device) for a in (c.starts, c.sizes))
            self._group = first, end, plan, starts, sizes
        return self._group
