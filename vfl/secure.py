"""The arithmetic of secure aggregation (Bonawitz et al., CCS 2017): a server that learns a sum and no summand.

Client i writes its vector in fixed point, as integers modulo M = 2^bits, and adds a mask for each pair it is part of:
cᵢ = encode(xᵢ) + Σ_{j>i} m_ij − Σ_{j<i} m_ij mod M. Each m_ij is uniform modulo M, from a key that i and j share, so
that a cᵢ alone is uniform too, whatever xᵢ is, while in Σ cᵢ every mask meets its negative. Sums modulo M may be taken
in any order and part by part.

This is the arithmetic alone. The keys are derived from one secret, in the place of a key agreement, and the generator
is no cryptographic one. Drop-out recovery is left out: if a client of the cohort never answers, its masks stay in the
sum and make it useless, where the protocol would recover them from shares of its keys.

Letters: D entries, C clients of the cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfl import random
from vfl.errors import UsageError


@dataclass(frozen=True)
class FixedPoint:
    """Numbers as integers modulo 2^bits, in units of 2^−fraction. Raises UsageError for widths that cannot be."""

    bits: int = 32
    """Of an integer, 2 to 53, so that float64 holds each of them."""
    fraction: int = 16
    """Of those behind the point."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 53:
            raise UsageError(f"fixed point takes from 2 to 53 bits, not {self.bits}")
        if not 0 <= self.fraction < self.bits:
            raise UsageError(f"fixed point of {self.bits} bits has from 0 to {self.bits - 1} of them behind the point, "
                             f"not {self.fraction}")  # fmt: skip

    def bound(self, clients: int) -> float:
        """The largest |entry| with which a sum of so many clients' cannot leave the range; 0: none is small enough."""
        return (2 ** (self.bits - 1) - 1) // clients / 2**self.fraction

    def error(self, clients: int) -> float:
        """The largest difference of an entry of the decoded sum to the sum of what was encoded."""
        return clients * 2.0 ** (-self.fraction - 1)

    def check(self, x: Tensor, clients: int) -> None:
        """Raises UsageError for x [..., D] with an entry beyond the bound for a sum over so many clients.

        Beyond it the sum could come out modulo 2^bits, as another number, and nothing would show it.
        """
        bound = self.bound(clients)
        wrong = ~(x.abs().to(torch.float64) <= bound)  # NaN too; in float32 the bound itself would be rounded up
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise UsageError(
                f"entry {at} is {float(x[tuple(at)]):g}, but {self.bits} bits with {self.fraction} behind the point "
                f"hold a sum over {clients} clients only up to ±{bound:g} each; clip it, or take more bits or fewer "
                "of them behind the point"
            )


def encode(x: Tensor, code: FixedPoint) -> Tensor:
    """x [..., D] to the nearest multiple of 2^−fraction: int64 from 0 to 2^bits − 1, the negative ones above half.

    What `FixedPoint.check` would refuse is encoded modulo 2^bits.
    """
    return _modulo(torch.round(x.to(torch.float64) * 2.0**code.fraction).to(torch.int64), code)


def decode(total: Tensor, code: FixedPoint) -> Tensor:
    """The number that integers modulo 2^bits [..., D] stand for, from −half to below half: float64."""
    half = 2 ** (code.bits - 1)
    return (_modulo(total + half, code) - half).to(torch.float64) * 2.0**-code.fraction


def pair_key(secret: Tensor, i: Tensor | int, j: Tensor | int) -> Tensor:
    """The key [] that clients i and j share: the same for both, another one for every pair and secret []."""
    a, b = (torch.as_tensor(n, device=secret.device) for n in (i, j))
    return random.fold_in(random.fold_in(secret, torch.minimum(a, b)), torch.maximum(a, b))


def mask(secret: Tensor, i: Tensor | int, cohort: Sequence[int], D: int, code: FixedPoint) -> Tensor:
    """Client i's mask [D], Σ_{j>i} m_ij − Σ_{j<i} m_ij over the others of the cohort, modulo 2^bits.

    `secret` [] is the round's: a mask used twice would give away a difference. Maps under vmap over i.
    """
    own = torch.as_tensor(i, device=secret.device)
    total = torch.zeros(D, dtype=torch.int64, device=secret.device)
    for j in cohort:
        sign = (own < j).to(torch.int64) - (own > j).to(torch.int64)  # 0 for itself
        total = _modulo(total + sign * _modulo(random.bits(pair_key(secret, own, j), D), code), code)
    return total


def masked(x: Tensor, secret: Tensor, i: Tensor | int, cohort: Sequence[int], code: FixedPoint) -> Tensor:
    """What client i sends of x [D]: int64 [D], bits·D in all. Maps under vmap over x and i."""
    return _modulo(encode(x, code) + mask(secret, i, cohort, x.shape[-1], code), code)


def secure_sum(x: Tensor, secret: Tensor, cohort: Sequence[int], code: FixedPoint) -> Tensor:
    """Σ xᵢ [D] in float64 of the cohort's rows x [C, D], as a server that sees masked vectors alone would find it.

    For a weighted mean, the rows are wᵢ xᵢ with wᵢ as one more entry. Raises UsageError for rows beyond the bound, and
    for a client that the cohort names twice.
    """
    if len(cohort) != len(x) or len(set(cohort)) != len(cohort):
        raise UsageError(
            f"a secure sum needs one row for each of the {len(set(cohort))} different clients, not {len(x)}"
        )
    code.check(x, len(cohort))
    ids = torch.tensor(list(cohort), device=x.device)
    sent = torch.func.vmap(lambda row, i: masked(row, secret, i, cohort, code))(x, ids)
    return decode(_modulo(sent.sum(0), code), code)


def bits(D: int, code: FixedPoint) -> float:
    """Bits of one client's message of D entries; what the pairs' key agreement costs is not in it."""
    return float(D * code.bits)


def _modulo(z: Tensor, code: FixedPoint) -> Tensor:
    """z modulo 2^bits, from 0: overflows of int64 are modulo 2⁶⁴, and so change nothing."""
    return z & (2**code.bits - 1)
