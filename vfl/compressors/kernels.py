"""Compressors' arithmetic as machine code of our own (kernels.cpp): torch's operators pass over memory once each.

Every function gives what those operators give, entry by entry, but for the rounding of a sum, where there is one; or
None where they have to serve. v is [..., D], key [...].
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vfl import native
from vfl.operation import watched

NATIVE = native.Source(
    Path(__file__).with_suffix(".cpp"),
    {
        "sign": ("const float*", "float*", *["int64_t"] * 3),
        "quantize": ("const float*", "const int64_t*", "const double*", "float*", "int64_t*", *["int64_t"] * 5),
        "largest": ("const float*", "float*", *["int64_t"] * 3),
        "standard_dithering": ("const float*", "const int64_t*", "const float*", "float*", *["int64_t"] * 4),
        "natural_dithering": ("const float*", "const int64_t*", "const float*", "float*", *["int64_t"] * 4),
        "natural": ("const float*", "const int64_t*", "float*", *["int64_t"] * 3),
        "bernoulli": ("const float*", "const int64_t*", "float*", "double*", *["int64_t"] * 5),
        "chosen": ("const float*", "const int64_t*", "float*", *["int64_t"] * 5),
        "masked": ("const float*", "const uint8_t*", "float*", *["int64_t"] * 4),
    },
)


def sign(v: Tensor) -> Tensor | None:
    """‖v‖₁/D · sign(v)."""
    if (kernel := _kernel("sign", v)) is None:
        return None
    v = v.contiguous()
    value = torch.empty_like(v)
    _run(kernel, v, value, *_rows(v))
    return value


def quantize(
    v: Tensor, levels: int, sizes: Sequence[int], threshold: Tensor | float | None
) -> tuple[Tensor, Tensor | None] | None:
    """Each layer's entries, of which there are so many, to the nearest of the even levels over their range.

    With a threshold, those whose |v| is under this quantile of their layer become 0; the others are counted, [...].
    """
    if (kernel := _kernel("quantize", v)) is None:
        return None
    v = v.contiguous()
    value, quantile, kept = torch.empty_like(v), None, None
    if threshold is not None:
        quantile = torch.as_tensor(threshold, dtype=torch.float64, device=v.device).expand(v.shape[:-1]).contiguous()
        kept = torch.zeros_like(quantile, dtype=torch.int64)
    entries = torch.tensor(sizes, device=v.device)
    _run(kernel, v, entries, quantile, value, kept, *_rows(v), len(sizes), levels - 1)
    return value, kept


def largest(v: Tensor) -> Tensor | None:
    """The ∞-norm [..., 1]."""
    if (kernel := _kernel("largest", v)) is None:
        return None
    v = v.contiguous()
    norm = v.new_empty((*v.shape[:-1], 1))
    _run(kernel, v, norm, *_rows(v))
    return norm


def standard_dithering(v: Tensor, key: Tensor, step: Tensor, s: int) -> Tensor | None:
    """v rounded at random to s multiples of step [..., 1]."""
    return _dithering("standard_dithering", v, key, step, s)


def natural_dithering(v: Tensor, key: Tensor, step: Tensor, s: int) -> Tensor | None:
    """v rounded at random to s multiples of step [..., 1], each twice the one below."""
    return _dithering("natural_dithering", v, key, step, s)


def natural(v: Tensor, key: Tensor) -> Tensor | None:
    """v rounded at random to powers of two."""
    if (kernel := _kernel("natural", v)) is None:
        return None
    v = v.contiguous()
    value = torch.empty_like(v)
    _run(kernel, v, key.contiguous(), value, *_rows(v))
    return value


def bernoulli(v: Tensor, key: Tensor, most: int, factor: float) -> tuple[Tensor, Tensor] | None:
    """factor · v where the key's first `vfl.random.bits` are at most so large, else 0 · v; and which are sent [...]."""
    if (kernel := _kernel("bernoulli", v)) is None:
        return None
    v, key = v.contiguous(), key.contiguous()
    value, sent = torch.empty_like(v), torch.empty_like(key, dtype=torch.float64)
    _run(kernel, v, key, value, sent, *_rows(v), most, _bits(factor))
    return value, sent


def chosen(v: Tensor, at: Tensor, factor: float) -> Tensor | None:
    """factor · v at the positions [..., k], 0 · v elsewhere."""
    if (kernel := _kernel("chosen", v)) is None:
        return None
    v, at = v.contiguous(), at.contiguous()
    value = torch.empty_like(v)
    _run(kernel, v, at, value, *_rows(v), at.shape[-1], _bits(factor))
    return value


def masked(v: Tensor, mask: Tensor, factor: float) -> Tensor | None:
    """factor · v where the bool mask [..., D] says so, 0 · v elsewhere."""
    if (kernel := _kernel("masked", v)) is None:
        return None
    v, mask = v.contiguous(), mask.contiguous()
    value = torch.empty_like(v)
    _run(kernel, v, mask, value, *_rows(v), _bits(factor))
    return value


def _dithering(name: str, v: Tensor, key: Tensor, step: Tensor, s: int) -> Tensor | None:
    if (kernel := _kernel(name, v)) is None:
        return None
    v = v.contiguous()
    value = torch.empty_like(v)
    _run(kernel, v, key.contiguous(), step.contiguous(), value, *_rows(v), s)
    return value


def _rows(v: Tensor) -> tuple[int, int]:
    D = v.shape[-1]
    return v.numel() // D, D


def _bits(x: float) -> int:
    """A float64 as the whole number that kernels take."""
    return struct.unpack("q", struct.pack("d", x))[0]


def _run(kernel: Callable[..., None], *given: Tensor | int | None) -> None:
    kernel(*(x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in given), torch.get_num_threads())


def _kernel(name: str, v: Tensor) -> Callable[..., None] | None:
    """This kernel, if v is large, in float32, on a CPU, and nobody watches torch's operators."""
    plain = v.dtype == torch.float32 and v.device.type == "cpu" and v.shape[-1] >= native.LARGE
    return NATIVE.found(name) if plain and not watched(v) else None
