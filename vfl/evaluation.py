"""How good a model is: on the global sets, and on each client's own data. M examples, N clients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfl.data.container import Examples, Packed, Transform
from vfl.distributed import Ranks
from vfl.task import Batch, Task

BATCH = 1000


class PerClient(NamedTuple):
    """A metric's spread over the clients that have data; each client counts once, whatever its size."""

    mean: float
    std: float  # over the clients (the population formula)
    p10: float  # the 10th percentile from the bad end: the highest losses, the lowest of everything else
    worst: float


def evaluate(
    task: Task, x: Tensor, buffers: tuple[Tensor, ...], examples: Examples, transform: Transform, ranks: Ranks = Ranks()
) -> dict[str, float]:
    """Mean loss and metrics of the model x [D] over the examples; the ranks share the batches."""
    sums: dict[str, Tensor] = {}
    for rows in _batches(len(examples.y), ranks):
        for name, values in _values(task, x, buffers, examples.x[rows], examples.y[rows], transform).items():
            sums[name] = sums.get(name, 0) + values.sum(dtype=torch.float64)
    names = _metric_names(task, x, buffers, examples, transform)
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    total = ranks.all_reduce(torch.stack([sums.get(name, zero) for name in names]))
    count = len(examples.y) or float("nan")  # a mean over nothing is no number
    return {name: value / count for name, value in zip(names, total.tolist(), strict=True)}


def evaluate_clients(
    task: Task,
    x: Tensor,
    buffers: tuple[Tensor, ...],
    packed: Packed,
    transform: Transform,
    ranks: Ranks = Ranks(),
) -> dict[str, PerClient]:
    """Each metric's distribution over the clients, of one model x [D] on each client's own examples.

    One model for all needs no client axis: every example is evaluated once, and summed into its client.
    """
    names = _metric_names(task, x, buffers, Examples(packed.x, packed.y), transform)
    sums = torch.zeros(len(names), packed.population, dtype=torch.float64, device=x.device)
    offsets = torch.from_numpy(packed.offsets)
    for rows in _batches(len(packed.y), ranks):
        owner = (torch.searchsorted(offsets, torch.arange(rows.start, rows.stop), right=True) - 1).to(x.device)
        values = _values(task, x, buffers, packed.x[rows], packed.y[rows], transform)
        for row, name in zip(sums, names, strict=True):
            row.index_add_(0, owner, values[name].to(torch.float64))
    sizes = np.diff(packed.offsets)
    per_client = ranks.all_reduce(sums).cpu().numpy()[:, sizes > 0] / sizes[sizes > 0]
    return {name: _spread(name, row) for name, row in zip(names, per_client, strict=True)}


def _spread(name: str, values: np.ndarray) -> PerClient:
    if not len(values):
        return PerClient(*[float("nan")] * 4)
    bad_is_high = name == "loss"
    tail = np.percentile(values, 90 if bad_is_high else 10)
    worst = values.max() if bad_is_high else values.min()
    return PerClient(float(values.mean()), float(values.std()), float(tail), float(worst))


def _batches(count: int, ranks: Ranks) -> list[slice]:
    starts = range(0, count, BATCH)
    return [slice(s, min(s + BATCH, count)) for s in starts[ranks.rank :: ranks.world]]


def _values(
    task: Task, x: Tensor, buffers: tuple[Tensor, ...], inputs: Tensor, targets: Tensor, transform: Transform
) -> dict[str, Tensor]:
    y = targets.to(x.device)
    mask = torch.ones(len(y), dtype=torch.bool, device=x.device)
    key = torch.zeros((), dtype=torch.int64, device=x.device)
    with torch.no_grad():
        return task.evaluate(x, Batch(transform(inputs.to(x.device), x.dtype), y, mask, key), buffers)


def _metric_names(
    task: Task, x: Tensor, buffers: tuple[Tensor, ...], examples: Examples, transform: Transform
) -> list[str]:
    return list(_values(task, x, buffers, examples.x[:1], examples.y[:1], transform))
