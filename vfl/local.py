"""A client's local work: its minibatches, and descent over them.

Letters: M packed examples, C clients in a chunk, K local steps, B batch, D parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from vfl import draws, random
from vfl.base import Message, Metrics, Tree, leaves, on_device, take, tree_map
from vfl.data.container import Transform
from vfl.errors import UsageError, unknown
from vfl.optimizers import Optimizer, clip_norm
from vfl.task import Batch, GradFn, Weight

Draw = Literal["epochs", "nice", "multi", "importance"]
Reshuffle = Literal["epoch", "round", "once"]
BatchSize = int | float | str | None
"""How many examples: a count, a fraction (`0.1`, `10%`) of the client's own, or all (None, or `all`)."""
_MANY = 2**31  # more examples than a client has, and the product of two still fits into 63 bits


class Work(NamedTuple):
    """How much a client does in a round, and how its minibatches are drawn, which makes its gradient estimator.

    `draw` epochs: passes over its examples, `epochs` of them or `steps` minibatches when given, the last partial one
    used; their order is new each `reshuffle`: epoch, round, or once (one order a client, in every round of a run).
    nice: in each of `steps` steps (1 if not given), τ examples without replacement; multi: τ with replacement, uniform;
    importance: τ with replacement, example j with probability pⱼ and weight 1/(n pⱼ) in the mean, so that the gradient
    stays unbiased. All of a client's examples in 1 step are its full gradient, multi with τ = 1 a single sample's.
    """

    batch_size: BatchSize = 20  # τ
    epochs: int = 1
    steps: int | None = None
    draw: Draw = "epochs"
    reshuffle: Reshuffle = "epoch"

    def batch(self, sizes: np.ndarray) -> np.ndarray:
        """τ of clients with n = `sizes` examples: int64 [C]; 0 for a client without data.

        A fraction is rounded up. Without replacement τ is at most n.
        """
        amount = _amount(self.batch_size)
        if isinstance(amount, float):
            batch = np.ceil(amount * sizes - 1e-9).astype(np.int64)  # 0.1 · 30 is 3, not 3.0000000000000004
        else:
            batch = sizes if amount is None else np.full_like(sizes, amount)
        if self.draw in ("epochs", "nice"):
            batch = np.minimum(batch, sizes)
        return np.maximum(batch, 1) * np.minimum(sizes, 1)

    @property
    def whole(self) -> bool:
        """Whether every minibatch is all of a client's examples, whose order then does not matter."""
        return _amount(self.batch_size) is None and self.draw in ("epochs", "nice")

    def per_epoch(self, sizes: np.ndarray) -> np.ndarray:
        """Minibatches in one pass, the last partial one included: int64 [C]; 0 for a client without data."""
        return -(-sizes // np.maximum(self.batch(sizes), 1))

    def counts(self, sizes: np.ndarray) -> np.ndarray:
        """Local steps of clients with these many examples: int64 [C]."""
        if self.steps is None and self.draw == "epochs":
            return self.epochs * self.per_epoch(sizes)
        return (self.steps or 1) * np.minimum(sizes, 1)

    def check(self) -> None:
        """Raises UsageError for a count below 1, a fraction outside (0, 1], and rules that exclude each other."""
        _amount(self.batch_size)
        for name, value in (("epochs", self.epochs), ("steps", self.steps)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        for name, kinds in (("draw", Draw), ("reshuffle", Reshuffle)):
            if getattr(self, name) not in get_args(kinds):
                raise unknown(name, str(getattr(self, name)), get_args(kinds))
        if self.draw != "epochs" and self.epochs != 1:
            raise UsageError(f"draw {self.draw} takes steps and knows no epochs, so epochs cannot be {self.epochs}; "
                             "give the number of steps instead, or use draw epochs")  # fmt: skip
        if self.draw != "epochs" and self.reshuffle != "epoch":
            raise UsageError(f"draw {self.draw} draws afresh in each step, so reshuffle cannot be {self.reshuffle}; "
                             "leave it out, or use draw epochs")  # fmt: skip
        if self.reshuffle == "once" and self.steps is not None:
            raise UsageError("reshuffle once visits the same minibatches in every round, so with a number of steps the "
                             "others would never be seen; give epochs instead")  # fmt: skip


@functools.lru_cache(typed=True)  # 1 is one example, 1.0 all of them
def _amount(amount: BatchSize) -> int | float | None:
    """A count (int), a share in (0, 1] (float), or None for all."""
    if amount is None or amount == "all":
        return None
    text = str(amount).strip()
    wanted = "all, a whole number from 1 or a fraction (0.1 or 10%)"
    try:
        if text.endswith("%"):
            value = float(text[:-1]) / 100
        else:
            value = float(text) if isinstance(amount, float) or not text.lstrip("-").isdigit() else int(text)
    except ValueError:
        raise UsageError(f"batch-size must be {wanted}, not {text!r}") from None
    if isinstance(value, float) and not 0 < value <= 1:
        raise UsageError(f"batch-size {text!r} is a fraction outside (0, 1]; write a whole number for a count")
    if isinstance(value, int) and not 1 <= value < _MANY:
        raise UsageError(f"batch-size must be {'at least 1' if value < 1 else f'below {_MANY}'}, not {value}")
    return value


class Minibatches(NamedTuple):
    """Which examples each client of a chunk visits, step by step."""

    rows: Tensor  # [C, K, B] which of the packed examples
    mask: Tensor  # [C, K, B] bool; false: padding
    steps: Tensor  # [C] int64 steps of each client, ≤ K
    shortest: int  # the fewest steps of the chunk's clients
    weight: Weight = ()  # [C, K, B] float64


def minibatches(
    work: Work, keys: Tensor, starts: np.ndarray, sizes: np.ndarray, marks: Tensor | None = None
) -> Minibatches:
    """Minibatches of a chunk of clients, drawn as `work` says; `marks` (`vfl.draws`) are needed for importance.

    keys [C] decide the draw; client c owns the rows starts[c] … starts[c] + sizes[c] − 1. What a client visits depends
    on its own key and size alone, not on who shares its chunk.
    """
    if (plan := _full(work, keys, starts, sizes)) is not None:
        return plan
    device = keys.device
    batches, counts = work.batch(sizes), work.counts(sizes)
    steps, largest = max(int(counts.max()), 1), max(int(sizes.max()), 1)
    batch = max(int(batches.max()), 1)  # padding that no client fills would cost as much as examples
    n, start, mine = (on_device(a, device)[:, None] for a in (
        np.maximum(sizes, 1), np.where(sizes > 0, starts, 0), counts))  # [C, 1]  # fmt: skip
    place, k = torch.arange(batch, device=device), torch.arange(steps, device=device)
    mask = (place < on_device(batches, device)[:, None, None]) & (k < mine)[:, :, None]
    weight: Weight = ()
    if work.whole:  # in the order in which they lie, so that they can be read in place (`Batches.block`)
        chosen = place
    elif work.draw == "nice":
        chosen = draws.nice(keys, n, steps, batch, largest)
    elif work.draw == "multi":
        chosen = draws.multi(keys, n, steps, batch)
    elif work.draw == "importance":
        if marks is None:
            raise ValueError("draw importance needs the marks of its probabilities")
        chosen, weight = draws.weighted(keys, n, start, marks, steps, batch)
    else:
        per_epoch = np.maximum(work.per_epoch(sizes), 1)
        fresh = work.reshuffle == "epoch"
        passes = -(-counts // per_epoch) if fresh else 1
        slots = max(int((passes * sizes).max()), 1)
        order = draws.shuffled(keys, n, slots, once=bool((sizes == slots).all()))
        spe, size = (on_device(np.maximum(a, 1), device)[:, None] for a in (per_epoch, batches))
        within = (k % spe * size)[:, :, None] + place  # [C, K, B] position in the epoch
        mask = mask & (within < n[:, :, None])
        position = within + (k // spe * n)[:, :, None] if fresh else within
        chosen = order.gather(1, position.where(mask, 0).flatten(1)).reshape(mask.shape)
    full = batches >= np.maximum(sizes, 1)
    if work.draw in ("epochs", "nice") and not work.whole and full.any():  # as `whole`: the order does not matter
        chosen = torch.where(on_device(full, device)[:, None, None], place, chosen)
    # Padding repeats the client's own first example: another client's may hold NaN, and zero times NaN is NaN.
    rows = (start[:, :, None] + chosen).where(mask, start[:, :, None])
    return Minibatches(rows, mask, mine[:, 0], int(counts.min()), weight)


def _full(work: Work, keys: Tensor, starts: np.ndarray, sizes: np.ndarray) -> Minibatches | None:
    """The same where clients of one size pass over minibatches without padding, in a third of the time; else None."""
    n = int(sizes[0])
    if work.draw != "epochs" or work.whole or (sizes != n).any():
        return None
    batch, steps = int(work.batch(sizes[:1])[0]), int(work.counts(sizes[:1])[0])
    if not 0 < batch < n or n % batch:
        return None
    passes = -(-steps * batch // n)
    if passes > 1 and work.reshuffle != "epoch":
        return None
    every = keys.new_full((len(keys),), n)
    order = draws.shuffled(keys, every[:, None], passes * n, once=passes == 1)[:, : steps * batch]
    rows = (on_device(starts, keys.device)[:, None] + order).unflatten(1, (steps, batch))
    return Minibatches(rows, torch.ones_like(rows, dtype=torch.bool), torch.full_like(every, steps), steps)


Block = tuple[Tensor, Tensor] | tuple[()]
"""Inputs and targets as views of the packed ones, or nothing."""


class Batches(NamedTuple):
    """One client's data for one round, as `client_update` sees it."""

    data_x: Tensor  # [M, ...] everyone's inputs, shared
    data_y: Tensor  # [M, ...] everyone's targets, shared
    rows: Tensor  # [K, B] which of the packed examples
    mask: Tensor  # [K, B] bool
    steps: Tensor  # [] int64 local steps of this client, ≤ K
    start: Tensor  # [] int64 first row of this client's examples
    examples: Tensor  # [] int64 how many it has
    key: Tensor  # [] from which each minibatch's is made
    buffers: tuple[Tensor, ...]  # the global module buffers
    shortest: int  # every client of the chunk takes at least so many steps
    largest: int  # no client of the chunk has more examples
    transform: Transform
    dtype: torch.dtype
    weight: Weight = ()  # [K, B]
    block: Block = ()  # [B, ...] each; where it is given, every minibatch is all of the client's examples, in order
    keys: Tensor | tuple[()] = ()  # [K] the minibatches' keys, where they were made beforehand

    @property
    def longest(self) -> int:
        """K, the steps of the chunk's longest client."""
        return self.rows.shape[-2]

    def at(self, k: int) -> Batch:
        """Minibatch k."""
        weight = self.weight[k].to(self.dtype) if isinstance(self.weight, Tensor) else ()
        key = self.keys[k] if isinstance(self.keys, Tensor) else random.fold_in(self.key, k)
        return self._batch(self.rows[k], self.mask[k], key, weight)

    def whole(self) -> Iterator[Batch]:
        """All of the client's examples once, in order, in minibatches of B."""
        size = self.rows.shape[-1]
        padding = self.start.where(self.examples > 0, 0)
        for i, first in enumerate(range(0, max(self.largest, 1), size)):
            place = torch.arange(first, first + size, device=self.rows.device)
            mask = place < self.examples
            yield self._batch((self.start + place).where(mask, padding), mask, random.fold_in(self.key, -1 - i))

    def _batch(self, rows: Tensor, mask: Tensor, key: Tensor, weight: Weight = ()) -> Batch:
        x, y = self.block or (take(self.data_x, rows), take(self.data_y, rows))
        return Batch(self.transform(x, self.dtype), y, mask, key, weight)


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
    # Filled on the device: a number from the host would make a GPU's queue wait.
    return torch.full((), float(size), dtype=torch.float64, device=leaves(payload)[0].device)


def message(payload: Tree, weight: Tensor) -> Message:
    """An uncompressed message."""
    return Message(payload, weight, float_bits(payload))
