"""Federated data as a few packed tensors. M examples, N clients, ... the shape of one example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Transform = Callable[[Tensor, torch.dtype], Tensor]
"""Turns a batch of stored inputs [B, ...] into model inputs of a compute dtype; pure, applied at each gather."""


class Examples(NamedTuple):
    """Inputs and targets."""

    x: Tensor  # [M, ...] as stored (bytes stay bytes)
    y: Tensor  # [M, ...] int64 class labels, or float targets


class Packed(NamedTuple):
    """All clients' examples, one client after the other (CSR): client i owns rows offsets[i] to offsets[i + 1]."""

    x: Tensor  # [M, ...]
    y: Tensor  # [M, ...]
    offsets: np.ndarray  # [N + 1] int64, on the host

    @property
    def population(self) -> int:
        """N, the number of clients."""
        return len(self.offsets) - 1

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """Examples of each of these clients, int64 [len(ids)]."""
        return self.offsets[ids + 1] - self.offsets[ids]


class Normalize(NamedTuple):
    """x ↦ (x / scale − mean) / std, elementwise; mean and std are one number, or one a channel (dim 1 of the batch)."""

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...


class Dataset(NamedTuple):
    """A data set before it is dealt to clients."""

    name: str
    train: Examples
    test: Examples | None
    classes: int  # 0: regression
    transform: Transform
    users: np.ndarray | None = None  # [M] int64: whose each training example is; None: no natural split


class FederatedData(NamedTuple):
    """A data set dealt to N clients."""

    name: str
    clients: Packed  # training examples
    test: Examples | None  # the global test set
    validation: Examples | None  # the global validation set
    held_out: Packed | None  # each client's own test examples, same N
    classes: int
    transform: Transform
