"""A client's local work: its minibatches, and descent over them.

Letters: M packed examples, C clients in a chunk, K local steps, B batch, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfl import random
from vfl.base import Message, Metrics, Tree, leaves, tree_map
from vfl.data.container import Transform
from vfl.errors import UsageError
from vfl.optimizers import Optimizer, clip_norm
from vfl.task import Batch, GradFn


class Work(NamedTuple):
    """How much a client does in a round: `epochs` passes over its examples, or `steps` minibatches when given."""

    batch_size: int | None = 20  # examples; None: all of the client's at once
    epochs: int = 1
    steps: int | None = None

    def per_epoch(self, sizes: np.ndarray) -> np.ndarray:
        """Minibatches in one pass, the last partial one included: int64 [C]; 0 for a client without data."""
        return np.minimum(sizes, 1) if self.batch_size is None else -(-sizes // self.batch_size)

    def counts(self, sizes: np.ndarray) -> np.ndarray:
        """Local steps of clients with these many examples: int64 [C]."""
        return self.epochs * self.per_epoch(sizes) if self.steps is None else self.steps * np.minimum(sizes, 1)

    def check(self) -> None:
        """Raises UsageError for a batch, an epoch count or a step count below 1."""
        for name, value in self._asdict().items():
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, not {value}")


class Minibatches(NamedTuple):
    """Which examples each client of a chunk visits, step by step."""

    rows: Tensor  # [C, K, B] which of the packed examples
    mask: Tensor  # [C, K, B] bool; false: padding
    steps: Tensor  # [C] int64 steps of each client, ≤ K
    shortest: int  # the fewest steps of the chunk's clients


def minibatches(work: Work, keys: Tensor, starts: np.ndarray, sizes: np.ndarray) -> Minibatches:
    """Minibatches of a chunk of clients: each pass is a fresh permutation, the last partial batch is used.

    keys [C] decide the order; client c owns the rows starts[c] … starts[c] + sizes[c] − 1. What a client visits depends
    on its own key and size alone, not on who shares its chunk.
    """
    device = keys.device
    per_epoch, counts = work.per_epoch(sizes), work.counts(sizes)
    steps, longest = max(int(counts.max()), 1), max(int(sizes.max()), 1)
    batch = min(work.batch_size or longest, longest)  # padding that no client fills would cost as much as examples
    epochs = -(-counts // np.maximum(per_epoch, 1))
    slots = max(int((epochs * sizes).max()), 1)
    n, spe, start = (torch.from_numpy(np.maximum(a, least)).to(device)[:, None] for a, least in (
        (sizes, 1), (per_epoch, 1), (np.where(sizes > 0, starts, 0), 0)))  # [C, 1]  # fmt: skip
    # One sort gives every epoch's permutation: slot j is example j mod n of epoch j div n, ordered by (epoch, hash).
    slot = torch.arange(slots, device=device)
    order = (((slot // n) << 40) | (random.bits(keys, slots) & (2**40 - 1))).argsort(dim=1, stable=True) % n
    k = torch.arange(steps, device=device)
    within = (k % spe)[:, :, None] * batch + torch.arange(batch, device=device)  # [C, K, B] position in the epoch
    mine = torch.from_numpy(counts).to(device)
    mask = (within < n[:, :, None]) & (k < mine[:, None])[:, :, None]
    position = ((k // spe) * n)[:, :, None] + within
    rows = start[:, :, None] + order.gather(1, position.where(mask, 0).flatten(1)).reshape(mask.shape)
    # Padding repeats the client's own first example: another client's may hold NaN, and zero times NaN is NaN.
    return Minibatches(rows.where(mask, start[:, :, None]), mask, mine, int(counts.min()))


class Batches(NamedTuple):
    """One client's data for one round, as `client_update` sees it."""

    data_x: Tensor  # [M, ...] everyone's inputs, shared
    data_y: Tensor  # [M, ...] everyone's targets, shared
    rows: Tensor  # [K, B] which of the packed examples
    mask: Tensor  # [K, B] bool
    steps: Tensor  # [] int64 local steps of this client, ≤ K
    start: Tensor  # [] int64 first row of this client's examples
    examples: Tensor  # [] int64 how many it has
    key: Tensor  # []
    buffers: tuple[Tensor, ...]  # the global module buffers
    shortest: int  # every client of the chunk takes at least so many steps
    largest: int  # no client of the chunk has more examples
    transform: Transform
    dtype: torch.dtype

    @property
    def longest(self) -> int:
        """K, the steps of the chunk's longest client."""
        return self.rows.shape[-2]

    def at(self, k: int) -> Batch:
        """Minibatch k."""
        return self._batch(self.rows[k], self.mask[k], k)

    def whole(self) -> Iterator[Batch]:
        """All of the client's examples once, in order, in minibatches of B."""
        size = self.rows.shape[-1]
        padding = self.start.where(self.examples > 0, 0)
        for i, first in enumerate(range(0, max(self.largest, 1), size)):
            place = torch.arange(first, first + size, device=self.rows.device)
            mask = place < self.examples
            yield self._batch((self.start + place).where(mask, padding), mask, -1 - i)

    def _batch(self, rows: Tensor, mask: Tensor, k: int) -> Batch:
        x = self.transform(self.data_x[rows], self.dtype)
        return Batch(x, self.data_y[rows], mask, random.fold_in(self.key, k))


Direction = Callable[[Tensor, Tensor], Tensor]
"""(gradient g [D], local model y [D]) → the direction the client descends [D]."""


def descend(
    grad_fn: GradFn,
    x: Tensor,
    batches: Batches,
    optimizer: Optimizer,
    lr: Tensor | float,
    *,
    direction: Direction | None = None,
    max_norm: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Local descent from x [D] over the client's minibatches: the local model y [D] and what the work cost.

    Each step is y ← optimizer(direction(g, y), y) with g the minibatch gradient at y, clipped to `max_norm` first.
    """
    y, opt, buffers = x, optimizer.init(x), batches.buffers
    loss = examples = x.new_zeros(())
    for k in range(batches.longest):
        g, aux = grad_fn(y, batches.at(k), buffers)
        if max_norm is not None:
            g = clip_norm(g, max_norm)
        after = optimizer.step(g if direction is None else direction(g, y), opt, y, lr), aux.buffers
        if k < batches.shortest:
            (y, opt), buffers = after
        else:  # clients that are done stay where they are
            (y, opt), buffers = keep_where(k < batches.steps, after, ((y, opt), buffers))
        loss, examples = loss + aux.loss, examples + aux.examples
    return y, Metrics(loss, examples, examples, buffers)


def full_gradient(grad_fn: GradFn, x: Tensor, batches: Batches) -> tuple[Tensor, Metrics]:
    """∇fᵢ(x) [D], the mean gradient over all of the client's examples; zero for a client without data."""
    g, loss = torch.zeros_like(x), x.new_zeros(())
    for batch in batches.whole():
        part, aux = grad_fn(x, batch, batches.buffers)
        g, loss = g + part * aux.examples, loss + aux.loss
    examples = batches.examples.to(loss.dtype)
    return g / examples.clamp(min=1), Metrics(loss, examples, examples, batches.buffers)


def keep_where(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """`new` where the condition [] holds, else `old`, leaf by leaf."""
    return tree_map(lambda a, b: torch.where(condition, a, b), new, old)


def float_bits(payload: Tree) -> Tensor:
    """Bits of sending every entry of a payload as it is: [] float64."""
    size = sum(leaf.numel() * leaf.element_size() * 8 for leaf in leaves(payload))
    return torch.tensor(float(size), dtype=torch.float64, device=leaves(payload)[0].device)


def message(payload: Tree, weight: Tensor) -> Message:
    """An uncompressed message."""
    return Message(payload, weight, float_bits(payload))
