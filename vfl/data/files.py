"""The files of data sets: where they lie, packed or not, and what to say of those that are missing or damaged."""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from vfl.errors import UsageError


def packed(root: Path, folders: Sequence[str], file: str) -> Path | None:
    """The first of the folders' `file`, plain, .gz or .xz, that exists."""
    candidates = [root / folder / (file + ending) for folder in folders for ending in ("", ".gz", ".xz")]
    return next((path for path in candidates if path.is_file()), None)


def find(root: Path, folders: Sequence[str], file: str, name: str) -> Path:
    """`packed`'s path to a file of the data set `name`. Raises UsageError when it is in none of the folders."""
    path = packed(root, folders, file)
    if path is None:
        raise UsageError(
            f"{file} (plain, .gz or .xz) is missing from {root / name} and {root}; run `vfl data get {name}`, "
            "or point --data-root or VFL_DATA at the folder that has it"
        )
    return path


JSON = r"\.json(\.gz|\.xz)?$"
"""How the names of JSON files end, packed or not."""


def split_files(folder: Path, split: str, ending: str) -> list[Path]:
    """The files below a folder, with this ending (a pattern), that are of a split, train or test.

    The last of the two words in a file's own name says it, or else in its folder's; "" takes files that say neither.
    """

    def said(path: Path) -> str:
        return ["", *re.findall("train|test", f"{path.parent.name}/{path.name}")][-1]

    files = (path for path in folder.rglob("*") if re.search(ending, path.name))
    return sorted(path for path in files if said(path) == split)


def unpacked(path: Path, remedy: str) -> bytes:
    """A file's bytes, unpacked by its ending. Raises UsageError, with the remedy, when they cannot be read."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                return file.read()
        return path.read_bytes()
    except PermissionError:
        raise UsageError(f"{path} cannot be read: permission denied; make it readable or remove it") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise damaged(path, f"it cannot be read ({error})", remedy) from None


def damaged(path: Path, what: str, remedy: str) -> UsageError:
    """The error for a file whose bytes are not what they should be."""
    return UsageError(f"{path} is damaged: {what}; {remedy}")


def again(name: str) -> str:
    """The remedy for the files of a data set that can be downloaded."""
    return f"delete it and run `vfl data get {name}`"
