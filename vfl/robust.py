"""Aggregators by name: what the server makes of a cohort's messages. S a cohort, d the entries that lie on this rank.

Each is a `Combine` (or, where no message must be kept, a `Receive`) on whole messages: all parts of a payload are one
vector. The rules from order statistics and Krum count every client once, whatever weight it reports: an adversary
would report a large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfl.base import Algorithm, Combine, Message, Receive, leaves, tree_map
from vfl.errors import UsageError
from vfl.spec import resolve

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks."""

_BLOCK = 2**20  # entries that are sorted, or widened to float64, at once


class Aggregator(NamedTuple):
    """A rule in the place of the weighted mean, as the two fields of `Algorithm` that make it one."""

    receive: Receive | None
    combine: Combine | None

    def of(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm whose server receives and combines messages by this rule."""
        return algorithm._replace(receive=self.receive, combine=self.combine)


def mean() -> Aggregator:
    """The weighted mean."""
    return Aggregator(None, None)


def median() -> Aggregator:
    """The median of each coordinate, of an even number the mean of the middle two (Yin et al., 1803.01498)."""

    def combine(rows: Tensor, weight: Tensor, total: Total) -> Tensor:
        return _middle(rows, (len(rows) - 1) // 2)

    return Aggregator(None, combine)


def trimmed_mean(share: float = 0.1) -> Aggregator:
    """The mean of each coordinate without its ⌊share·S⌋ least and as many largest values (Yin et al., 1803.01498)."""
    if not 0 <= share < 0.5:
        raise UsageError(f"trimmed_mean cuts a share in [0, 0.5) off both ends, not {share}")

    def combine(rows: Tensor, weight: Tensor, total: Total) -> Tensor:
        return _middle(rows, math.floor(share * len(rows) + 1e-9))  # 0.29 · 100 is 29, not 28.999999999999996

    return Aggregator(None, combine)


def krum(f: int) -> Aggregator:
    """The message nearest to its S − f − 2 nearest others, safe from f Byzantine clients (Blanchard et al. 2017)."""
    return multi_krum(f, 1)


def multi_krum(f: int, m: int) -> Aggregator:
    """The mean of the m messages with the least Krum scores (Blanchard et al., 1703.02757, section 4).

    A message's score is the sum of its squared distances to the S − f − 2 nearest others; of equal ones the cohort's
    first counts. In a round of fewer than 2f + 3 messages, for which nothing is proven, and of fewer than m, the rule
    raises UsageError.
    """
    if f < 0 or m < 1:
        raise UsageError(f"multi_krum needs f ≥ 0 Byzantine clients and m ≥ 1 messages to average, not f={f}, m={m}")

    def combine(rows: Tensor, weight: Tensor, total: Total) -> Tensor:
        S = len(rows)
        if max(2 * f + 3, m) > S:
            raise UsageError(
                f"krum with f={f}, m={m} needs at least {max(2 * f + 3, m)} messages in a round and got {S}; "
                "ask more clients per round or lower f or m"
            )
        distance = squared_distances(rows, total)
        distance.fill_diagonal_(torch.inf)
        score = distance.sort(dim=1).values[:, : S - f - 2].sum(1)
        chosen = score.argsort(stable=True)[:m].sort().values
        return rows[chosen.to(rows.device)].mean(0)

    return Aggregator(None, combine)


def geometric_median(iterations: int = 10, eps: float = 1e-6) -> Aggregator:
    """The weighted geometric median, by smoothed Weiszfeld steps from the mean (RFA: Pillutla et al., 1912.13445).

    Each of the `iterations` takes z ← Σ βᵢ vᵢ / Σ βᵢ with βᵢ = wᵢ / max(eps, ‖z − vᵢ‖) (their Algorithm 2).
    """
    if iterations < 1 or not (eps > 0 and math.isfinite(eps)):
        raise UsageError(f"geometric_median needs iterations ≥ 1 and eps > 0, not iterations={iterations}, eps={eps}")

    def combine(rows: Tensor, weight: Tensor, total: Total) -> Tensor:
        z = _average(rows, weight)
        for _ in range(iterations):
            squared = weight.new_zeros(len(rows))
            for part, centre in zip(_blocks(rows), z.split(_columns(rows)), strict=True):
                squared = squared + (part - centre).square().sum(1, dtype=squared.dtype)
            z = _average(rows, weight / total(squared).sqrt().clamp(min=eps))
        return z

    return Aggregator(None, combine)


def norm_clip(max_norm: float) -> Aggregator:
    """The weighted mean of the messages, each scaled down to at most this norm (Sun et al., 1911.07963, section 5)."""
    if not (max_norm > 0 and math.isfinite(max_norm)):
        raise UsageError(f"norm_clip needs a finite norm > 0, not {max_norm}")

    def receive(message: Message) -> Message:
        squared = sum(leaf.square().sum() for leaf in leaves(message.payload))
        norm = torch.as_tensor(squared).sqrt()
        scale = (max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
        return message._replace(payload=tree_map(lambda leaf: leaf * scale, message.payload))

    return Aggregator(receive, None)


AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {
    f.__name__: f for f in (mean, median, trimmed_mean, krum, multi_krum, geometric_median, norm_clip)
}


def aggregator(spec: str) -> Aggregator:
    """The rule that a text names, such as `trimmed_mean:0.1` or `krum:f=2`. Raises UsageError where it names none."""
    return resolve(spec, AGGREGATORS, "aggregator")


def squared_distances(rows: Tensor, total: Total) -> Tensor:
    """‖vᵢ − vⱼ‖² [S, S] in float64 between messages of which [S, d] lie on this rank, by one sum over ranks."""
    gram = rows.new_zeros((len(rows), len(rows)), dtype=torch.float64)
    for part in _blocks(rows):
        wide = part.to(torch.float64)
        # Around their mean, messages that are close to each other keep their digits.
        centred = wide - wide.mean(0)
        gram = gram + centred @ centred.T
    gram = total(gram)
    squared = gram.diagonal()
    return (squared[:, None] + squared - 2 * gram).clamp(min=0)


def _average(rows: Tensor, weight: Tensor) -> Tensor:
    """Σ wᵢ vᵢ / Σ wᵢ [d]."""
    return (weight / weight.sum()).to(rows.dtype) @ rows


def _middle(rows: Tensor, cut: int) -> Tensor:
    """The mean [d] of each column's values without its `cut` least and `cut` largest."""
    return torch.cat([_sorted(part)[cut : len(rows) - cut].mean(0) for part in _blocks(rows)])


def _sorted(rows: Tensor) -> Tensor:
    """Each column in ascending order."""
    if rows.device.type == "cpu":  # numpy's vectorized sort is six to twenty times as fast as torch's
        return torch.from_numpy(np.sort(rows.numpy(), axis=0))
    return rows.sort(dim=0).values


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """The rows in groups of columns, so that temporaries stay small."""
    return rows.split(_columns(rows), dim=1)


def _columns(rows: Tensor) -> int:
    """Columns of a block."""
    return max(_BLOCK // len(rows), 1)
