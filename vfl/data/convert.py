"""Any data set whose clients are people, written in the form that another system reads. N users, M examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vfl.data import hdf5
from vfl.data.container import Examples, Packed
from vfl.data.datasets import data_root, federate, load
from vfl.data.formats import FORMATS, Clients, Splits
from vfl.errors import UsageError, unknown
from vfl.spec import parse, resolve


class Written(NamedTuple):
    """A split in its file."""

    split: str  # train or test
    path: Path
    clients: Clients


def convert(source: str, folder: str | Path, form: str, root: str | Path | None = None) -> list[Written]:
    """Writes a data set, named as for `--data`, into a folder, in a form of `WRITERS`.

    Files keep the users' names of `leaf:`, `flute:`, `tff:` and `npz:`; of others the users are numbered, and the test
    set is one user's. What is in the files can be read back as `leaf:FOLDER`, `flute:FOLDER` or `npz:FOLDER`; JSON has
    numbers but no types, and images become float32 again. Raises UsageError for data without users, a form that is
    unknown, and files that are there already.
    """
    if form not in WRITERS:
        raise unknown("format", form, WRITERS)
    splits = _splits(source, data_root(root))
    return WRITERS[form](splits, Path(folder))


def _splits(source: str, root: Path) -> dict[str, Clients]:
    """The splits, by name, train first."""
    if parse(source).name in FORMATS:
        read: Splits = resolve(source, FORMATS, "data set", root=root)
        return {"train": read.train} | ({"test": read.test} if read.test else {})
    dataset = load(source, root)
    if dataset.users is None and dataset.offsets is None:
        raise UsageError(f"{source} has no users of its own, so there are no clients to write; deal it with `vfl run`")
    packed = federate(dataset, partition="natural").clients
    found = {"train": Clients(packed, [str(i) for i in range(packed.population)])}
    if isinstance(dataset.test, Examples):
        x, y = dataset.test
        found["test"] = Clients(Packed(x, y, np.array([0, len(y)])), ["test"])
    return found


def _leaf(splits: dict[str, Clients], folder: Path) -> list[Written]:
    """Train and test in a folder each, as LEAF's scripts leave them."""
    return _each(splits, lambda split: folder / split / "data.json", lambda *given: _json(*given, apart=False))


def _flute_json(splits: dict[str, Clients], folder: Path) -> list[Written]:
    return _each(splits, lambda split: folder / f"{split}.json", lambda *given: _json(*given, apart=True))


def _flute_hdf5(splits: dict[str, Clients], folder: Path) -> list[Written]:
    return _each(splits, lambda split: folder / f"{split}.hdf5", _hdf5)


def _each(
    splits: dict[str, Clients], place: Callable[[str], Path], write: Callable[[Clients, Path], None]
) -> list[Written]:
    """A file of each split."""
    written = [Written(split, place(split), clients) for split, clients in splits.items()]
    with _new([one.path for one in written]) as temporary:
        for one, path in zip(written, temporary, strict=True):
            write(one.clients, path)
    return written


def _json(clients: Clients, path: Path, apart: bool) -> None:
    """A JSON file, user by user; with `apart`, labels are in user_data_label."""
    packed, names = clients

    def members(columns: Callable[[Examples], object]) -> Iterator[str]:
        for i, name in enumerate(names):
            yield f"{', ' if i else ''}{json.dumps(name)}: {json.dumps(columns(packed.client(i)))}"

    with path.open("w", encoding="utf-8") as file:
        sizes = json.dumps(packed.sizes().tolist())
        file.write(f'{{"users": {json.dumps(names)}, "num_samples": {sizes}, "user_data": {{')
        if apart:
            file.writelines(members(lambda own: {"x": own.x.tolist()}))
            file.write('}, "user_data_label": {')
            file.writelines(members(lambda own: own.y.tolist()))
        else:
            file.writelines(members(lambda own: {"x": own.x.tolist(), "y": own.y.tolist()}))
        file.write("}}")


def _hdf5(clients: Clients, path: Path) -> None:
    packed, names = clients
    if bad := [name for name in names if name in ("", ".") or "/" in name or "\0" in name]:
        raise UsageError(f"a group of HDF5 cannot have the name of the user {bad[0]!r}; take the format flute_json")
    with hdf5.opened(path, "w") as file:
        file["users"], file["num_samples"] = names, packed.sizes()
        for i, name in enumerate(names):
            own = packed.client(i)
            file[f"user_data/{name}/x"] = own.x.numpy()
            file[f"user_data_label/{name}"] = own.y.numpy()


def _npz(splits: dict[str, Clients], folder: Path) -> list[Written]:
    """One file, compressed, with all users' names once."""
    names = list(dict.fromkeys(name for clients in splits.values() for name in clients.names))
    number = {name: n for n, name in enumerate(names)}
    columns: dict[str, np.ndarray] = {"users": np.array(names)}
    for split, (packed, own) in splits.items():
        users = np.array([number[name] for name in own], np.int64)
        columns |= {f"x_{split}": packed.x.numpy(), f"y_{split}": packed.y.numpy()}
        columns[f"u_{split}"] = np.repeat(users, packed.sizes())
    path = folder / "data.npz"
    with _new([path]) as (temporary,), temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **columns)
    return [Written(split, path, clients) for split, clients in splits.items()]


@contextmanager
def _new(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Files beside new ones, which take their places together when all are whole: no split is there without another."""
    temporary = [path.with_name(f".{path.name}.tmp") for path in paths]
    for path in paths:
        if path.exists():
            raise UsageError(f"{path} is there already; remove it or name another folder")
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            for path, written in zip(paths, temporary, strict=True):
                written.replace(path)
        finally:
            for written in temporary:
                written.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {paths[0]}: {error.strerror or error}; name another folder") from None


WRITERS: dict[str, Callable[[dict[str, Clients], Path], list[Written]]] = {
    "leaf": _leaf,
    "flute_json": _flute_json,
    "flute_hdf5": _flute_hdf5,
    "npz": _npz,
}
"""The forms by name."""
