"""Files in the LIBSVM format: `label index:value …` a line, indices from 1 in rising order, all other values 0.

Format: README of LIBSVM (Chang, Lin, ACM TIST 2011), with SVMlight's `# comments`.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from vfl.data.container import Dataset, Examples, cast
from vfl.errors import UsageError

_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_MOST = 1 << 33  # entries of a dense matrix: 64 GB


def libsvm(file: str, features: int | None = None, regression: bool = False, *, root: Path) -> Dataset:
    """A LIBSVM file by its name, such as a9a or mushrooms.xz, in the folder libsvm of the data root, or by its path.

    It may be plain, .xz, .gz or .bz2; a file of the same name with .t is the test set. Labels become 0 … classes − 1 in
    rising order, or stay numbers with `regression`. x is dense, [M, features]: bytes where every value is one, else
    float64; `features` is the largest index unless given. The default model is linear, softmax from three classes on.
    Raises UsageError, naming file and line.
    """
    path = _find(root, file)
    if path is None:
        raise UsageError(f"{file} (plain, .xz, .gz or .bz2) is missing from {root / 'libsvm'} and {root}; copy it "
                         "there, or point --data-root or VFL_DATA at the folder that has it")  # fmt: skip
    name = path.name.removesuffix(path.suffix) if path.suffix in _OPENERS else path.name
    other = _find(path.parent, f"{name}.t")
    train, test = read(path, features, regression), other and read(other, features, regression)
    D = features or max(train.features, test.features if test else 0)
    classes = np.unique([] if regression else np.concatenate([train.labels, *([test.labels] if test else [])]))
    if len(classes) == 1:
        raise UsageError(f"{path}: every label is {classes[0]:g}, but classification needs at least two")
    x_y = _dense(train, D, classes, path), test and _dense(test, D, classes, path)
    return Dataset(name, *x_y, len(classes), cast, model="softmax" if len(classes) > 2 else "linear")


class Sparse(NamedTuple):
    """M rows of a matrix, those of row i at offsets[i] : offsets[i + 1] (CSR)."""

    labels: np.ndarray  # [M] float64
    offsets: np.ndarray  # [M + 1] int64
    columns: np.ndarray  # [entries] int64, from 0
    values: np.ndarray  # [entries] float64

    @property
    def features(self) -> int:
        """D, the columns up to the last one that occurs."""
        return int(self.columns.max(initial=-1)) + 1


def read(path: Path, features: int | None = None, regression: bool = False) -> Sparse:
    """A file's rows, read line by line. Raises UsageError for a broken line, with its number."""
    labels, offsets, columns, values = array("d"), array("q", [0]), array("q"), array("d")
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="ascii") as lines:
            for number, line in enumerate(lines, 1):
                fields = line.partition("#")[0].split()
                if not fields:
                    continue
                try:
                    labels.append(_label(fields[0], regression))
                    last = 0
                    for field in fields[1:]:
                        last, value = _entry(field, last, features)
                        columns.append(last - 1)
                        values.append(value)
                except ValueError as error:
                    raise UsageError(f"{path}, line {number}: {error}") from None
                offsets.append(len(columns))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError) as error:
        raise UsageError(f"{path} cannot be read ({error}); replace it by a whole LIBSVM file") from None
    if not labels:
        raise UsageError(f"{path} has no rows; a LIBSVM file has one `label index:value …` a line")
    return Sparse(np.array(labels), np.array(offsets), np.array(columns, np.int64), np.array(values))


def _label(text: str, regression: bool) -> float:
    """Raises ValueError with what is wrong."""
    value = _number(text, "the label")
    if not regression and value != int(value):
        raise ValueError(f"the label {text} is no class, a whole number; regression=true takes it as a target")
    return value


def _entry(field: str, last: int, features: int | None) -> tuple[int, float]:
    """`index:value`, whose index must be above the last one. Raises ValueError with what is wrong."""
    text, colon, value = field.partition(":")
    if not colon or not text.isdecimal():
        raise ValueError(f"{field!r} must be index:value with a whole number as the index")
    index = int(text)
    if index <= last:
        raise ValueError(f"the index {index} must be above {last}: indices start at 1 and rise")
    if index > (features or _MOST):
        raise ValueError(f"the index {index} is above {f'features={features}' if features else 'any that can be held'}")
    return index, _number(value, f"the value of {index}")


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {text!r}")
    return value


def _dense(rows: Sparse, D: int, classes: np.ndarray, path: Path) -> Examples:
    """x [M, D], and y as places among the classes, or as float64 targets where there are none."""
    M, values = len(rows.labels), rows.values
    if M * D > _MOST:
        raise UsageError(f"{path}: {M:,} rows × {D:,} features are too many to be held densely")
    kind = np.uint8 if ((values >= 0) & (values <= 255) & (values == np.floor(values))).all() else np.float64
    x = np.zeros((M, D), kind)
    x[np.repeat(np.arange(M), np.diff(rows.offsets)), rows.columns] = values
    y = np.searchsorted(classes, rows.labels) if len(classes) else rows.labels
    return Examples(torch.from_numpy(x), torch.from_numpy(y))


def _find(root: Path, file: str) -> Path | None:
    """The first that is there: in the root's folder libsvm, in the root, or where `file` itself says."""
    folders = (root / "libsvm", root, Path())
    paths = [folder / (file + ending) for folder in folders for ending in ("", *_OPENERS)]
    return next((path for path in paths if path.is_file()), None)
