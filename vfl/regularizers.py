"""Regularizers r(x) of the flat model x [D], by name: `l2:0.01`, `nonconvex:0.1`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from vfl.errors import UsageError
from vfl.spec import resolve


class Regularizer(NamedTuple):
    """r(x) = λ/2 ‖x‖² + α Σ x²/(1 + x²)."""

    l2: float = 0.0  # λ
    nonconvex: float = 0.0  # α

    def __call__(self, x: Tensor) -> Tensor:
        """r(x) [] of x [D]."""
        squares = x.square()
        return (self.l2 / 2 * squares + self.nonconvex * squares / (1 + squares)).sum()

    @property
    def largest(self) -> float:
        """The largest curvature: that of x²/(1 + x²), (2 − 6x²)/(1 + x²)³, is 2 at x = 0."""
        return self.l2 + 2 * self.nonconvex

    @property
    def smallest(self) -> float:
        """The smallest curvature, below 0 where r is not convex: that of x²/(1 + x²) is −1/2 at x = ±1."""
        return self.l2 - self.nonconvex / 2


NONE = Regularizer()  # r = 0


def l2(strength: float) -> Regularizer:
    """λ/2 ‖x‖² with λ = STRENGTH: makes a convex objective λ-strongly convex."""
    return Regularizer(l2=_strength("l2", strength))


def nonconvex(strength: float) -> Regularizer:
    """α Σ x²/(1 + x²) with α = STRENGTH: bounded, and not convex beyond |x| = 1/√3."""
    return Regularizer(nonconvex=_strength("nonconvex", strength))


REGULARIZERS: dict[str, Callable[..., Regularizer]] = {"l2": l2, "nonconvex": nonconvex}


def regularizer(spec: str | None) -> Regularizer:
    """The regularizer that a spec of `REGULARIZERS` names; None: r = 0. Raises UsageError."""
    return NONE if spec is None else resolve(spec, REGULARIZERS, "regularizer")


def _strength(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise UsageError(f"{name}: the strength must be a finite number ≥ 0, not {value}")
    return value
