"""The cohort's sums: every message, buffer and report of a round, added chunk by chunk and reduced at once.

Letters: C clients in a chunk, S a cohort.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfl.base import Mean, Message, Metrics, Tree
from vfl.distributed import Ranks

# What every client reports, one row a client of the cohort, so that each rank knows each client's numbers. Counts of
# bits outgrow float32's 24 exact binary digits, so they travel as two numbers.
REPORT = ("loss", "examples", "gradients", "bits_high", "bits_low", "finite")
LOW = 2.0**20

Results = tuple[Message, Tree, Metrics]
"""What a chunk's clients return, stacked: messages, new client states, metrics."""


class Layout(NamedTuple):
    """What the clients' results look like: what a sum is taken apart by."""

    structure: Any  # of the payload's tree
    payload: list[Tensor]  # on the meta device, one client's leaves [...]
    buffers: list[Tensor]  # [...]
    extra: tuple[str, ...]  # names of the algorithm's own client metrics

    @property
    def sizes(self) -> list[int]:
        """Entries of each part of the sum; each of the extra metrics has one."""
        return [part.numel() for part in (*self.payload, *self.buffers)] + [1] * len(self.extra)


def layout(results: Results) -> Layout:
    """The layout of a chunk's stacked results."""
    message, _, metrics = results
    leaves, structure = pytree.tree_flatten(message.payload)
    payload, buffers = ([leaf[0].detach().to("meta") for leaf in part] for part in (leaves, metrics.buffers))
    return Layout(structure, payload, buffers, tuple(metrics.extra))


class Sums(NamedTuple):
    """Weighted sums over clients."""

    parts: list[Tensor]  # flat, one for each of the layout's sizes
    weight: Tensor  # [1] Σ w


def zeros(sizes: list[int], dtype: torch.dtype, device: torch.device) -> Sums:
    """The sums over no client at all."""
    return Sums([torch.zeros(n, dtype=dtype, device=device) for n in sizes],
                torch.zeros(1, dtype=dtype, device=device))  # fmt: skip


def add(sums: Sums, results: Results, drop: bool, fused: bool = False) -> tuple[Sums, Tensor]:
    """The sums with a chunk's results added, and each client's report [C, len(REPORT)].

    `drop` leaves out clients whose messages hold NaN or infinity. `fused` writes the weighted sum as a product and a
    sum, which a compiler makes one loop; torch alone is faster with a matrix product.
    """
    message, _, metrics = results
    payload = pytree.tree_leaves(message.payload)
    # A sum over the entries is infinite or NaN when an entry is: one read of the messages, no copy.
    summed = message.weight + sum(p.flatten(1).sum(1) if p.dim() > 1 else p for p in payload)
    finite = torch.isfinite(summed)
    high = (message.bits / LOW).floor()
    columns = (metrics.loss, metrics.examples, metrics.gradients, high, message.bits - high * LOW, finite)
    report = torch.stack([column.to(torch.float64) for column in columns], dim=1)
    weight = message.weight.to(sums.weight.dtype)
    if drop:
        weight = torch.where(finite, weight, 0)
    parts = []
    for total, part in zip(sums.parts, (*payload, *metrics.buffers, *metrics.extra.values()), strict=True):
        rows = (part if part.dim() == 2 else part.reshape(len(weight), -1)).to(total.dtype)
        if drop:  # zero times NaN would still be NaN
            rows = torch.where(finite[:, None], rows, 0)
        parts.append(total + ((weight[:, None] * rows).sum(0) if fused else weight @ rows))
    return Sums(parts, sums.weight + weight.sum()), report


class Received(NamedTuple):
    """What the all-reduce brought to every rank."""

    mean: Mean | None  # None: no weight came in, as from a cohort without data or whose clients were all dropped
    buffers: tuple[Tensor, ...]  # the clients' module buffers, averaged by their weights; empty without any weight
    loss: np.ndarray  # [S] sum of the training loss over the examples a client visited
    examples: np.ndarray  # [S] how many visits that is
    gradients: np.ndarray  # [S] sample-gradients
    bits: np.ndarray  # [S] uplink
    finite: np.ndarray  # [S] bool; false also for a client without data
    extra: dict[str, float]  # the algorithm's own client metrics, averaged by weight
    stopping: bool  # some rank asked to stop


def reduce(
    like: Layout | None, sums: Sums, reports: list[tuple[np.ndarray, Tensor]], cohort: int, ranks: Ranks, stop: bool
) -> Received:
    """The sums over all ranks, by one all-reduce of [parts | Σw | stop | report S × len(REPORT)].

    `reports` are this rank's, each with its clients' positions in the cohort of S. Every rank calls it once a round.
    """
    dtype, device = sums.weight.dtype, sums.weight.device
    report = torch.zeros(cohort, len(REPORT), dtype=dtype, device=device)
    if reports:
        at = torch.from_numpy(np.concatenate([now for now, _ in reports])).to(device)
        report[at] = torch.cat([rows for _, rows in reports]).to(dtype)
    flag = torch.full((1,), float(stop), dtype=dtype, device=device)
    sizes = like.sizes if like else []
    flat = ranks.all_reduce(torch.cat([*sums.parts, sums.weight, flag, report.flatten()]))
    *parts, weight, stopping, report = flat.split([*sizes, 1, 1, report.numel()])
    scale = torch.where(weight > 0, 1 / weight, 0)
    names = like.extra if like else ()
    means = [part * scale for part in parts]
    # Reading these numbers waits for the device.
    numbers = torch.cat([report, stopping, weight, *means[len(means) - len(names) :]]).to("cpu", torch.float64).numpy()
    rows, numbers = numbers[: report.numel()].reshape(cohort, len(REPORT)), numbers[report.numel() :]
    loss, examples, gradients, high, low, finite = rows.T
    mean, buffers = None, ()
    if like and numbers[1] > 0:
        shaped = [m.reshape(p.shape) for m, p in zip(means, (*like.payload, *like.buffers), strict=False)]
        n = len(like.payload)
        payload = [m.to(p.dtype) for m, p in zip(shaped[:n], like.payload, strict=True)]
        clients = report.view(cohort, -1)[:, -1].sum()
        mean = Mean(pytree.tree_unflatten(payload, like.structure), weight.reshape(()), clients)
        buffers = tuple(
            (m if b.is_floating_point() else m.round()).to(b.dtype)
            for m, b in zip(shaped[n:], like.buffers, strict=True)
        )
    return Received(mean, buffers, loss, examples, gradients, high * LOW + low, finite > 0,
                    dict(zip(names, numbers[2:].tolist(), strict=True)), bool(numbers[0] > 0))  # fmt: skip
