"""The cohort's sums: every message, buffer and report of a round, added chunk by chunk and reduced at once.

Letters: C clients in a chunk, S a cohort. With replicas, sums and reports have an axis R before all others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfl.base import Mean, Message, Metrics, Tree, leaves, on_device
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
    extra: tuple[str, ...]  # names of the algorithm's own client metrics: means,
    counts: tuple[str, ...]  # sums
    peaks: tuple[str, ...]  # and maxima
    lead: tuple[int, ...]  # of a client's weight: (W,), or () when it is one number

    @property
    def sizes(self) -> list[int]:
        """Entries of each part of the sum, each of the extra metrics having one; of Σ w; of how many are in it."""
        W = math.prod(self.lead)
        payload, buffers = [W * part.numel() for part in self.payload], [part.numel() for part in self.buffers]
        return [*payload, *buffers, *[1] * len(self.extra), W, W]

    @property
    def columns(self) -> int:
        """Numbers in a client's report."""
        return len(REPORT) + len(self.counts) + len(self.peaks)


def layout(results: Results) -> Layout:
    """The layout of a chunk's stacked results."""
    message, _, metrics = results
    values, structure = pytree.tree_flatten(message.payload)
    first = (0,) * message.bits.dim()  # [C] or [R, C]
    payload, buffers = ([leaf[first].detach().to("meta") for leaf in part] for part in (values, metrics.buffers))
    extra, counts, peaks = (tuple(part) for part in (metrics.extra, metrics.counts, metrics.peaks))
    return Layout(structure, payload, buffers, extra, counts, peaks, tuple(message.weight[first].shape))


class Sums(NamedTuple):
    """Weighted sums over clients."""

    parts: list[Tensor]  # flat, one for each of the layout's sizes
    weight: Tensor  # [1] or [W] Σ w
    clients: Tensor  # [1] or [W] how many have a weight above 0


def zeros(sizes: list[int], dtype: torch.dtype, device: torch.device, replicas: int | None = None) -> Sums:
    """The sums over no client at all."""
    lead = () if replicas is None else (replicas,)
    *parts, weight, clients = (torch.zeros(*lead, n, dtype=dtype, device=device) for n in sizes or (1, 1))
    return Sums(parts, weight, clients)


def add(sums: Sums, results: Results, drop: bool, fused: bool = False) -> tuple[Sums, Tensor]:
    """The sums with a chunk's results added, and each client's report [C, columns].

    `drop` leaves out clients whose messages hold NaN or infinity. `fused` writes the weighted sum as a product and a
    sum, which a compiler makes one loop; torch alone is faster with a matrix product.
    """
    message, _, metrics = results
    payload = leaves(message.payload)
    # A sum over the entries is infinite or NaN when an entry is: one read of the messages, no copy.
    finite = torch.isfinite(sum(map(_each, payload), _each(message.weight)))
    high = (message.bits / LOW).floor()
    columns = (metrics.loss, metrics.examples, metrics.gradients, high, message.bits - high * LOW, finite,
               *metrics.counts.values(), *metrics.peaks.values())  # fmt: skip
    report = torch.stack([column.to(torch.float64) for column in columns], dim=1)
    weight = message.weight.to(sums.weight.dtype)  # [C] or [C, W]
    if drop:
        weight = torch.where(finite if weight.dim() == 1 else finite[:, None], weight, 0)
    # Buffers of a client that is not in the first of W means are not used; its other numbers are.
    first, whole = (weight, weight) if weight.dim() == 1 else (weight[:, 0], _each(weight))
    weights = [weight] * len(payload) + [first] * len(metrics.buffers) + [whole] * len(metrics.extra)
    values, parts = (*payload, *metrics.buffers, *metrics.extra.values()), []
    for total, part, w in zip(sums.parts, values, weights, strict=True):
        rows = (part if part.dim() == 2 else part.reshape(len(weight), -1)).to(total.dtype)
        if drop:  # zero times NaN would still be NaN
            rows = torch.where(finite[:, None], rows, 0)
        summed = _weighted(w, rows, fused)
        parts.append(total + summed if fused else summed.add_(total))  # in place: a pass over the model less
    return Sums(parts, sums.weight + weight.sum(0), sums.clients + (weight > 0).sum(0)), report


def _each(rows: Tensor) -> Tensor:
    """The sum of each row [C] of [C, ...]."""
    return rows.flatten(1).sum(1) if rows.dim() > 1 else rows


def _weighted(weight: Tensor, rows: Tensor, fused: bool) -> Tensor:
    """Σ w row [n] of the rows [C, n] by the weights [C]; by weights [C, W], such sums one after the other [W n]."""
    if weight.dim() == 1:
        return (weight[:, None] * rows).sum(0) if fused else weight @ rows
    return ((weight[:, :, None] * rows[:, None]).sum(0) if fused else weight.T @ rows).flatten()


class Received(NamedTuple):
    """What the all-reduce brought to every rank; all of it [R, ...] with replicas."""

    mean: Mean | None  # None: no weight came in, as from a cohort without data or whose clients were all dropped
    buffers: tuple[Tensor, ...]  # the clients' module buffers, averaged by their (first) weights; empty without a mean
    heard: Tensor  # [] bool: whether there is anything in that average
    loss: np.ndarray  # [S] sum of the training loss over the examples a client visited
    examples: np.ndarray  # [S] how many visits that is
    gradients: np.ndarray  # [S] sample-gradients
    bits: np.ndarray  # [S] uplink
    finite: np.ndarray  # [S] bool; false also for a client without data
    extra: dict[str, np.ndarray]  # [] each: the algorithm's own client metrics: averaged by weight, summed, largest
    told: np.ndarray  # [T] what each rank has told beside, summed over the ranks


def reduce(
    like: Layout | None,
    sums: Sums,
    reports: list[tuple[np.ndarray, Tensor]],
    cohort: int,
    ranks: Ranks,
    tell: np.ndarray,
) -> Received:
    """The sums over all ranks, by one all-reduce of [parts | Σw | clients | tell | report S × columns].

    `reports` are this rank's, each with its clients' positions in the cohort of S. `tell` [T] are a few numbers more,
    whatever they mean. Every rank calls it once a round.
    """
    lead, dtype, device = sums.weight.shape[:-1], sums.weight.dtype, sums.weight.device
    columns = like.columns if like else len(REPORT)
    report = torch.zeros(*lead, cohort, columns, dtype=dtype, device=device)
    if reports:
        at = on_device(np.concatenate([now for now, _ in reports], axis=-1), device)
        rows = torch.cat([rows for _, rows in reports], dim=-2).to(dtype)
        report.scatter_(-2, at[..., None].expand(rows.shape), rows)
    told = on_device(tell, device).to(dtype).expand(*lead, len(tell))
    pieces = [*sums.parts, sums.weight, sums.clients, told, report.flatten(-2)]
    if ranks.world > 1:
        pieces = ranks.all_reduce(torch.cat(pieces, dim=-1)).split([p.shape[-1] for p in pieces], dim=-1)
    *parts, weight, clients, told, report = pieces
    total, scale = weight, torch.where(weight > 0, 1 / weight, 0)
    first = whole = scale
    if like and like.lead:
        total, first = weight.sum(-1, keepdim=True), scale[..., :1]
        whole = torch.where(total > 0, 1 / total, 0)
    names = like.extra if like else ()
    extras = [part * whole for part in parts[len(parts) - len(names) :]]
    # Reading these numbers waits for the device.
    numbers = torch.cat([total, *extras, report, told], dim=-1).to("cpu", torch.float64).numpy()
    rows = numbers[..., 1 + len(names) : -len(tell)].reshape(*lead, cohort, columns)
    loss, examples, gradients, high, low, finite, *own = rows.transpose(-1, *range(rows.ndim - 1))
    mean, buffers = None, ()
    if like and (numbers[..., 0] > 0).any():
        n, W = len(like.payload), weight.shape[-1]
        payload = [
            (part.unflatten(-1, (W, p.numel())) * scale[..., None]).reshape((*lead, *like.lead, *p.shape)).to(p.dtype)
            for part, p in zip(parts[:n], like.payload, strict=True)
        ]
        shape = (*lead, *like.lead)
        mean = Mean(pytree.tree_unflatten(payload, like.structure), weight.reshape(shape), clients.reshape(shape))
        averages = [(part * first).reshape((*lead, *b.shape)) for part, b in zip(parts[n:], like.buffers, strict=False)]
        buffers = tuple(
            (m if b.is_floating_point() else m.round()).to(b.dtype) for m, b in zip(averages, like.buffers, strict=True)
        )
    extra = {name: numbers[..., 1 + i] for i, name in enumerate(names)}
    if like:
        extra |= {name: column.sum(-1) for name, column in zip(like.counts, own, strict=False)}
        extra |= {
            name: column.max(-1, initial=0) for name, column in zip(like.peaks, own[len(like.counts) :], strict=True)
        }
    return Received(mean, buffers, weight[..., 0] > 0, loss, examples, gradients, high * LOW + low, finite > 0, extra,
                    numbers.reshape(-1, numbers.shape[-1])[0, -len(tell) :])  # fmt: skip
