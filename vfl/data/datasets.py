"""From the name of a data set to data dealt to clients."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vfl.data.container import Dataset, Examples, FederatedData, Packed
from vfl.data.formats import FORMATS, Splits
from vfl.data.leaf import femnist, shakespeare
from vfl.data.libsvm import libsvm
from vfl.data.partition import check_population, hold_out
from vfl.data.partition import partition as deal
from vfl.data.quadratic import quadratic
from vfl.data.readers import cifar10, digits, fashion_mnist, mnist
from vfl.data.synthetic import fedprox_synthetic, synthetic
from vfl.data.text import tiny_shakespeare
from vfl.errors import UsageError
from vfl.spec import parse, resolve


def _as_dataset(reader: Callable[..., Splits]) -> Callable[..., Dataset]:
    @functools.wraps(reader)
    def read(*args: Any, **kwargs: Any) -> Dataset:
        return reader(*args, **kwargs).dataset()

    return read


DATASETS: dict[str, Callable[..., Dataset]] = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "digits": digits,
    "femnist": femnist,
    "shakespeare": shakespeare,
    "tiny_shakespeare": tiny_shakespeare,
    "synthetic": synthetic,
    "fedprox_synthetic": fedprox_synthetic,
    "quadratic": quadratic,
    "libsvm": libsvm,
    **{name: _as_dataset(reader) for name, reader in FORMATS.items()},
}
"""The data sets by name; a reader may ask for the keyword-only `root`, `clients` and `seed`."""

CLIENTS = 100
"""N where nobody says otherwise."""


def data_root(root: str | Path | None = None) -> Path:
    """Where the data sets lie: `root` if given, else $VFL_DATA, else vfl/data in the user's cache folder."""
    if root is not None:
        return Path(root).expanduser()
    if folder := os.environ.get("VFL_DATA"):
        return Path(folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vfl" / "data"


def load(spec: str, root: str | Path | None = None, *, clients: int | None = None, seed: int = 0) -> Dataset:
    """A data set of `DATASETS` by its spec: `digits`, `mnist`, `synthetic:features=32,classes=10,examples=20`.

    `root` is as in `data_root`; `clients` and `seed` matter only to sets that are drawn from them, such as `synthetic`.
    Raises UsageError for an unknown name or parameter and for missing or damaged files.
    """
    return resolve(spec, DATASETS, "data set", root=data_root(root), clients=clients, seed=seed)


def federate(
    dataset: Dataset,
    *,
    partition: str | None = None,
    clients: int | None = None,
    seed: int = 0,
    validation: float = 0.0,
    held_out: float = 0.0,
) -> FederatedData:
    """Deals a data set to clients.

    `partition` is a spec of `PARTITIONS`; None is `natural` where the data says whose its examples are, else `iid`.
    `clients` is N; None is what the data says for `natural`, else 100. `validation` is the fraction of the training
    examples set aside as the global validation set: from all of them before they are dealt, or evenly from each user
    of a natural split, so that no user is lost. `held_out` is the fraction of each client's remaining examples set
    aside as its own test examples; both leave every client at least one. Everything is drawn from `seed`. Raises
    UsageError.
    """
    x, y = dataset.train
    has_users = dataset.users is not None or dataset.offsets is not None
    spec = partition or ("natural" if has_users else "iid")
    if parse(spec).name == "natural":
        packed, taken = hold_out(_natural(dataset, spec, clients, seed), validation, seed, "validation")
    else:
        everyone = Packed(x, y, np.array([0, len(x)]))
        rest, taken = hold_out(everyone, validation, seed, "validation")
        packed = rest.take(*deal(rest.y, spec, CLIENTS if clients is None else clients, seed))
    packed, own = hold_out(packed, held_out, seed, "held_out")
    aside = None if taken is None else Examples(taken.x, taken.y)
    return FederatedData(
        dataset.name, packed, dataset.test, aside, own, dataset.classes, dataset.transform, dataset.model
    )


def federated(
    data: str = "digits",
    *,
    partition: str | None = None,
    clients: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    validation: float = 0.0,
    held_out: float = 0.0,
) -> FederatedData:
    """`load` and `federate` in one: `federated("digits", partition="dirichlet:0.3", clients=100)`.

    `synthetic` and its like are made for `clients` clients, and their natural split is the one they were made with.
    """
    dataset = load(data, root, clients=clients, seed=seed)
    return federate(dataset, partition=partition, clients=clients, seed=seed, validation=validation, held_out=held_out)


def _natural(dataset: Dataset, spec: str, clients: int | None, seed: int) -> Packed:
    """One client a user. Rows that lie user by user are used where they are, without a copy."""
    x, y = dataset.train
    if dataset.offsets is None:
        return Packed(x, y, np.array([0, len(x)])).take(*deal(y, spec, clients, seed, dataset.users))
    if spec != "natural":
        raise UsageError(f"partition {spec!r}: `natural` takes no parameters")
    offsets = dataset.offsets
    if offsets[0] != 0 or offsets[-1] != len(x) or (np.diff(offsets) < 0).any():
        raise UsageError(f"the offsets of {dataset.name} must rise from 0 to its {len(x)} training examples")
    check_population(clients, len(offsets) - 1)
    return Packed(x, y, offsets)
