"""Compressors that send fewer numbers: all or nothing, some entries, or a matrix of low rank. D entries."""

from __future__ import annotations

import torch
from torch import Tensor

from vfl import random
from vfl.compressors import kernels
from vfl.compressors.base import Code, Layout, Operator, least, projection, unbiased
from vfl.errors import UsageError


def identity(*, layout: Layout) -> Operator:
    """C(v) = v: ω = 0, bD bits."""
    return unbiased(lambda v, key, code: (v, code), 0.0)


def bernoulli(p: float, *, layout: Layout) -> Operator:
    """v/p with probability p, else nothing ("lazy"): ω = 1/p − 1, bD bits or 1."""
    if not 0 < p <= 1:
        raise UsageError(f"compressor bernoulli:{p} sends with a probability above 0 and at most 1")

    most = max(round(p * 2**64), 1) - 2**63 - 1  # of 64-bit integers, a share p is no larger

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        if (found := kernels.bernoulli(v, key, most, 1 / p)) is None:
            sent = random.bits(key, 1) <= most  # [..., 1]; one coin costs less by the hash than by a stream
            # Zero times infinity is NaN: a vector that is not finite shows even when it is not sent.
            found = v * (sent.to(v.dtype) * (1 / p)), sent.squeeze(-1).to(torch.float64)
        value, one = found
        return value, code._replace(header=code.header * one, entries=code.entries * one)

    return unbiased(apply, 1 / p - 1)


def rand_k(k: str, *, layout: Layout) -> Operator:
    """(D/k)·v on k random entries: ω = D/k − 1, bk bits; both sides draw the positions from the client's key."""
    D = layout.entries
    count = entries("rand_k", k, D)

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        # Multiplied, not selected: an entry that is not finite leaves NaN behind even where it is not chosen.
        if random.SPARSE * count <= D:
            at = random.positions(key, D, count)
            if (value := kernels.chosen(v, at, D / count)) is None:
                value = (v * 0).scatter_(-1, at, v.gather(-1, at) * (D / count))
        else:
            kept = random.subset(key, D, count)
            if (value := kernels.masked(v, kept, D / count)) is None:
                # As bytes, since torch converts bools to floats several times more slowly.
                value = kept.view(torch.uint8).to(v.dtype).mul_(v).mul_(D / count)
        return value, code._replace(entries=least(code.entries, count))

    return unbiased(apply, D / count - 1)


def top_k(k: str, *, layout: Layout) -> Operator:
    """The k entries of largest |v|: α = k/D, k(b + ⌈log₂ D⌉) bits. NaN and infinities come first."""
    D = layout.entries
    count = entries("top_k", k, D)

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        at = v.abs().topk(count, sorted=False).indices
        value = torch.zeros_like(v).scatter_(-1, at, v.gather(-1, at))
        return value, code._replace(entries=least(code.entries, count), position=float(layout.position_bits))

    return projection(apply, count / D)


def rank_k(k: int, *, layout: Layout) -> Operator:
    """The best rank-k approximation of each A×B layer (by SVD): α = min k/min(A, B), bk(A + B) bits a layer.

    A layer of more dimensions is the matrix of its first by all its others. Vectors, and matrices whose k(A + B)
    numbers would be no fewer than their AB, are sent as they are.
    """
    matrices = [(shape[0], n // shape[0]) if len(shape) > 1 else (1, n) for shape, n in _layers(layout)]
    largest = max(min(matrix) for matrix in matrices)
    if not 1 <= k <= largest:
        raise UsageError(f"compressor rank_k:{k} needs a rank from 1 to {largest}, the largest that a layer here has")
    b, reduced = layout.float_bits, [k * (A + B) < A * B for A, B in matrices]
    sizes = [k * (A + B) if low else A * B for (A, B), low in zip(matrices, reduced, strict=True)]

    def approximate(part: Tensor, matrix: tuple[int, int]) -> Tensor:
        M = part.unflatten(-1, matrix).to(torch.promote_types(part.dtype, torch.float32))
        finite = torch.isfinite(M).all(-1).all(-1)[..., None, None]
        U, S, Vh = torch.linalg.svd(torch.where(finite, M, 0), full_matrices=False)
        left, right = (U[..., :k] * S[..., None, :k]).to(part.dtype), Vh[..., :k, :].to(part.dtype)
        return torch.where(finite, left @ right, torch.nan).flatten(-2)

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        parts = zip(v.split(layout.sizes, -1), matrices, reduced, strict=True)
        value = torch.cat([approximate(part, matrix) if low else part for part, matrix, low in parts], -1)
        return value, Code(float(b * sum(sizes)), float(layout.entries), 0.0, 0.0)

    ratios = [k / min(matrix) for matrix, low in zip(matrices, reduced, strict=True) if low]
    return projection(apply, min(ratios, default=1.0))


def entries(name: str, text: str, D: int) -> int:
    """How many of D entries `50`, `0.1` or `5%` means: at least 1. Raises UsageError."""
    what = f"compressor {name}:{text}"
    try:
        whole = text.lstrip("+-").isdigit()
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UsageError(f"{what} needs a count, a fraction or a percentage of entries, as in {name}:5%") from None
    if whole and share > D:
        raise UsageError(f"{what} asks for more entries than the {D} there are")
    if whole and share < 1:
        raise UsageError(f"{what} must keep at least 1 entry")
    if not whole and not 0 < share <= 1:
        raise UsageError(f"{what} is a fraction outside (0, 1]; write a whole number for a count")
    return int(share) if whole else max(round(share * D), 1)


def _layers(layout: Layout) -> list[tuple[tuple[int, ...], int]]:
    return list(zip(layout.shapes, layout.sizes, strict=True))
