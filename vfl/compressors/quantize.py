"""Compressors that send every entry in fewer bits. D entries, b bits of a float.

A pass over a fresh tensor costs several times one over a tensor in the cache. So what a function has just made is
changed in place; and where a kernel of our own serves, which does the same in one or two passes, it is called.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vfl import random
from vfl.compressors import kernels
from vfl.compressors.base import Code, Layout, Operator, projection, unbiased
from vfl.errors import UsageError

INTEGERS = {  # of the width of each float
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_SIGN = {integer: torch.iinfo(integer).min for integer in INTEGERS.values()}  # the highest bit


def natural(*, layout: Layout) -> Operator:
    """Random rounding to a power of two (Horváth et al. 1905.10988): ω = 1/8, 9D bits for float32: sign and exponent.

    Above the largest power of two it may round up to infinity, since nothing else there would be unbiased.
    """
    digits = _digits(layout.dtype)

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        code = code._replace(header=0.0, value=float(layout.float_bits - digits))
        if (value := kernels.natural(v, key)) is not None:
            return value, code
        # A random number below the last place is added to the fraction, and the fraction cut off: what carries into
        # the exponent does so with exactly the fraction's value as probability, below the normal numbers too.
        below = _uniform(v, key).mul_(2.0**digits).to(INTEGERS[v.dtype])
        value = below.add_(v.view(below.dtype)).bitwise_and_(_without_fraction(v.dtype)).view(v.dtype)
        return value.add_(v, alpha=0), code  # 0·v keeps NaN, whose fraction could carry into the sign

    return unbiased(apply, 1 / 8)


def standard_dithering(s: int, norm: float = 2.0, *, layout: Layout) -> Operator:
    """norm(v)·sign(v)·(|v|/norm(v) rounded at random to s levels): ω = min(D/s², √D/s) for norm 2 and above.

    b + D(1 + ⌈log₂(s + 1)⌉) bits. Norm 2 is QSGD (Alistarh et al. 1610.02132, Lemma 3.1); any p-norm from 1 to inf.
    """
    _check("standard_dithering", s, 65535, norm)
    D = layout.entries
    excess = D ** max(0.0, 1 / norm - 1 / 2)  # the p-norm is at most so many times the 2-norm
    omega = min(D * excess**2 / s**2, math.sqrt(D) * excess / s)
    if s == 1 and norm == math.inf:
        omega = (math.sqrt(D) - 1) / 2  # the largest ‖v‖₁‖v‖_∞/‖v‖₂² − 1, at one entry √D + 1 times the others

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        code, step = _dithered(code, layout, s), _norm(v, norm) / s
        if (value := kernels.standard_dithering(v, key, step, s)) is not None:
            return value, code
        u = _uniform(v, key)
        raised = u.addcdiv_(v.to(u.dtype), torch.where(step > 0, step, 1))
        level = raised.floor_().clamp_(-s, s)  # a norm rounded down could leave |v|/step above s
        return level.mul_(step).to(v.dtype), code

    return unbiased(apply, omega)


def qsgd(s: int, *, layout: Layout) -> Operator:
    """Standard dithering with the 2-norm (Alistarh et al. 1610.02132)."""
    return standard_dithering(s, 2.0, layout=layout)


def terngrad(*, layout: Layout) -> Operator:
    """Standard dithering with one level and the ∞-norm (Wen et al. 1705.07878): ω = (√D − 1)/2, b + 2D bits."""
    return standard_dithering(1, math.inf, layout=layout)


def natural_dithering(s: int, norm: float = 2.0, *, layout: Layout) -> Operator:
    """norm(v)·sign(v)·(|v|/norm(v) rounded at random to 0 and 2^{1−s}, …, ½, 1); b + D(1 + ⌈log₂(s + 1)⌉) bits.

    ω = 1/8 + e·min(1, e) with e = D^{1/r} 2^{1−s}, r = min(p, 2) (Horváth et al. 1905.10988).
    """
    _check("natural_dithering", s, 32, norm)
    lowest = 2.0 ** (1 - s)
    excess = layout.entries ** (1 / min(norm, 2)) * lowest

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        code, step = _dithered(code, layout, s), _norm(v, norm) * lowest
        if (value := kernels.natural_dithering(v, key, step, s)) is not None:
            return value, code
        u = _uniform(v, key)
        wide, integer, mask = v.to(u.dtype), INTEGERS[u.dtype], _without_fraction(u.dtype)
        away = u.copysign_(wide)  # from 0
        scaled = wide / torch.where(step > 0, step, 1)
        # In units of the lowest level, the gap above is 1 below the level 1, else the power of two below.
        gap = (scaled.view(integer) & (mask ^ _SIGN[integer])).view(u.dtype).clamp_min_(1)
        raised = away.mul_(gap).add_(scaled)
        # Of the powers of two below 1, none is rounded up.
        level = raised.view(integer).bitwise_and_(mask).view(u.dtype).round_().clamp_(-1 / lowest, 1 / lowest)
        return level.mul_(step).to(v.dtype), code

    return unbiased(apply, 1 / 8 + excess * min(1, excess))


def sign(*, layout: Layout) -> Operator:
    """‖v‖₁/D · sign(v) with sign(0) = 1: α = ‖v‖₁²/(D‖v‖²) ≥ 1/D, b + D bits (Karimireddy et al. 1901.09847)."""
    D = layout.entries

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        code = Code(float(layout.float_bits), float(D), 1.0, 0.0)
        if (value := kernels.sign(v)) is not None:
            return value, code
        integer = INTEGERS[v.dtype]
        mean = v.abs().sum(-1, keepdim=True).div_(D)
        # As `copysign` would, which takes longer: the bit of the sign from v, the others from the mean.
        return v.view(integer).bitwise_and(_SIGN[integer]).bitwise_or_(mean.view(integer)).view(v.dtype), code

    return projection(apply, 1 / D)


def quantize(bits: int, threshold: float = 0.0, *, layout: Layout) -> Operator:
    """2^bits even levels from each layer's least to its largest entry, to the nearest; then the smallest entries to 0.

    As FLUTE does (Dimitriadis et al. 2203.13789): entries whose |v| is under the layer's threshold-quantile become 0.
    Two floats a layer, and `bits` for each entry kept, with its position (⌈log₂ D⌉ bits) if there is a threshold.
    Biased, and without a contraction constant.
    """
    check_quantize(bits, threshold)

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        return quantized(v, bits, threshold, layout)

    return Operator(apply, None, None)


def check_quantize(bits: int, threshold: float) -> None:
    """Raises UsageError for parameters out of range."""
    if not 1 <= bits <= 16:
        raise UsageError(f"compressor quantize:{bits} takes from 1 to 16 bits")
    if not 0 <= threshold < 1:
        raise UsageError(f"compressor quantize's threshold is a quantile from 0 to below 1, not {threshold}")


def quantized(v: Tensor, bits: int, threshold: Tensor | float, layout: Layout) -> tuple[Tensor, Code]:
    """`quantize` of v [..., D] with a threshold, the round's own, that may be a tensor [...], and how it is written."""
    quantile = threshold if isinstance(threshold, Tensor) or threshold else None
    found = kernels.quantize(v, 2**bits, layout.sizes, quantile) or _quantize(v, 2**bits, layout.sizes, quantile)
    value, kept = found
    header = 2.0 * layout.float_bits * len(layout.shapes)
    if kept is None:
        return value, Code(header, float(layout.entries), float(bits), 0.0)
    return value, Code(header, kept, float(bits), float(layout.position_bits))


def _quantize(
    v: Tensor, levels: int, sizes: list[int], threshold: Tensor | float | None
) -> tuple[Tensor, Tensor | None]:
    """The values, with how many [...] were kept if there is a threshold."""
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    parts = wide.split(sizes, -1)
    lows, highs = (
        torch.cat([bound(part, -1, keepdim=True) for part in parts], -1) for bound in (torch.amin, torch.amax)
    )
    steps = (highs - lows) / (levels - 1)  # [..., layers]; an infinite one makes every value NaN
    units = torch.where(steps > 0, steps, 1)
    value = wide.clone()
    each = (t.split(1, -1) for t in (lows, units, steps))
    for part, low, unit, step in zip(value.split(sizes, -1), *each, strict=True):
        part.sub_(low).div_(unit).round_().mul_(step).add_(low)
    value = value.to(v.dtype)
    if threshold is None:
        return value, None
    kept = torch.cat([_large(part, threshold) for part in v.split(sizes, -1)], -1)
    return value * kept, kept.sum(-1)


def _large(v: Tensor, threshold: Tensor | float) -> Tensor:
    """Which entries of a layer are not under its quantile by size."""
    size = v.abs()
    # The first value at or above the quantile's position, for layers of any length (torch.quantile stops at 2²⁴).
    if isinstance(threshold, Tensor):
        at = torch.ceil(threshold.to(torch.float64) * (v.shape[-1] - 1)).long()
        least_kept = size.sort().values.gather(-1, at[..., None])
    else:
        least_kept = size.kthvalue(math.ceil(threshold * (v.shape[-1] - 1)) + 1, keepdim=True).values
    return size >= least_kept


def _digits(dtype: torch.dtype) -> int:
    """Binary digits of a float's fraction."""
    return -round(math.log2(torch.finfo(dtype).eps))


def _without_fraction(dtype: torch.dtype) -> int:
    """A float's sign and exponent, as a mask: they are the power of two at or towards zero of a normal number."""
    return -1 << _digits(dtype)


def _uniform(v: Tensor, key: Tensor) -> Tensor:
    """Uniform numbers for the entries of v [..., D], as precise as they."""
    return random.uniform(key, v.shape[-1:], torch.float64 if v.dtype == torch.float64 else torch.float32)


def _norm(v: Tensor, p: float) -> Tensor:
    """The p-norm [..., 1] in at least float32, as the receiver gets it: a float of v's type."""
    wide = torch.promote_types(v.dtype, torch.float32)
    if p == math.inf:
        if (norm := kernels.largest(v)) is not None:
            return norm
        return torch.maximum(v.amax(-1, keepdim=True), -v.amin(-1, keepdim=True)).abs().to(wide)  # abs: never -0
    n = torch.linalg.vector_norm(v, p, -1, keepdim=True, dtype=wide)
    if wide == v.dtype:
        return n
    return (n * (1 + torch.finfo(v.dtype).eps)).to(v.dtype).to(wide)  # rounded up, so that no entry exceeds it


def _dithered(code: Code, layout: Layout, s: int) -> Code:
    """The norm once, then a sign and one of s + 1 levels for each entry."""
    return code._replace(header=float(layout.float_bits), value=1.0 + s.bit_length())


def _check(name: str, s: int, most: int, norm: float) -> None:
    if not 1 <= s <= most:
        raise UsageError(f"compressor {name} has from 1 to {most} levels, not {s}")
    if not norm >= 1:
        raise UsageError(f"compressor {name} needs a p-norm with p from 1 to inf, not {norm}")
