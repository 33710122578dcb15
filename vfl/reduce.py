"""The cohort's sums: every message, buffer and report of a round in one flat vector and one all-reduce.

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


class Chunk(NamedTuple):
    """What a chunk of clients returned, stacked."""

    payload: list[Tensor]  # leaves [C, ...]
    structure: Any  # of the payload's tree
    buffers: tuple[Tensor, ...]  # [C, ...] each
    clients: Tree  # new client states [C, ...]
    weight: Tensor  # [C]
    report: Tensor  # [C, len(REPORT)]
    extra: dict[str, Tensor]  # [C] each

    @property
    def finite(self) -> Tensor:
        """Which clients' messages hold neither NaN nor infinity: bool [C]."""
        return self.report[:, -1] > 0


def chunk_results(message: Message, clients: Tree, metrics: Metrics) -> Chunk:
    """A chunk's stacked results, with each client's report."""
    payload, structure = pytree.tree_flatten(message.payload)
    # A sum over the entries is infinite or NaN when an entry is: one read of the messages, no copy.
    summed = message.weight + sum(p.flatten(1).sum(1) if p.dim() > 1 else p for p in payload)
    high = (message.bits / LOW).floor()
    columns = (
        metrics.loss,
        metrics.examples,
        metrics.gradients,
        high,
        message.bits - high * LOW,
        torch.isfinite(summed),
    )
    report = torch.stack([column.to(torch.float64) for column in columns], dim=1)
    return Chunk(payload, structure, metrics.buffers, clients, message.weight, report, dict(metrics.extra))


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


class CohortSum:
    """One flat vector: [payload | buffers | extra | Σw | stop | report S × len(REPORT)], added to chunk by chunk."""

    def __init__(self, cohort: int, dtype: torch.dtype, device: torch.device) -> None:
        self.cohort, self.device = cohort, device
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.tail = [1, 1, cohort * len(REPORT)]
        self.example: Chunk | None = None
        self.sizes: list[int] = []
        self.flat = torch.zeros(sum(self.tail), dtype=self.dtype, device=device)

    def shape_like(self, chunk: Chunk) -> None:
        """Lays the vector out for results like these."""
        self.example = chunk
        self.sizes = [part[0].numel() for part in _parts(chunk)]
        self.flat = torch.zeros(sum(self.sizes) + sum(self.tail), dtype=self.dtype, device=self.device)

    def add(self, now: np.ndarray, chunk: Chunk, drop: bool) -> None:
        """Adds the clients at these positions of the cohort [C]; `drop` leaves out those that are not finite."""
        if self.example is None:
            self.shape_like(chunk)
        weight = chunk.weight.to(self.dtype)
        if drop:
            weight = torch.where(chunk.finite, weight, 0)
        *sums, total, _, report = self.flat.split([*self.sizes, *self.tail])
        for at, part in zip(sums, _parts(chunk), strict=True):
            rows = part.reshape(len(now), -1).to(self.dtype)
            if drop:  # zero times NaN would still be NaN
                rows = torch.where(chunk.finite[:, None], rows, 0)
            at += weight @ rows
        total += weight.sum()
        report.view(self.cohort, -1)[torch.from_numpy(now).to(self.device)] = chunk.report.to(self.dtype)

    def reduce(self, ranks: Ranks, stop: bool) -> Received:
        """The sums over all ranks. Every rank calls it once a round."""
        self.flat[sum(self.sizes) + 1] = float(stop)
        *sums, weight, stopping, report = ranks.all_reduce(self.flat).split([*self.sizes, *self.tail])
        scale = torch.where(weight > 0, 1 / weight, 0)
        means = [s * scale for s in sums]
        extra = dict(self.example.extra) if self.example else {}
        scalars = means[len(means) - len(extra) :]
        # Reading these numbers waits for the device.
        numbers = torch.cat([report, stopping, weight, *scalars]).to("cpu", torch.float64).numpy()
        rows = numbers[: self.tail[-1]].reshape(self.cohort, len(REPORT))
        loss, examples, gradients, high, low, finite = rows.T
        mean, buffers = None, ()
        if self.example is not None and numbers[self.tail[-1] + 1] > 0:
            n = len(self.example.payload)
            like = [(v.reshape(p.shape[1:]), p.dtype) for v, p in zip(means, _parts(self.example), strict=True)]
            payload = pytree.tree_unflatten([v.to(dtype) for v, dtype in like[:n]], self.example.structure)
            mean = Mean(payload, weight.reshape(()), report.view(self.cohort, -1)[:, -1].sum())
            averaged = like[n : n + len(self.example.buffers)]
            buffers = tuple((v if d.is_floating_point else v.round()).to(d) for v, d in averaged)
        values = numbers[self.tail[-1] + 2 :].tolist()
        return Received(mean, buffers, loss, examples, gradients, high * LOW + low, finite > 0,
                        dict(zip(extra, values, strict=True)), bool(numbers[self.tail[-1]] > 0))  # fmt: skip


def _parts(chunk: Chunk) -> list[Tensor]:
    return [*chunk.payload, *chunk.buffers, *chunk.extra.values()]
