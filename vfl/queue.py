"""A rank's clients of one round, in the order and the slices in which they are computed.

Letters: n this rank's clients of the cohort, C clients in a slice, K local steps, B batch. With replicas, every array
has an axis R before all others, and all replicas have as many clients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vfl import random
from vfl.base import Tree, on_device, tree_map
from vfl.data.container import Examples
from vfl.execute import Bounds, Inputs
from vfl.local import Block, Minibatches, Work, minibatches
from vfl.profiling import Clock

PADDING = 0.5  # clients with fewer steps than this share of the longest one's are not computed beside it
REPEATS = 32  # chunks that a program computes before the host looks around again
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
    chunk: int  # so many of them at once

    @property
    def clients(self) -> int:
        """C."""
        return self.now.shape[-1]

    @property
    def signature(self) -> tuple[object, ...]:
        """What a compiled program is good for, within one experiment."""
        *lead, _, steps, batch = self.inputs.rows.shape
        return self.bounds, bool(self.inputs.block), *lead, self.chunk, steps, batch


class Clients(NamedTuple):
    """A rank's clients, most local steps first."""

    now: np.ndarray  # [n] positions in the cohort
    ids: np.ndarray  # [n]
    counts: np.ndarray  # [n] local steps, descending
    starts: np.ndarray  # [n] first row of their examples
    sizes: np.ndarray  # [n] examples
    keys: np.ndarray  # [n]
    draws: np.ndarray | None  # [n] the keys by which their minibatches are drawn; None: by their own
    factor: Tensor  # [n] their weights' factors from the sampler


class Group(NamedTuple):
    """Clients whose minibatches are drawn."""

    first: int  # the first client's place in the queue
    last: int  # the place after the last one's
    plan: Minibatches
    starts: Tensor  # [last − first] first row of their examples
    sizes: Tensor  # [last − first] examples
    keys: tuple[Tensor, ...]  # [last − first] each: their own, their updates', their batches',
    minibatch_keys: Tensor  # [last − first, K] and their minibatches'


class Queue:
    """Hands out slices of like clients; their minibatches are drawn for a whole group at once."""

    def __init__(
        self,
        work: Work,
        clients: Clients,
        buffers: tuple[Tensor, ...],
        states: Callable[[np.ndarray], Tree],
        clock: Clock,
        data: Examples,
        marks: Tensor | None = None,
    ) -> None:
        self.data, self.marks = data, marks  # everyone's examples; for marks see `minibatches`
        self.work, self.clients, self.buffers, self.states, self.clock = work, clients, buffers, states, clock
        self.batches, self.whole = work.batch(clients.sizes), work.whole
        self.done = 0  # clients handed out
        self._group: Group | None = None

    @property
    def left(self) -> int:
        """Clients still to be computed, in each replica."""
        return self.clients.now.shape[-1] - self.done

    @property
    def alike(self) -> int:
        """How many of the clients to come have about as many local steps as the next one."""
        counts = self.clients.counts[..., self.done :]
        return min(alike(row) for row in counts.reshape(-1, counts.shape[-1]))

    def repeats(self, count: int) -> int:
        """How many chunks of `count` clients in a row one program computes: those whose steps are as many."""
        counts = self.clients.counts[..., self.done :]
        if counts.ndim > 1:  # replicas' chunks are no rows of one block
            return 1
        same = int(np.searchsorted(-counts, -counts[0], side="right"))
        return max(min(same // count, REPEATS), 1)

    @property
    def once(self) -> bool:
        """Whether the clients alike to come read each of their examples once, in place."""
        if not self.whole:
            return False
        of = slice(self.done, self.done + self.alike)
        c = self.clients
        return bool((c.counts[..., of] == 1).all()) and bool(self._block(c.starts[..., of], c.sizes[..., of]))

    def peek(self, count: int, chunks: int = 1) -> Slice:
        """The clients of the next chunks of `count`, which must be alike; `advance` takes them out."""
        with self.clock("data"):
            return self._peek(count * chunks)._replace(chunk=count)

    def advance(self, count: int) -> None:
        """Takes these many clients out."""
        self.done += count

    def _peek(self, count: int) -> Slice:
        c, first, last = self.clients, self.done, self.done + count
        group = self._drawn(first, last, count)
        of, at = np.s_[..., first:last], np.s_[..., first - group.first : last - group.first]
        counts, largest = c.counts[of], int(c.sizes[of].max())
        steps, batch = int(counts.max()), int(self.batches[of].max())
        largest = -(-largest // max(batch, 1)) * batch  # as many minibatches hold so many: one program serves them all
        visits = (*at, slice(steps), slice(batch))
        lead = counts.shape[:-1]
        weight = group.plan.weight
        key, update_key, batches_key = (keys[at] for keys in group.keys)
        inputs = Inputs(
            self.states(c.ids[of]), group.plan.rows[visits].contiguous(), group.plan.mask[visits].contiguous(),
            group.plan.steps[at], group.starts[at], group.sizes[at], key, update_key, batches_key,
            group.minibatch_keys[visits[:-1]].contiguous(), c.factor[of],
            tuple(b.unsqueeze(len(lead)).expand(*counts.shape, *b.shape[len(lead) :]) for b in self.buffers),
            weight[visits].contiguous() if isinstance(weight, Tensor) else (), self._block(c.starts[of], c.sizes[of]),
        )  # fmt: skip
        return Slice(c.now[of], c.ids[of], counts, Bounds(int(counts.min()), largest), inputs, count)

    def _block(self, starts: np.ndarray, sizes: np.ndarray) -> Block:
        """The examples of clients [C] of one size that lie one after the other: no gather has to copy them."""
        size = int(sizes.flat[0])
        if not self.whole or starts.ndim > 1 or (sizes != size).any() or (np.diff(starts) != size).any():
            return ()
        of = slice(int(starts[0]), int(starts[0]) + size * len(starts))
        return self.data.x[of].unflatten(0, (-1, size)), self.data.y[of].unflatten(0, (-1, size))

    def _drawn(self, first: int, last: int, count: int) -> Group:
        """The group that holds these clients, its minibatches drawn."""
        if self._group is None or not self._group.first <= first < last <= self._group.last:
            c, longest = self.clients, int(self.clients.sizes.max())
            replicas = c.now.size // c.now.shape[-1]
            # nice hashes all of a client's examples in each step
            batch = longest if self.work.draw == "nice" else int(self.batches.max())
            visits = int(c.counts[..., first].max()) * batch * replicas
            many = max(GROUP // visits, count) // count * count
            end = max(min(first + many, first + self.alike), last)
            of = np.s_[..., first:end]
            shape, device = c.now[of].shape, c.factor.device
            own = c.keys[of]
            draws, batches, updates = random.fold_in(own, np.arange(3).reshape(-1, *[1] * own.ndim))
            if c.draws is not None:
                draws = random.fold_in(c.draws[of], 0)
            each = random.fold_in(batches[..., None], np.arange(max(int(c.counts[of].max()), 1)))
            draws, *keys, each, starts, sizes = (
                on_device(a, device) for a in (draws, own, updates, batches, each, c.starts[of], c.sizes[of])
            )
            flat = (draws.flatten(), c.starts[of].reshape(-1), c.sizes[of].reshape(-1))
            plan = minibatches(self.work, *flat, self.marks)
            if len(shape) > 1:
                plan = tree_map(lambda t: t.unflatten(0, shape) if isinstance(t, Tensor) else t, plan)
            self._group = Group(first, end, plan, starts, sizes, tuple(keys), each)
        return self._group
