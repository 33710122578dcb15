"""Gaussian classification: of any size, for benchmarks; and the Synthetic(α, β) of the FedProx paper."""

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


def fedprox_synthetic(
    alpha: float = 1.0,
    beta: float = 1.0,
    iid: bool = False,
    features: int = 60,
    classes: int = 10,
    *,
    clients: int | None,
    seed: int,
) -> Dataset:
    """Synthetic(α, β) of FedProx (Li et al., arXiv 1812.06127, §5.1), a softmax model of its own for every client.

    y = argmax(W_k x + b_k) with x ~ N(v_k, Σ), Σ = diag(j^−1.2); W_k and b_k ~ N(u_k, 1) entry by entry, u_k ~ N(0, α):
    α is how much the models differ; v_k ~ N(B_k, 1), B_k ~ N(0, β): β is how much the inputs do. Both are variances, as
    in the paper (its code takes standard deviations). So defined, u_k raises all classes alike: α changes no label, and
    the models differ by the 1 in N(u_k, 1) alone. With `iid`, all share W and b ~ N(0, 1), and v = 0. A client (None:
    30 of them) has 50 + ⌊exp(N(4, 2²))⌋ examples, a tenth of which, rounded up, goes to the global test set. Raises
    UsageError.
    """
    N = 30 if clients is None else clients
    for name, count, least in (("features", features, 1), ("classes", classes, 2), ("clients", N, 1)):
        if count < least:
            raise UsageError(f"fedprox_synthetic: {name} must be at least {least}, not {count}")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < math.inf:
            raise UsageError(f"fedprox_synthetic: {name} must be a finite number ≥ 0, not {value}")
    draw = generator(seed, "fedprox_synthetic")
    sizes = 50 + np.exp(4 + 2 * draw.standard_normal(N)).astype(np.int64)
    std = np.arange(1, features + 1) ** -0.6  # of √Σ
    W, b, v = draw.standard_normal((features, classes)), draw.standard_normal(classes), np.zeros(features)
    x, y = np.empty((sizes.sum(), features), np.float32), np.empty(sizes.sum(), np.int64)
    for end, n in zip(np.cumsum(sizes), sizes, strict=True):
        if not iid:
            u, B = math.sqrt(alpha) * draw.standard_normal(), math.sqrt(beta) * draw.standard_normal()
            W, b = u + draw.standard_normal((features, classes)), u + draw.standard_normal(classes)
            v = B + draw.standard_normal(features)
        inputs = v + std * draw.standard_normal((n, features))
        x[end - n : end], y[end - n : end] = inputs, (inputs @ W + b).argmax(1)
    trained = 9 * sizes // 10
    kept = np.concatenate([np.arange(n) < t for n, t in zip(sizes, trained, strict=True)])
    train, test = (Examples(torch.from_numpy(x[rows]), torch.from_numpy(y[rows])) for rows in (kept, ~kept))
    offsets = np.concatenate([[0], np.cumsum(trained)])
    return Dataset("fedprox_synthetic", train, test, classes, cast, offsets=offsets, model="softmax")


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
