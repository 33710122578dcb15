"""Data whose clients are people, in LEAF's form (Caldas et al., arXiv 1812.01097): FEMNIST, Shakespeare, your own.

A LEAF file is JSON, `{"users": [name, …], "num_samples": [n, …], "user_data": {name: {"x": […], "y": […]}}}`, plain,
.gz or .xz; a data set is any number of them. N users, M examples in all.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vfl.data.container import Dataset, Examples, Normalize, Packed, from_arrays, tokens
from vfl.data.files import JSON, damaged, split_files
from vfl.data.json_stream import entries
from vfl.data.packing import NUMBERS, Encode, Form, pack
from vfl.data.text import LETTERS, earlier_and_later, encode
from vfl.errors import UsageError

log = logging.getLogger("vfl")

MADE_BY_LEAF = ("femnist", "shakespeare")
"""The data sets that LEAF's scripts make, and that nobody serves."""

_REMEDY = "make it anew with LEAF's preprocess.sh"
_CONTEXT = 80  # characters before the one to predict
LEAF = Form("LEAF", lambda path: entries(path, "LEAF", _REMEDY), _REMEDY)


def from_leaf(files: Iterable[str | Path], encode: Encode = NUMBERS) -> tuple[Packed, list[str]]:
    """One client a user, from LEAF's JSON files; a user of several files has the examples of them all.

    Clients stand in the order of the files. Returns them and the N user names. A file is read twice, one user at a
    time, so that nothing is held but the examples packed. What `num_samples` says is compared with the examples that
    are there, and a difference logged as a warning: some files count examples that LEAF dropped. Raises UsageError for
    files that cannot be read or are not of LEAF's form, and what `encode` refuses.
    """
    return pack(files, LEAF, encode)


def femnist(*, root: Path) -> Dataset:
    """FEMNIST (LEAF, Caldas et al., arXiv 1812.01097): handwritten digits and letters in 62 classes, a client a writer.

    x uint8 [M, 1, 28, 28]. Reads the JSON files of LEAF's data/femnist under ROOT/femnist, those of the train and of
    the test split told apart by their names or their folders'; or a compact femnist*.npz there with x_train
    [M, 28, 28], y_train [M], u_train [M] (the writer's number), all unsigned bytes or integers, and the same of test.
    """
    folder = root / "femnist"
    archives = sorted(folder.glob("femnist*.npz"))
    if archives:
        train, test = (_archive(archives[0], split) for split in ("train", "test"))
    else:
        train, test = (_split(folder, "femnist", split, _IMAGES) for split in ("train", "test"))
    if train is None:
        raise _missing(folder, "femnist")
    normalize = Normalize(255.0, (0.9612,), (0.1656,))
    held = None if test is None else Examples(test.x, test.y)
    return Dataset("femnist", Examples(train.x, train.y), held, 62, normalize, offsets=train.offsets)


def shakespeare(*, root: Path) -> Dataset:
    """Shakespeare (LEAF, Caldas et al., arXiv 1812.01097): 80 characters and the next one, a client a role.

    x uint8 [M, 80] and y index the 80 characters of `vfl.data.text.LETTERS`. Reads the JSON files of LEAF's
    data/shakespeare under ROOT/shakespeare. Where they are of one split alone, the last fifth of each role's examples
    is the test set, without those that overlap an earlier one.
    """
    folder = root / "shakespeare"
    train, test = (_split(folder, "shakespeare", split, _NEXT_CHARACTER) for split in ("train", "test"))
    alone = train if test is None else test if train is None else None
    if alone is not None:
        log.warning(f"{folder} has one of LEAF's two splits, so the last fifth of each role's examples is the test set")
        before, after = earlier_and_later(alone.offsets, gap=_CONTEXT - 1)
        train, test = alone.take(*before), alone.take(*after)
    if train is None or test is None:
        raise _missing(folder, "shakespeare")
    held = Examples(test.x, test.y)
    return Dataset("shakespeare", Examples(train.x, train.y), held, len(LETTERS), tokens, offsets=train.offsets)


def _pixels(x: list[Any]) -> np.ndarray:
    """784 grey values from 0 to 1 as bytes [n, 1, 28, 28]."""
    pixels = np.asarray(x, np.float64).reshape(-1, 1, 28, 28)
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"a pixel is from 0 to 1, not {pixels.min():g} to {pixels.max():g}")
    return np.rint(255 * pixels).astype(np.uint8)


def _characters_drawn(y: list[Any]) -> np.ndarray:
    """Labels 0 to 61."""
    labels = np.asarray(y, np.int64)
    if labels.size and not (labels.min() >= 0 and labels.max() < 62):
        raise ValueError(f"labels are 0 to 61, not {labels.min()} to {labels.max()}")
    return labels


def _strings(length: int) -> Callable[[list[Any]], np.ndarray]:
    """Strings of so many characters as numbers [n, length], or [n] for one."""

    def encoded(texts: list[Any]) -> np.ndarray:
        if {len(text) for text in texts} - {length}:
            raise ValueError("x must be strings of 80 characters and y of one")
        numbers = encode("".join(texts))
        return numbers.astype(np.int64) if length == 1 else numbers.reshape(-1, length)

    return encoded


_IMAGES = Encode(_pixels, _characters_drawn)
_NEXT_CHARACTER = Encode(_strings(_CONTEXT), _strings(1))


def _split(folder: Path, name: str, split: str, encode: Encode) -> Packed | None:
    """The users of a split; None where it has no file."""
    files = leaf_files(folder, split)
    return from_leaf(files, encode)[0] if files else None


def leaf_files(folder: Path, split: str) -> list[Path]:
    """The JSON files below a folder that are of a split, train or test: by their own names, else by their folders'."""
    return split_files(folder, split, JSON)


def _archive(path: Path, split: str) -> Packed:
    """A split of femnist*.npz, packed by writer."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            x, y, users = (stored[f"{part}_{split}"] for part in "xyu")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, f"it cannot be read ({error})", "get it anew") from None
    if x.dtype != np.uint8 or x.shape[1:] != (28, 28) or not len(x) == len(y) == len(users):
        raise damaged(
            path, f"x_{split}, y_{split}, u_{split} are not bytes [M, 28, 28], labels and writers", "get it anew"
        )
    if y.min() < 0 or y.max() > 61:
        raise damaged(path, f"labels are 0 to 61, not {y.min()} to {y.max()}", "get it anew")
    return from_arrays(x[:, None], y, users)[0]


def _missing(folder: Path, name: str) -> UsageError:
    return UsageError(f"{folder} has no JSON file of {name}'s train split; {how_to_make(name)}")


def how_to_make(name: str) -> str:
    """What to do for one of `MADE_BY_LEAF`."""
    return (
        f"make it with LEAF (github.com/TalwalkarLab/leaf, data/{name}/preprocess.sh) and put the folders train and "
        f"test of its data/{name}/data into {name} in the data root"
    )
