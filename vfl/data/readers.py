"""Readers of the official files. Each takes the data root and returns a Dataset whose pixels are bytes.

A set's files may lie in their own folder of the root or in the root itself, packed or not. Whatever is missing or
damaged raises UsageError with the file's name and what to do.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from vfl.data.container import Dataset, Examples, Normalize
from vfl.data.files import again, damaged, find, packed, unpacked
from vfl.errors import UsageError

_IDX = {"images": 0x00000803, "labels": 0x00000801}  # magic numbers: unsigned bytes, 3 axes or 1
_OPENING = {"mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "fashion_mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}  # train labels
_CIFAR_RECORDS, _CIFAR_RECORD = 10_000, 1 + 3 * 32 * 32  # a file's records; bytes: the label, then R, G, B planes
_CIFAR_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
_CIFAR_TAR = "cifar-10-binary.tar.gz"


def mnist(*, root: Path) -> Dataset:
    """MNIST (LeCun, Cortes, Burges): 60,000 + 10,000 digits, x uint8 [M, 1, 28, 28], from the four IDX files."""
    return _idx_set("mnist", root, ["mnist", "MNIST/raw", "."], Normalize(255.0, (0.1307,), (0.3081,)))


def fashion_mnist(*, root: Path) -> Dataset:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747): 60,000 + 10,000 garments in 10 classes, as MNIST."""
    folders = ["fashion_mnist", "FashionMNIST/raw", "."]
    return _idx_set("fashion_mnist", root, folders, Normalize(255.0, (0.2860,), (0.3530,)))


def cifar10(*, root: Path) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 photographs, x uint8 [M, 3, 32, 32], from the binary version.

    Reads the six .bin files, plain, .gz or .xz, or the official cifar-10-binary.tar.gz as it is.
    """
    folders = ["cifar10", "cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", "."]
    records = np.empty((len(_CIFAR_FILES), _CIFAR_RECORDS, _CIFAR_RECORD), np.uint8)
    if packed(root, folders, _CIFAR_FILES[0]) is None and (tar := packed(root, folders, _CIFAR_TAR)):
        files = _members(tar)
    else:
        files = _files(root, folders)
    for name, path, content in files:
        if len(content) != records[0].size:
            raise _broken(path, f"{name} has {len(content):,} bytes instead of {records[0].size:,}", "cifar10")
        records[_CIFAR_FILES.index(name)] = np.frombuffer(content, np.uint8).reshape(records[0].shape)
        _check_labels(records[_CIFAR_FILES.index(name), :, 0], path, "cifar10")
    x, y = records[..., 1:].reshape(-1, 3, 32, 32), records[..., 0].reshape(-1)
    normalize = Normalize(255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    cut = _CIFAR_RECORDS * (len(_CIFAR_FILES) - 1)
    return Dataset("cifar10", _examples(x[:cut], y[:cut]), _examples(x[cut:], y[cut:]), 10, normalize)


def digits() -> Dataset:
    """The 1,797 handwritten digits that come with vfl: x uint8 [M, 1, 8, 8] of values 0 to 16, 1,437 + 360 examples.

    UCI Optical Recognition of Handwritten Digits (Alpaydin, Kaynak), CC BY 4.0; embedded/SOURCE.txt tells the rest.
    """
    with (
        resources.files("vfl.data").joinpath("embedded/digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        x, y, test = stored["x"][:, None], stored["y"], stored["test"]
    normalize = Normalize(16.0, (0.3054,), (0.3761,))
    return Dataset("digits", _examples(x[~test], y[~test]), _examples(x[test], y[test]), 10, normalize)


def _examples(x: np.ndarray, y: np.ndarray) -> Examples:
    return Examples(torch.from_numpy(np.require(x, requirements=["C", "W"])), torch.from_numpy(y.astype(np.int64)))


def _idx_set(name: str, root: Path, folders: list[str], normalize: Normalize) -> Dataset:
    """The four IDX files of MNIST or a set of the same names."""
    parts: dict[str, Examples] = {}
    for split in ("train", "t10k"):
        x_path, y_path = (find(root, folders, _idx_name(split, kind), name) for kind in _IDX)
        x, y = _idx(x_path, "images", name), _idx(y_path, "labels", name)
        if x.shape[1:] != (28, 28):
            raise _broken(x_path, f"its images are {x.shape[1]} × {x.shape[2]}, not 28 × 28", name)
        if len(x) != len(y):
            raise _broken(y_path, f"it has {len(y):,} labels for the {len(x):,} images of {x_path.name}", name)
        _check_labels(y, y_path, name)
        for other in set(_OPENING) - {name}:  # the file names cannot tell the two sets apart
            if split == "train" and y[:10].tolist() == _OPENING[other]:
                raise UsageError(
                    f"{y_path} belongs to {other}, not {name}; give each set its own folder, {root / name}"
                )
        parts[split] = _examples(x[:, None], y)
    return Dataset(name, parts["train"], parts["t10k"], 10, normalize)


def _idx_name(split: str, kind: str) -> str:
    return f"{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"


def _idx(path: Path, kind: str, name: str) -> np.ndarray:
    """An IDX file's bytes, [M, rows, columns] or [M]: magic number and axis lengths (big-endian int32), then the data.

    Format: https://yann.lecun.com/exdb/mnist/ (“The IDX file format”).
    """
    content = _content(path, name)
    magic, axes = _IDX[kind], _IDX[kind] & 0xFF
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 + 4 * axes or found != magic:
        raise _broken(path, f"its magic number is {found:#010x}, not the {magic:#010x} of IDX {kind}", name)
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", axes, offset=4))
    expected = 4 + 4 * axes + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise _broken(path, f"it has {len(content):,} bytes instead of the {expected:,} its header promises", name)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _files(root: Path, folders: list[str]) -> Iterator[tuple[str, Path, bytes]]:
    """(name, path, content) of each CIFAR-10 file; several are unpacked at once."""
    paths = [find(root, folders, name, "cifar10") for name in _CIFAR_FILES]
    with ThreadPoolExecutor() as threads:
        yield from zip(_CIFAR_FILES, paths, threads.map(_content, paths, ["cifar10"] * len(paths)), strict=True)


def _members(path: Path) -> Iterator[tuple[str, Path, bytes]]:
    """(name, archive path, content) of each CIFAR-10 file in the official archive, in the archive's order."""
    missing = set(_CIFAR_FILES)
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if name in missing else None
                if file is not None:
                    missing.remove(name)
                    yield name, path, file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise _broken(path, f"it cannot be unpacked ({error})", "cifar10") from None
    if missing:
        raise _broken(path, f"it lacks {', '.join(sorted(missing))}", "cifar10")


def _check_labels(y: np.ndarray, path: Path, name: str) -> None:
    if y.size and y.max() > 9:
        raise _broken(path, f"it holds the label {y.max()}, but labels are 0 to 9", name)


def _content(path: Path, name: str) -> bytes:
    return unpacked(path, again(name))


def _broken(path: Path, what: str, name: str) -> UsageError:
    return damaged(path, what, again(name))
