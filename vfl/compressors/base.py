"""The types of a compressor, and how the size of what it sends is counted. D entries of a vector.

Compressors are written for one vector [D] with a key [] or, with any axes in front of these, for many: so `vmap` takes
no operator of theirs apart (`vfl.operation.at_once`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Number = Tensor | float


class Compressed(NamedTuple):
    """A vector on its way."""

    value: Tensor  # [D] what the receiver decodes
    bits: Tensor  # [] float64, exact size of this encoding


class Compressor(NamedTuple):
    """A randomized map C of vectors, with the constants that theory knows of it."""

    name: str
    compress: Callable[[Tensor, Tensor], Compressed]  # (v [D], key []) → compressed
    omega: float | None  # unbiased, with E‖C(v) − v‖² ≤ ω‖v‖²; None: biased
    alpha: float | None  # contractive, E‖C(v) − v‖² ≤ (1 − α)‖v‖²; None: not, or not known to be


class Layout(NamedTuple):
    """The flat vectors that a compressor is made for."""

    shapes: tuple[tuple[int, ...], ...]  # of the layers, whose entries follow each other in v
    dtype: torch.dtype

    @property
    def sizes(self) -> list[int]:
        """Entries of each layer."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def entries(self) -> int:
        """D."""
        return sum(self.sizes)

    @property
    def float_bits(self) -> int:
        """b, the bits of one float."""
        return torch.finfo(self.dtype).bits

    @property
    def position_bits(self) -> int:
        """⌈log₂ D⌉, the bits of a position."""
        return (self.entries - 1).bit_length()


class Code(NamedTuple):
    """How a vector is written: a header, then for each entry that is sent its value and its position. [...] each."""

    header: Number  # bits beside the entries
    entries: Number  # how many are sent
    value: Number  # bits of an entry's value
    position: Number  # bits of an entry's position; 0: the receiver knows it

    def bits(self, device: torch.device) -> Tensor:
        """The whole size [...] float64; at least 1, since who sends nothing says so."""
        size = self.header + self.entries * (self.value + self.position)
        return scalar(size, device).clamp(min=1) if isinstance(size, Tensor) else scalar(max(size, 1.0), device)


def plain(layout: Layout) -> Code:
    """Every entry as a float."""
    return Code(0.0, float(layout.entries), float(layout.float_bits), 0.0)


class Operator(NamedTuple):
    """A compressor that can be applied after another one: `code` says how its input would be written."""

    apply: Callable[[Tensor, Tensor, Code], tuple[Tensor, Code]]  # (v [..., D], key [...], code) → C(v), its code
    omega: float | None
    alpha: float | None
    projects: bool = False  # C(v) is an orthogonal projection of v, so ‖C(v)‖² = ‖v‖² − ‖C(v) − v‖²


def unbiased(apply: Callable[[Tensor, Tensor, Code], tuple[Tensor, Code]], omega: float) -> Operator:
    """An unbiased operator; below ω = 1 it is also a contraction, with α = 1 − ω."""
    return Operator(apply, omega, 1 - omega if omega < 1 else None)


def projection(apply: Callable[[Tensor, Tensor, Code], tuple[Tensor, Code]], alpha: float) -> Operator:
    """A biased operator that projects; with α = 1 it changes nothing, and so is unbiased too."""
    return Operator(apply, 0.0 if alpha == 1 else None, alpha, True)


def scalar(x: Number, device: torch.device) -> Tensor:
    """A number as float64 [...]."""
    return x.to(torch.float64) if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device)


def least(x: Number, most: float) -> Number:
    """The smaller of two numbers."""
    return x.clamp(max=most) if isinstance(x, Tensor) else min(x, most)
