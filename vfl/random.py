"""Counter-based random numbers: pure functions of a key, the same under vmap, in any chunk and on any rank.

A key is one int64 tensor []; a batch of keys is a tensor [C], and every function maps over it (directly or under
`torch.func.vmap`). Keys and integers come from SplitMix64 (Steele, Lea & Flood 2014, doi 10.1145/2660193.2660195) in
plain integer tensor operations. Floats and subsets come from Philox, one stream a key, on the CPU, and from SplitMix64
elsewhere: same seed and same device type give the same numbers, and a longer draw of floats begins with the shorter
one.

On the host, `fold_in` also takes keys as int64 numpy arrays (of at least one axis): the same numbers, for a third of
what small tensors' operations cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import pi, prod
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from vfl import native
from vfl.operation import at_once

_GOLDEN = -0x61C8864680B583EB  # 2⁶⁴ / golden ratio, as a signed integer
_MIX1 = -0x40A7B892E31B1A47
_MIX2 = -0x6B2FB644ECCEEE15

Keys = TypeVar("Keys", Tensor, np.ndarray)


def key(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The key [] of a seed (any integer; taken modulo 2⁶⁴)."""
    signed = (seed + 2**63) % 2**64 - 2**63
    # Filled on the device: a number from the host would make a GPU's queue wait.
    return _mix(torch.full((), signed, dtype=torch.int64, device=device) + _GOLDEN)


def fold_in(key: Keys, n: Keys | int) -> Keys:
    """The key of a key and a number: an independent stream for each n. Broadcasts: [C] with [], [] with [C]."""
    # Another offset than in `key`: with the same one, fold_in(key(a), b) would equal fold_in(key(b), a).
    if isinstance(n, Tensor) and isinstance(key, Tensor):
        return _mix(key ^ _mix(n.to(key.device, torch.int64) + _MIX1))
    if isinstance(n, np.ndarray):
        return _mix(key ^ _mix(n + _MIX1))
    return _mix(key ^ _mixed(int(n) + _MIX1))  # a number known beforehand costs no operation on arrays


def split(key: Tensor, n: int = 2) -> Tensor:
    """n independent keys [..., n] of a key [...]."""
    return fold_in(key[..., None], torch.arange(n, device=key.device))


def bits(key: Tensor, n: int) -> Tensor:
    """n random 64-bit integers a key: int64 [..., n]; the same on every device, and in vfl/compressors/kernels.cpp."""
    return _mix(key[..., None] + _GOLDEN * torch.arange(1, n + 1, device=key.device))


def permutation(key: Tensor, n: int) -> Tensor:
    """A uniform permutation of 0 … n − 1: int64 [..., n]."""
    return bits(key, n).argsort(dim=-1, stable=True)


def choice(key: Tensor, n: int, k: int) -> Tensor:
    """k different numbers of 0 … n − 1, every ordered selection equally likely: int64 [..., k]."""
    return permutation(key, n)[..., :k]


def subset(key: Tensor, n: int, k: int) -> Tensor:
    """Which k of n are chosen, every set equally likely: bool [..., n]. Much cheaper than `choice` for large n."""
    if not 0 <= k <= n:
        raise ValueError(f"subset chooses from 0 to n = {n}, not {k}")
    return at_once(lambda key: (_subset(key, n, k),), key)[0]


def positions(key: Tensor, n: int, k: int) -> Tensor:
    """Where `subset` is true, in no order: int64 [..., k]. Of a small share of n this is the cheaper form."""
    if not 0 <= k <= n:
        raise ValueError(f"positions chooses from 0 to n = {n}, not {k}")
    return at_once(lambda key: (_positions(key, n, k),), key)[0]


def randint(key: Tensor, shape: Sequence[int], high: int) -> Tensor:
    """Integers uniform on 0 … high − 1, high ≤ 2³¹: int64 [..., *shape] (bias below high / 2³²)."""
    if not 1 <= high <= 2**31:
        raise ValueError(f"randint draws below a bound from 1 to 2³¹, not {high}")
    words = _shift(bits(key, prod(shape)), 32)
    return ((words * high) >> 32).reshape((*key.shape, *shape))


def uniform(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Floats uniform on [0, 1): [..., *shape]; float32 or float64, since rounding to fewer bits would reach 1."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"uniform draws float32 or float64, not {dtype}")
    return at_once(lambda key: (_uniform(key, list(shape), dtype),), key)[0]


def normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal floats: [..., *shape]."""
    return at_once(lambda key: (_normal(key, list(shape), dtype),), key)[0]


def bernoulli(key: Tensor, p: Tensor | float, shape: Sequence[int]) -> Tensor:
    """True with probability p, independently: bool [..., *shape]."""
    return uniform(key, shape, torch.float64) < p


def generator(key: Tensor) -> np.random.Generator:
    """numpy's generator for host-side draws (cohorts, partitions) from a key []."""
    return np.random.Generator(np.random.Philox(key=int(key) % 2**64))


def _shift(z: Keys, n: int) -> Keys:
    """Logical right shift: that of int64 keeps the sign."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def _mix(z: Keys) -> Keys:
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def _mixed(n: int) -> int:
    """`_mix` of a Python integer."""
    z = n % 2**64
    z = (z ^ (z >> 30)) * _MIX1 % 2**64
    z = (z ^ (z >> 27)) * _MIX2 % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


# The draws of floats and subsets are opaque operators: vmap's own random operators are not keyed by client, and a
# Philox row filled by numpy costs a tenth of the hash in eager tensor operations. Uniform float32, the most of what is
# drawn, comes from random.cpp, the same numbers in less than half of numpy's time; so do subsets.

NATIVE = native.Source(
    Path(__file__).with_suffix(".cpp"),
    {
        "uniform": ("const int64_t*", "float*", "int64_t", "int64_t", "int64_t"),
        "toss": ("int64_t", "int64_t", "uint8_t*", "int64_t"),
        "flip": ("uint8_t*", "int64_t", "const int64_t*", "int64_t", "int64_t"),
    },
)


def _streams(key: Tensor) -> Iterator[tuple[int, np.random.Generator]]:
    """Each key with its Philox stream, one after the other."""
    philox = np.random.Philox(key=0)
    draw, state = np.random.Generator(philox), philox.state
    for k in key.reshape(-1).tolist():
        state["state"]["key"][0] = k % 2**64
        philox.state = state
        yield k, draw


def _rows(
    key: Tensor, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[np.random.Generator], Callable[..., object]]
) -> Tensor:
    wide = dtype == torch.float64
    out = np.empty((key.numel(), prod(shape)), np.float64 if wide else np.float32)
    for row, (_, draw) in zip(out, _streams(key), strict=True):
        fill(draw)(out=row, dtype=out.dtype)
    return torch.from_numpy(out).reshape((*key.shape, *shape)).to(dtype)


@torch.library.custom_op("vfl::uniform", mutates_args=(), device_types="cpu")
def _uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    n = prod(shape)
    if n < native.LARGE or dtype != torch.float32 or (fill := NATIVE.found("uniform")) is None:
        return _rows(key, shape, dtype, lambda draw: draw.random)
    key, out = key.contiguous(), key.new_empty((*key.shape, *shape), dtype=dtype)
    fill(key.data_ptr(), out.data_ptr(), key.numel(), n, torch.get_num_threads())
    return out


@torch.library.custom_op("vfl::normal", mutates_args=(), device_types="cpu")
def _normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return _rows(key, shape, dtype, lambda draw: draw.standard_normal)


SPARSE = 20
"""Of one in so many and fewer, the places are drawn; of more, a coin is tossed for each."""


@torch.library.custom_op("vfl::subset", mutates_args=(), device_types="cpu")
def _subset(key: Tensor, n: int, k: int) -> Tensor:
    out = np.zeros((key.numel(), n), bool)
    for row, (each, draw) in zip(out, _streams(key), strict=True):
        if SPARSE * k <= n:
            row[_drawn(draw, n, k)] = True
        else:
            _tossed(each, draw, k, row)
    return torch.from_numpy(out).reshape((*key.shape, n))


@torch.library.custom_op("vfl::positions", mutates_args=(), device_types="cpu")
def _positions(key: Tensor, n: int, k: int) -> Tensor:
    out, row = np.empty((key.numel(), k), np.int64), np.empty(n, bool)
    for places, (each, draw) in zip(out, _streams(key), strict=True):
        if SPARSE * k <= n:
            places[:] = _drawn(draw, n, k)
        else:
            _tossed(each, draw, k, row)
            places[:] = np.flatnonzero(row)
    return torch.from_numpy(out).reshape((*key.shape, k))


def _drawn(draw: np.random.Generator, n: int, k: int) -> np.ndarray:
    return draw.choice(n, k, replace=False, shuffle=False)


def _tossed(key: int, draw: np.random.Generator, k: int, row: np.ndarray) -> None:
    # Sixteen-bit coins choose about k; a uniform set of those in excess is taken back, of those missing added.
    n, philox = len(row), cast(np.random.Philox, draw.bit_generator)
    words, below = -(-n // 4), round(2**16 * k / n)
    toss, flip = (NATIVE.found(name) if n >= native.LARGE else None for name in ("toss", "flip"))
    if toss is not None:
        toss(key, below, row.ctypes.data, n)
        philox.advance(words // 4)  # in blocks of four, to where drawing the words would have brought it
        philox.random_raw(words % 4, output=False)
    else:
        np.less(philox.random_raw(words).view(np.uint16)[:n], below, out=row)
    chosen = int(np.count_nonzero(row))
    excess = chosen - k
    changed = _drawn(draw, chosen if excess > 0 else n - chosen, abs(excess))  # which of those that may change
    if flip is not None:
        changed.sort()
        flip(row.ctypes.data, n, changed.ctypes.data, len(changed), excess > 0)
    else:
        row[np.flatnonzero(row if excess > 0 else ~row)[changed]] = excess < 0


@_subset.register_kernel("cuda")
def _hashed_subset(key: Tensor, n: int, k: int) -> Tensor:
    lowest = _hashed_positions(key, n, k)
    return key.new_zeros((*key.shape, n), dtype=torch.bool).scatter(-1, lowest, True)


@_positions.register_kernel("cuda")
def _hashed_positions(key: Tensor, n: int, k: int) -> Tensor:
    return bits(key, n).topk(k, dim=-1, sorted=False).indices


@_subset.register_fake
def _subset_shape(key: Tensor, n: int, k: int) -> Tensor:
    return key.new_empty((*key.shape, n), dtype=torch.bool)


@_positions.register_fake
def _positions_shape(key: Tensor, n: int, k: int) -> Tensor:
    return key.new_empty((*key.shape, k))


for _choosing in (_subset, _positions):

    @_choosing.register_vmap
    def _batched_choice(info, in_dims, key, n, k, op=_choosing):  # pyright: ignore
        return op(key.movedim(in_dims[0], 0), n, k), 0


@_uniform.register_kernel("cuda")
def _hashed_uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    digits = 53 if dtype == torch.float64 else 24  # what the mantissa holds, so that 1 is never reached
    words = _shift(bits(key, prod(shape)), 64 - digits)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (words.to(wide) * 2.0**-digits).reshape((*key.shape, *shape)).to(dtype)


@_normal.register_kernel("cuda")
def _hashed_normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, v = _hashed_uniform(key, [*shape, 2], wide).unbind(-1)  # pairs, so that a longer draw begins with the shorter
    radius = (-2 * torch.log1p(-u)).sqrt()  # Box–Muller; 1 − u is never 0
    return (radius * torch.cos(2 * pi * v)).to(dtype)


for _op in (_uniform, _normal):

    @_op.register_fake
    def _shape(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
        return key.new_empty((*key.shape, *shape), dtype=dtype)

    @_op.register_vmap
    def _batched(info, in_dims, key, shape, dtype, op=_op):  # pyright: ignore
        # Keys of any batch shape are one call, so the vmapped axis only moves to the front.
        return op(key.movedim(in_dims[0], 0), shape, dtype), 0
