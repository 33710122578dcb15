"""Federated data as a few packed tensors. M examples, N clients, ... the shape of one example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Sized as HasLength
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from vfl.errors import UsageError

Transform = Callable[[Tensor, torch.dtype], Tensor]
"""Turns a batch of stored inputs [B, ...] into model inputs of a compute dtype; pure, applied at each gather."""


class Examples(NamedTuple):
    """Inputs and targets."""

    x: Tensor  # [M, ...] as stored (bytes stay bytes)
    y: Tensor  # [M, ...] int64 class labels, or float targets

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on a device."""
        return Examples(self.x.to(device), self.y.to(device))


class Packed(NamedTuple):
    """All clients' examples, one client after the other (CSR): client i owns rows offsets[i] to offsets[i + 1]."""

    x: Tensor  # [M, ...]
    y: Tensor  # [M, ...]
    offsets: np.ndarray  # [N + 1] int64, on the host

    @property
    def population(self) -> int:
        """N, the number of clients."""
        return len(self.offsets) - 1

    def sizes(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Examples of each of these clients (None: of all), int64 [len(ids)]."""
        return np.diff(self.offsets) if ids is None else self.offsets[ids + 1] - self.offsets[ids]

    def client(self, i: int) -> Examples:
        """Client i's examples, a view."""
        rows = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return Examples(self.x[rows], self.y[rows])

    def take(self, rows: np.ndarray, offsets: np.ndarray) -> Packed:
        """The given rows, dealt anew: client j of the result owns rows[offsets[j] : offsets[j + 1]] (copies)."""
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self.x.device)
        return Packed(self.x[index], self.y[index], offsets)

    def to(self, device: torch.device | str) -> Packed:
        """The same clients with x and y on a device; the offsets stay on the host."""
        return Packed(self.x.to(device), self.y.to(device), self.offsets)


class Normalize(NamedTuple):
    """x ↦ (x / scale − mean) / std, elementwise; mean and std are one number, or one a channel (dim 1 of the batch)."""

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B, channels, ...] of any dtype → the same shape in `dtype`."""
        channels = max(len(self.mean), len(self.std))
        means, stds = (values * channels if len(values) == 1 else values for values in (self.mean, self.std))
        gains = [1 / (self.scale * s) for s in stds]
        shifts = [-m / s for m, s in zip(means, stds, strict=True)]
        if channels == 1:
            return x.to(dtype) * gains[0] + shifts[0]
        gain, shift = (_channelwise(values, x, dtype) for values in (gains, shifts))
        return x.to(dtype) * gain + shift


def _channelwise(values: Sequence[float], x: Tensor, dtype: torch.dtype) -> Tensor:
    """One value a channel, [channels, 1, ...]. Filled on x's device: a copy from the host would stall its queue."""
    filled = [torch.full((1,), value, dtype=dtype, device=x.device) for value in values]
    return torch.cat(filled).view(-1, *[1] * (x.dim() - 2))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The transform of inputs stored as the model wants them but for the dtype: x in the compute dtype."""
    return x.to(dtype)


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The transform of token ids: x as it is, whatever the compute dtype."""
    return x


def tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The transform of token ids stored in bytes: x in int64, which embeddings take, whatever the compute dtype."""
    return x.long()


class Dataset(NamedTuple):
    """A data set before it is dealt to clients."""

    name: str
    train: Examples
    test: Examples | None
    classes: int  # 0: regression
    transform: Transform
    users: np.ndarray | None = None  # [M] int64: whose each training example is; None: no natural split
    offsets: np.ndarray | None = None  # [N + 1] int64: the natural split where the rows already lie user by user
    model: str = "mlp"  # what `vfl run` trains on it by default


class FederatedData(NamedTuple):
    """A data set dealt to N clients."""

    name: str
    clients: Packed  # training examples
    test: Examples | None  # the global test set
    validation: Examples | None  # the global validation set
    held_out: Packed | None  # each client's own test examples, same N
    classes: int
    transform: Transform
    model: str = "mlp"  # what `vfl run` trains on it by default

    def to(self, device: torch.device | str) -> FederatedData:
        """The same data with every tensor on a device."""
        return self._replace(
            clients=self.clients.to(device),
            test=self.test and self.test.to(device),
            validation=self.validation and self.validation.to(device),
            held_out=self.held_out and self.held_out.to(device),
        )


def from_arrays(x: ArrayLike | Tensor, y: ArrayLike | Tensor, users: ArrayLike | Tensor) -> tuple[Packed, list[Any]]:
    """One client a user, from arrays x [M, ...], y [M, ...] and users [M] (any comparable ids: numbers or strings).

    Clients stand in the sorted order of their user ids, whatever the order of the rows; a client's rows keep their
    order. Integer y becomes int64 class labels, float y stays. Returns the clients and the N user ids, ids[i] being
    client i's. Raises UsageError for unequal lengths, no rows, negative labels, or values that are no numbers.
    """
    examples = Examples(_numbers(x, "x"), _targets(y, "y"))
    ids = np.asarray(users)
    if ids.ndim != 1 or any(column.shape[:1] != ids.shape for column in examples):
        shapes = f"x {list(examples.x.shape)}, y {list(examples.y.shape)}, users {list(ids.shape)}"
        raise UsageError(f"x, y and users must have one row an example, users one number or name a row; got {shapes}")
    if not len(ids):
        raise UsageError("x, y and users are empty; at least one example is needed")
    try:
        names, owner = np.unique(ids, return_inverse=True)
    except TypeError as error:
        raise UsageError(f"users must be ids of one kind, all numbers or all names ({error})") from None
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner))])
    return Packed(*examples, offsets).take(np.argsort(owner, kind="stable"), offsets), names.tolist()


def from_list(clients: Sequence[tuple[ArrayLike | Tensor, ArrayLike | Tensor]]) -> Packed:
    """One client for each (x_i [n_i, ...], y_i [n_i, ...]); n_i may be 0.

    Raises UsageError for an empty list, x_i and y_i of different lengths, clients whose examples differ in shape or
    dtype, and negative labels; it names the client.
    """
    if not clients:
        raise UsageError("the list of clients is empty; at least one (x, y) is needed")
    pairs = [Examples(_numbers(x, f"client {i}: x"), _targets(y, f"client {i}: y")) for i, (x, y) in enumerate(clients)]
    for i, (x, y) in enumerate(pairs):
        if not x.dim() or not y.dim() or len(x) != len(y):
            raise UsageError(f"client {i}: x {list(x.shape)} and y {list(y.shape)} must have one row an example")
    # An empty client written as [] has neither shape nor dtype, so those with examples decide both.
    filled = [(i, pair) for i, pair in enumerate(pairs) if len(pair.x)] or [(0, pairs[0])]
    first, model = filled[0]
    for i, pair in filled:
        for name, mine, theirs in zip(Examples._fields, pair, model, strict=True):
            if (mine.shape[1:], mine.dtype) != (theirs.shape[1:], theirs.dtype):
                raise UsageError(
                    f"client {i}: one example's {name} is {mine.dtype} {list(mine.shape[1:])}, "
                    f"but client {first}'s is {theirs.dtype} {list(theirs.shape[1:])}; all must agree"
                )
    offsets = np.cumsum([0, *(len(pair.x) for pair in pairs)], dtype=np.int64)
    return Packed(torch.cat([pair.x for _, pair in filled]), torch.cat([pair.y for _, pair in filled]), offsets)


def from_dataset(dataset: TorchDataset[Any], users: ArrayLike | Tensor) -> tuple[Packed, list[Any]]:
    """One client a user, from a map-style torch data set of (x, y) pairs and users [M]; as `from_arrays`.

    Every item is read once and kept as it comes, so leave normalization to the transform. Raises UsageError for a
    data set without a length, items that are no pairs, and items that differ in shape or dtype.
    """
    if not isinstance(dataset, HasLength) or not len(dataset):
        raise UsageError(f"{type(dataset).__name__} must be a map-style data set with at least one example")
    M = len(dataset)
    items: TorchDataset[Any] = dataset
    columns: list[Tensor] = []
    for i in range(M):
        item = items[i]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UsageError(f"item {i} of {type(dataset).__name__} must be a pair (x, y), not {type(item).__name__}")
        pair = [_numbers(value, f"item {i}: {name}") for name, value in zip("xy", item, strict=True)]
        columns = columns or [value.new_empty((M, *value.shape)) for value in pair]
        for name, column, value in zip("xy", columns, pair, strict=True):
            if (value.shape, value.dtype) != (column.shape[1:], column.dtype):
                raise UsageError(
                    f"item {i}: {name} is {value.dtype} {list(value.shape)}, but item 0's is {column.dtype} "
                    f"{list(column.shape[1:])}; all must agree"
                )
            column[i] = value
    x, y = columns
    return from_arrays(x, y, users)


def _numbers(values: ArrayLike | Tensor, what: str) -> Tensor:
    """Values as a tensor that shares their memory where it can."""
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        native = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        return torch.from_numpy(native)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} must be an array of numbers ({error})") from None


def _targets(values: ArrayLike | Tensor, what: str) -> Tensor:
    """Class labels as int64, or float targets as they are."""
    y = _numbers(values, what)
    if y.is_floating_point():
        return y
    if y.is_complex():
        raise UsageError(f"{what} must be class labels or real targets, not {y.dtype}")
    y = y.long()
    if y.numel() and int(y.min()) < 0:
        raise UsageError(f"{what} holds the label {int(y.min())}; class labels start at 0")
    return y
