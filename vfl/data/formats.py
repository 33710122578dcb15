"""Data sets from files of anyone's: LEAF's JSON, FLUTE's JSON and HDF5, TensorFlow Federated's HDF5, and npz.

Each reader takes a file, or a folder whose files say by their names or their folders' which split they are of. Clients
are the users that the files name. M examples, N users.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vfl.data import hdf5
from vfl.data.container import Dataset, Examples, Normalize, Packed, Transform, cast, from_arrays, tokens
from vfl.data.files import JSON, damaged, split_files
from vfl.data.json_stream import entries
from vfl.data.leaf import LEAF
from vfl.data.packing import NUMBERS, Encode, Form, pack
from vfl.data.text import LETTERS, encode
from vfl.data.tff import tff_splits
from vfl.errors import UsageError


class Clients(NamedTuple):
    """People and what they have."""

    packed: Packed
    names: list[str]  # [N]


class Splits(NamedTuple):
    """The splits of a data set whose clients are people."""

    name: str
    train: Clients
    test: Clients | None
    classes: int  # 0: regression
    transform: Transform
    model: str = "mlp"

    def dataset(self) -> Dataset:
        """The same for `federate`; all test clients' examples are the test set."""
        x, y, offsets = self.train.packed
        test = None if self.test is None else Examples(self.test.packed.x, self.test.packed.y)
        return Dataset(self.name, Examples(x, y), test, self.classes, self.transform, offsets=offsets, model=self.model)


def leaf(
    path: str,
    test: str | None = None,
    inputs: str = "numbers",
    shape: str | None = None,
    scale: float = 1.0,
    classes: int | None = None,
    *,
    root: Path,
) -> Splits:
    """LEAF's JSON (Caldas et al., 1812.01097), plain, .gz or .xz: a file, or a folder of any number of shards.

    `test` names the test set where it lies elsewhere. `inputs`: numbers, token ids (whole numbers), or characters
    (strings of one length). `shape` makes an example's numbers an image, as 1x28x28; `scale` divides them. `classes` is
    found in the labels; 0 is regression. Paths not found from here are looked for in the data root.
    """
    return _read("leaf", path, test, root, {JSON: LEAF}, _Options(inputs, shape, scale, classes))


def flute(
    path: str,
    test: str | None = None,
    inputs: str = "numbers",
    shape: str | None = None,
    scale: float = 1.0,
    classes: int | None = None,
    *,
    root: Path,
) -> Splits:
    """FLUTE's JSON or HDF5 (Dimitriadis et al., 2203.13789), labels in user_data_label; parameters as leaf's.

    HDF5 needs the extra `hdf5`.
    """
    return _read("flute", path, test, root, {JSON: _FLUTE_JSON, hdf5.ENDING: _FLUTE_HDF5},
                 _Options(inputs, shape, scale, classes))  # fmt: skip


def npz(
    path: str,
    inputs: str = "numbers",
    shape: str | None = None,
    scale: float = 1.0,
    classes: int | None = None,
    *,
    root: Path,
) -> Splits:
    """An .npz with x_train [M, ...], y_train [M], u_train [M] and maybe the same of test; parameters as leaf's.

    u is whose an example is, a place in `users` [N] if the file has it; who has no example is no client. A folder holds
    the file as data.npz.
    """
    options = _Options(inputs, shape, scale, classes)
    encoding, file = _encode("npz", options), found(path, root)
    file = file / "data.npz" if file.is_dir() else file
    try:
        if file.exists() and not zipfile.is_zipfile(file):  # numpy would advise to load it all the same
            raise ValueError("it is not packed as one")
        with np.load(file, allow_pickle=False) as stored:
            train = _of_archive(stored, "train", encoding)
            test = _of_archive(stored, "test", encoding) if "x_test" in stored else None
    except (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(file, f"it is no archive of x_train, y_train and u_train ({error})", "make it anew") from None
    return _splits("npz", train, test, options, file)


def tff(
    path: str, test: str | None = None, label: str = "label", length: int = 80, words: int = 10_000, *, root: Path
) -> Splits:
    """TensorFlow Federated's HDF5: federated EMNIST, CIFAR-100, Shakespeare, Stack Overflow; a client a group.

    A file, or a folder with a file of each split; needs the extra `hdf5`. `label` may be coarse_label for CIFAR-100. A
    client's text is one sequence, each snippet or sentence between a start and an end, cut into windows of `length`
    with the next tokens as targets; a rest shorter than a window is left out. Stack Overflow's vocabulary is the
    `words` most frequent of the training sentences.
    """
    train, held = _files("tff", path, test, root, [hdf5.ENDING])
    parts, classes, transform, model = tff_splits(train, held, label, length, words)
    clients = [Clients(*part) for part in parts]
    return Splits("tff", clients[0], clients[1] if held else None, classes, transform, model)


FORMATS: dict[str, Callable[..., Splits]] = {"leaf": leaf, "flute": flute, "tff": tff, "npz": npz}
"""The readers by name."""

_FLUTE_JSON = Form("FLUTE", lambda path: entries(path, "FLUTE", "make it anew"), "make it anew")
_FLUTE_HDF5 = Form("FLUTE", hdf5.flute, "make it anew")


def found(path: str, root: Path) -> Path:
    """The file or folder from here, else below the data root. Raises UsageError when there is none."""
    for candidate in (Path(path).expanduser(), root / path):
        if candidate.exists():
            return candidate
    raise UsageError(f"there is no {path}, neither from here nor in {root}; name a file or a folder")


def _files(name: str, path: str, test: str | None, root: Path, endings: list[str]) -> tuple[list[Path], list[Path]]:
    """The files of the training and of the test set; all of one ending, since two would be the same data twice."""
    place = found(path, root)
    if not place.is_dir():
        return [place], _files(name, test, None, root, endings)[0] if test else []
    kinds = [e for e in endings if any(split_files(place, split, e) for split in ("train", "test", ""))]
    if len(kinds) != 1:
        wanted = " or ".join({JSON: ".json, .json.gz, .json.xz", hdf5.ENDING: ".hdf5, .h5"}[e] for e in endings)
        which = "files of several forms" if kinds else f"no file that ends in {wanted}"
        raise UsageError(f"{name}: {place} holds {which}; name one file")
    train, held, other = (split_files(place, split, kinds[0]) for split in ("train", "test", ""))
    if test:
        return train or other or held, _files(name, test, None, root, endings)[0]
    if not train and other and held:
        raise UsageError(
            f"{name}: {other[0]} says neither train nor test, but {held[0].name} beside it does; rename it"
        )
    if not train and not other:
        raise UsageError(f"{name}: {place} holds a test set alone; name its file to train on it")
    return train or other, held


class _Options(NamedTuple):
    """What to make of the values in the files."""

    inputs: str
    shape: str | None
    scale: float
    classes: int | None


def _read(name: str, path: str, test: str | None, root: Path, forms: dict[str, Form], options: _Options) -> Splits:
    encoding = _encode(name, options)
    train, held = _files(name, path, test, root, list(forms))

    def clients(files: list[Path]) -> Clients:
        form = next((form for ending, form in forms.items() if re.search(ending, files[0].name)), None)
        if form is None:
            raise UsageError(f"{name}: {files[0]} has not one of the endings of such files")
        return Clients(*pack(files, form, encoding))

    return _splits(name, clients(train), clients(held) if held else None, options, train[0])


def _splits(name: str, train: Clients, test: Clients | None, options: _Options, source: Path) -> Splits:
    """The splits with the options applied."""
    parts = [_shaped(part, options.shape, source) for part in ([train] if test is None else [train, test])]
    if test is not None and parts[0].packed.x.shape[1:] != parts[1].packed.x.shape[1:]:
        shapes = " and ".join(str(list(part.packed.x.shape[1:])) for part in parts)
        raise UsageError(f"{name}: an example of the training and the test set must have one shape, not {shapes}")
    regression = options.classes == 0 or not all(_whole(part.packed.y) for part in parts)
    parts = [part._replace(packed=part.packed._replace(y=_targets(part.packed.y, regression))) for part in parts]
    classes = _classes(name, parts, options, regression)
    transform: Transform = tokens
    if options.inputs == "numbers":
        transform = cast if options.scale == 1 else Normalize(options.scale)
    model = "mlp" if options.inputs == "numbers" else "char_lstm"
    return Splits(name, parts[0], parts[1] if test is not None else None, classes, transform, model)


def _shaped(part: Clients, shape: str | None, source: Path) -> Clients:
    x = part.packed.x
    if shape is None:
        return part
    try:
        sizes = [int(size) for size in shape.split("x")]
        return part._replace(packed=part.packed._replace(x=x.view(len(x), *sizes)))
    except (ValueError, RuntimeError):
        has = list(x.shape[1:])
        raise UsageError(f"{source}: shape={shape} is no shape, as 1x28x28, for its examples of {has}") from None


def _whole(y: torch.Tensor) -> bool:
    """Whether targets can be labels: from 0, without fractions. JSON made by numpy has 3.0 for the label 3."""
    return not y.is_floating_point() or bool(((y == y.round()) & (y >= 0)).all())


def _targets(y: torch.Tensor, regression: bool) -> torch.Tensor:
    if regression:
        return y if y.is_floating_point() else y.double()
    return y.long()


def _classes(name: str, parts: list[Clients], options: _Options, regression: bool) -> int:
    if regression:
        if options.classes:
            raise UsageError(f"{name}: targets with fractions or below 0 belong to no {options.classes} classes")
        return 0
    values = [part.packed.y for part in parts]
    if options.inputs != "numbers":  # one vocabulary of inputs and targets
        values += [part.packed.x for part in parts]
    needed = 1 + max(int(value.max()) for value in values)
    if options.inputs == "characters":
        needed = len(LETTERS)
    if options.classes is not None and options.classes < needed:
        raise UsageError(f"{name}: classes={options.classes}, but there are labels up to {needed - 1}")
    return options.classes or needed


def _encode(name: str, options: _Options) -> Encode:
    if options.inputs not in _ENCODE:
        raise UsageError(f"{name}: inputs must be {', '.join(_ENCODE)}, not {options.inputs!r}")
    if not options.scale or (options.scale != 1 and options.inputs != "numbers"):
        raise UsageError(f"{name}: scale divides numbers, so it is not 0 and belongs to inputs=numbers")
    return _ENCODE[options.inputs]


def _of_archive(stored: Any, split: str, encoding: Encode) -> Clients:
    x, y, users = (stored[f"{part}_{split}"] for part in "xyu")
    names = stored["users"].tolist() if "users" in stored else None
    if not len(x) == len(y) == len(users) or not len(x):
        raise ValueError(f"x_{split}, y_{split} and u_{split} have {len(x)}, {len(y)} and {len(users)} rows")
    if y.dtype.kind == "i" and y.min() < 0:
        raise ValueError(f"y_{split} holds the label {y.min()}; class labels start at 0")
    if names is not None and not (users.dtype.kind in "iu" and users.min() >= 0 and users.max() < len(names)):
        raise ValueError(f"u_{split} must be places in users, from 0 to {len(names) - 1}")
    if (np.diff(users.astype(np.int64)) >= 0).all():  # packed already: no second copy
        ids, counts = np.unique(users, return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        packed = Packed(torch.from_numpy(encoding.x(x)), torch.from_numpy(encoding.y(y)), offsets)
    else:
        packed, ids = from_arrays(encoding.x(x), encoding.y(y), users)
    return Clients(packed, [str(i) if names is None else str(names[int(i)]) for i in ids])


def _token_ids(x: Any) -> np.ndarray:
    array = np.asarray(x)
    if array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError("token ids are whole numbers from 0, all of one length")
    return array.astype(np.int32)


def _strings(x: Any) -> np.ndarray:
    """Strings of one length T as numbers [n, T]."""
    texts = [text.decode() if isinstance(text, bytes) else text for text in (x if isinstance(x, list) else x.tolist())]
    if not all(isinstance(text, str) for text in texts) or len({len(text) for text in texts}) != 1:
        raise ValueError("characters are strings of one length")
    return encode("".join(texts)).reshape(len(texts), -1)


def _next(y: Any) -> np.ndarray:
    """Strings of one length as labels [n, T], or [n] for single characters."""
    labels = _strings(y).astype(np.int64)
    return labels[:, 0] if labels.shape[1] == 1 else labels


_ENCODE: dict[str, Encode] = {
    "numbers": NUMBERS,
    "tokens": Encode(_token_ids, NUMBERS.y),
    "characters": Encode(_strings, _next),
}
