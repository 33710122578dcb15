"""The precision of float32 matrix products on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Products of float32 matrices in TF32 (10 bits of mantissa) where a GPU has it; afterwards as before.

    Convolutions use it by torch's own default (`torch.backends.cudnn.allow_tf32`).
    """
    if not wanted:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
