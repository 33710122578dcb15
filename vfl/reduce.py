"""The cohort's sums: every message, buffer and report of a round, added chunk by chunk and reduced at once.

Letters: C clients in a chunk, S a cohort. With replicas, sums and reports have an axis R before all others.
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
    first = (0,) * message.weight.dim()  # [C] or [R, C]
    payload, buffers = ([leaf[first].detach().to("meta") for leaf in part] for part in (leaves, metrics.buffers))
    return Layout(structure, payload, buffers, tuple(metrics.extra))


class Sums(NamedTuple):
    """Weighted sums over clients."""

    parts: list[Tensor]  # flat, one for each of the layout's sizes
    weight: Tensor  # [1] Σ w


def zeros(sizes: list[int], dtype: torch.dtype, device: torch.device, replicas: int | None = None) -> Sums:
    """The sums over no client at all."""
    lead = () if replicas is None else (replicas,)
    parts = [torch.zeros(*lead, n, dtype=dtype, device=device) for n in (*sizes, 1)]
    return Sums(parts[:-1], parts[-1])


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
    """What the all-reduce brought to every rank; all of it [R, ...] with replicas."""

    mean: Mean | None  # None: no weight came in, as from a cohort without data or whose clients were all dropped
    buffers: tuple[Tensor, ...]  # the clients' module buffers, averaged by their weights; empty without any weight
    loss: np.ndarray  # [S] sum of the training loss over the examples a client visited
    examples: np.ndarray  # [S] how many visits that is
    gradients: np.ndarray  # [S] sample-gradients
    bits: np.ndarray  # [S] uplink
    finite: np.ndarray  # [S] bool; false also for a client without data
    extra: dict[str, np.ndarray]  # [] each: the algorithm's own client metrics, averaged by weight
    stopping: bool  # some rank asked to stop


def reduce(
    like: Layout | None, sums: Sums, reports: list[tuple[np.ndarray, Tensor]], cohort: int, ranks: Ranks, stop: bool
) -> Received:
    """The sums over all ranks, by one all-reduce of [parts | Σw | stop | report S × len(REPORT)].

    `reports` are this rank's, each with its clients' positions in the cohort of S. Every rank calls it once a round.
    """
    lead, dtype, device = sums.weight.shape[:-1], sums.weight.dtype, sums.weight.device
    report = torch.zeros(*lead, cohort, len(REPORT), dtype=dtype, device=device)
    if reports:
        at = torch.from_numpy(np.concatenate([now for now, _ in reports], axis=-1)).to(device)
        rows = torch.cat([rows for _, rows in reports], dim=-2).to(dtype)
        report.scatter_(-2, at[..., None].expand(rows.shape), rows)
    flag = torch.full((*lead, 1), float(stop), dtype=dtype, device=device)
    flat = ranks.all_reduce(torch.cat([*sums.parts, sums.weight, flag, report.flatten(-2)], dim=-1))
    sizes = like.sizes if like else []
    *parts, weight, stopping, report = flat.split([*sizes, 1, 1, cohort * len(REPORT)], dim=-1)
    scale = torch.where(weight > 0, 1 / weight, 0)
    names = like.extra if like else ()
    means = [part * scale for part in parts]
    # Reading these numbers waits for the device.
    read = torch.cat([stopping, weight, *means[len(means) - len(names) :], report], dim=-1)
    numbers = read.to("cpu", torch.float64).numpy()
    rows = numbers[..., len(names) + 2 :].reshape(*lead, cohort, len(REPORT))
    loss, examples, gradients, high, low, finite = np.moveaxis(rows, -1, 0)
    mean, buffers = None, ()
    if like and (numbers[..., 1] > 0).any():
        shaped = [m.reshape((*lead, *p.shape)) for m, p in zip(means, (*like.payload, *like.buffers), strict=False)]
        n = len(like.payload)
        payload = [m.to(p.dtype) for m, p in zip(shaped[:n], like.payload, strict=True)]
        clients = report.unflatten(-1, (cohort, len(REPORT)))[..., -1].sum(-1)
        mean = Mean(pytree.tree_unflatten(payload, like.structure), weight[..., 0], clients)
        buffers = tuple(
            (m if b.is_floating_point() else m.round()).to(b.dtype)
            for m, b in zip(shaped[n:], like.buffers, strict=True)
        )
    extra = {name: numbers[..., 2 + i] for i, name in enumerate(names)}
    return Received(mean, buffers, loss, examples, gradients, high * LOW + low, finite > 0, extra,
                    bool((numbers[..., 0] > 0).any()))  # fmt: skip
