"""How good a model is: on the global sets, on each client's own data, and as a point of the objective f.

Letters: M examples, N clients, D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value

from vfl.data.container import Examples, Packed, Transform
from vfl.distributed import Ranks
from vfl.errors import UsageError, unknown
from vfl.problems import solution
from vfl.task import Batch, Task

BATCH = 1000
OBJECTIVE = {
    "objective": "f(x)",
    "grad_norm": "‖∇f(x)‖",
    "suboptimality": "f(x) − f*",
    "distance": "‖x − x*‖",
}
"""What can be measured of a model x as a point of f(x) = (1/N) Σ fᵢ(x), the mean over the clients that have examples;
fᵢ(x) is the mean loss on client i's training examples, regularizer included."""


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
    names = metric_names(task, x, buffers, examples, transform)
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
    names = metric_names(task, x, buffers, Examples(packed.x, packed.y), transform)
    sums = torch.zeros(len(names), packed.population, dtype=torch.float64, device=x.device)
    offsets = torch.from_numpy(packed.offsets)
    for rows in _batches(len(packed.y), ranks):
        owner = (torch.searchsorted(offsets, torch.arange(rows.start, rows.stop), right=True) - 1).to(x.device)
        values = _values(task, x, buffers, packed.x[rows], packed.y[rows], transform)
        for row, name in zip(sums, names, strict=True):
            row.index_add_(0, owner, values[name].to(torch.float64))
    sizes = np.diff(packed.offsets)
    per_client = ranks.all_reduce(sums).cpu().numpy()[:, sizes > 0] / sizes[sizes > 0]
    return {name: spread(name, row) for name, row in zip(names, per_client, strict=True)}


def objective(
    task: Task, x: Tensor, buffers: tuple[Tensor, ...], clients: Packed, transform: Transform, ranks: Ranks = Ranks()
) -> tuple[float, Tensor]:
    """f(x) and ∇f(x) [D] float64 of f = (1/N) Σ fᵢ (see `OBJECTIVE`), computed in x's dtype and summed in float64.

    The model is as in evaluation: no dropout, and batch norm by its running statistics. Every example is visited once;
    the ranks share them.
    """
    sizes = clients.sizes()
    each = 1 / (np.maximum(sizes, 1) * max(int((sizes > 0).sum()), 1))
    weights = torch.from_numpy(np.repeat(each, sizes))

    def share(x: Tensor, batch: Batch, weight: Tensor) -> Tensor:
        return weight @ task.evaluate(x, batch, buffers)["loss"]

    total = torch.zeros(1 + len(x), dtype=torch.float64, device=x.device)
    for rows in _batches(len(clients.y), ranks):
        batch = _batch(x, clients.x[rows], clients.y[rows], transform)
        g, f = grad_and_value(share)(x, batch, weights[rows].to(x))
        total += torch.cat([f[None], g])
    total = ranks.all_reduce(total)
    return float(total[0]), total[1:]


def check_metrics(names: Sequence[str], task: Task) -> None:
    """Raises UsageError for a name that `OBJECTIVE` has not, and for a metric that needs what is not known of f."""
    for name in names:
        if name not in OBJECTIVE:
            raise unknown("metric", name, OBJECTIVE)
        try:
            if name == "suboptimality":
                solution(task)
            if name == "distance" and solution(task).x is None:
                raise UsageError("the objective has more than one minimiser; l2 would leave one")
        except UsageError as error:
            raise UsageError(f"metric {name}: {error}") from None


def measure(
    names: Sequence[str],
    task: Task,
    x: Tensor,
    buffers: tuple[Tensor, ...],
    clients: Packed,
    transform: Transform,
    ranks: Ranks = Ranks(),
) -> dict[str, float]:
    """The named metrics of `OBJECTIVE` at the model x [D]; their names are those that `check_metrics` lets pass."""
    found: dict[str, float] = {}
    if set(names) - {"distance"}:
        f, g = objective(task, x, buffers, clients, transform, ranks)
        found |= {"objective": f, "grad_norm": float(g.norm())}
    if "suboptimality" in names:
        found["suboptimality"] = found["objective"] - solution(task).value
    if "distance" in names:
        found["distance"] = float(np.linalg.norm(x.double().cpu().numpy() - solution(task).x))
    return {name: found[name] for name in names}


def spread(name: str, values: np.ndarray) -> PerClient:
    """How a metric's values [N] spread over the clients."""
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
    with torch.no_grad():
        return task.evaluate(x, _batch(x, inputs, targets, transform), buffers)


def _batch(x: Tensor, inputs: Tensor, targets: Tensor, transform: Transform) -> Batch:
    """These examples for the model x: on its device, and none of them padding."""
    y = targets.to(x.device)
    mask = torch.ones(len(y), dtype=torch.bool, device=x.device)
    key = torch.zeros((), dtype=torch.int64, device=x.device)
    return Batch(transform(inputs.to(x.device), x.dtype), y, mask, key)


def metric_names(
    task: Task, x: Tensor, buffers: tuple[Tensor, ...], examples: Examples, transform: Transform
) -> list[str]:
    """What is evaluated, in order; the first of the examples tells, where there is one."""
    return list(_values(task, x, buffers, examples.x[:1], examples.y[:1], transform))
