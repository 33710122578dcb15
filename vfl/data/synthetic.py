"""Gaussian classification of any size, for benchmarks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vfl.data.container import Dataset, Examples, cast
from vfl.data.partition import generator
from vfl.errors import UsageError

_BLOCK = 1 << 22  # numbers drawn at once: 16 MB beside the data
_MOST = 1 << 42  # numbers in all: 16 TB


def synthetic(
    features: int = 32,
    classes: int = 10,
    examples: int = 20,
    separation: float = 4.0,
    test: int = 2000,
    *,
    clients: int | None,
    seed: int,
) -> Dataset:
    """y uniform over the classes, x = mean_y + N(0, I) in R^features, `examples` for each client (None: 100 clients).

    The means are N(0, separation² / (2·features) · I), so two lie about `separation` apart, in units of the noise: 4
    leaves a few per cent of error between two classes. Rows lie client by client (`offsets`), written block by block:
    the peak memory is the data's own. The first clients are the same whatever N. Raises UsageError.
    """
    N = 100 if clients is None else clients
    for name, value, least in (
        ("features", features, 1),
        ("classes", classes, 2),
        ("examples", examples, 1),
        ("test", test, 0),
        ("clients", N, 1),
    ):
        if value < least:
            raise UsageError(f"synthetic: {name} must be at least {least}, not {value}")
    if max(N * examples, test, classes) * features >= _MOST:
        raise UsageError(
            f"synthetic: {N} clients × {examples} examples of {features} features (test={test}, classes={classes}) are "
            "more than any memory holds; take fewer"
        )
    if not 0 <= separation < math.inf:
        raise UsageError(f"synthetic: separation must be a number from 0 up, not {separation}")
    scale = separation / math.sqrt(2 * features)
    means = scale * generator(seed, "synthetic means").standard_normal((classes, features), np.float32)
    train = Examples(*_draw(means, N * examples, seed, "train"))
    held = Examples(*_draw(means, test, seed, "test")) if test else None
    return Dataset("synthetic", train, held, classes, cast, offsets=np.arange(N + 1) * examples)


def _draw(means: np.ndarray, M: int, seed: int, split: str) -> tuple[Tensor, Tensor]:
    """x [M, features] float32, y [M] int64. Labels and noise have a stream each, so that blocks leave no trace."""
    classes, features = means.shape
    x, y = torch.empty(M, features), torch.empty(M, dtype=torch.int64)
    labels, noise = generator(seed, f"synthetic {split} y"), generator(seed, f"synthetic {split} x")
    rows = max(1, _BLOCK // features)
    for start in range(0, M, rows):
        x_block, y_block = x[start : start + rows].numpy(), y[start : start + rows].numpy()
        y_block[:] = labels.integers(classes, size=len(y_block))
        noise.standard_normal(dtype=np.float32, out=x_block)
        x_block += means[y_block]
    return x, y
