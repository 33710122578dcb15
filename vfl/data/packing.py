"""Files of many people's examples, packed without a second copy: a pass counts the rows, another one fills them in.

The form is that of LEAF and FLUTE, to which readers of other forms bring theirs: `users`, `num_samples`, `user_data`
with each user's x (and y), and `user_data_label` with each user's y where they are not there. M examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vfl.data.container import Packed
from vfl.data.files import damaged
from vfl.data.json_stream import Entry
from vfl.errors import UsageError

log = logging.getLogger("vfl")

Read = Callable[[Path], Iterator[Entry]]
"""The parts of a file, in any order. A user's x and y are lists, arrays, or what becomes an array by [()]."""


class Encode(NamedTuple):
    """How a user's values become arrays of as many rows; each raises ValueError for what they cannot be."""

    x: Callable[[Any], np.ndarray]
    y: Callable[[Any], np.ndarray]


def numbers(x: Any) -> np.ndarray:
    """Numbers, those with fractions in float32; JSON does not tell 1 from 1.0, so all of its numbers are."""
    if isinstance(x, list):
        if isinstance(x[0], str):
            raise ValueError("its inputs are text, not numbers, so they need inputs=characters")
        try:
            found = np.asarray(x, np.float32)
        except ValueError:
            raise ValueError("its inputs differ in shape, or are not all numbers") from None
        if np.isnan(found).any() and _has_null(x):  # numpy takes null for NaN
            raise ValueError("its inputs hold null, which is no number")
        return found
    array = _native(x)
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def _has_null(values: Any) -> bool:
    return values is None or (isinstance(values, list) and any(map(_has_null, values)))


def targets(y: Any) -> np.ndarray:
    """Class labels as int64, other targets as they are."""
    array = _native(y)
    return array if array.dtype.kind == "f" else array.astype(np.int64, copy=False)


def _native(values: Any) -> np.ndarray:
    """Numbers as an array of this machine's byte order."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"numbers are wanted, not {np.ravel(array)[0]!r}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


NUMBERS = Encode(numbers, targets)


class Form(NamedTuple):
    """A form of files."""

    name: str  # whose form it is
    read: Read
    remedy: str  # what to do about a damaged file


class _Wrong(NamedTuple):
    """A user whose num_samples is not what is there."""

    user: str
    path: Path
    promised: int
    there: int


def pack(files: Iterable[str | Path], form: Form, encode: Encode) -> tuple[Packed, list[str]]:
    """One client a user, and the users' names, in the order of the files' lists; who stands in several has all of it.

    What num_samples says is compared with what is there, and a difference logged as a warning. Raises UsageError for
    files that cannot be read or are not of the form, and what `encode` refuses, with file and user.
    """
    paths, wrong, promised = [Path(file) for file in files], [], 0
    sizes: dict[str, int] = {}
    starts: list[dict[str, int]] = []  # of each file: where in a user's block its rows begin
    for path in paths:
        counts, differing, sum_promised = _count(path, form)
        starts.append({user: sizes.get(user, 0) for user in counts})
        for user, rows in counts.items():
            sizes[user] = sizes.get(user, 0) + rows
        wrong, promised = wrong + differing, promised + sum_promised
    offsets = np.cumsum([0, *sizes.values()], dtype=np.int64)
    if not offsets[-1]:
        where = f"an example in {paths[0]}" + f" or the {len(paths) - 1} files beside it" * (len(paths) > 1)
        raise UsageError(f"{form.name}: there is not {where if paths else 'a file'}; name the files of one split")
    if wrong:
        first, users = wrong[0], len({w.user for w in wrong})
        log.warning(f"num_samples is wrong for {users} of {len(sizes)} users: it promises {promised:,} examples, but "
                    f"the files hold {offsets[-1]:,}, and those count (the first: {first.user} in {first.path}, "
                    f"{first.promised:,} promised, {first.there:,} there)")  # fmt: skip
    blocks = dict(zip(sizes, offsets.tolist(), strict=False))
    x, y = _fill(paths, starts, blocks, int(offsets[-1]), form, encode)
    if y.dtype.kind == "i" and y.min() < 0:
        raise UsageError(f"the targets of {paths[0]} hold the label {y.min()}; class labels start at 0")
    return Packed(torch.from_numpy(x), torch.from_numpy(y), offsets), list(sizes)


def _count(path: Path, form: Form) -> tuple[dict[str, int], list[_Wrong], int]:
    """Rows of each user of a file, the users whose num_samples is wrong, and how many rows these promise in all."""
    users: Any = None
    counts: Any = None
    rows: dict[str, dict[str, int]] = {"x": {}, "y": {}}
    for entry in form.read(path):
        if entry.section == "users":
            users = entry.value
        elif entry.section == "num_samples":
            counts = entry.value
        for user, column, values in _columns(entry, path, form):
            if user in rows[column]:
                raise damaged(path, f"user {user} stands there twice", form.remedy)
            rows[column][user] = len(values)
    if users is None:
        raise damaged(path, f"it is not of {form.name}'s form: it has no users", form.remedy)
    try:
        names = [str(user) for user in users]
        wanted = [rows["x"].get(user, 0) for user in names] if counts is None else [int(n) for n in counts]
        compared = list(zip(names, wanted, strict=True))
    except (TypeError, ValueError) as error:
        what = f"its users and num_samples are no two lists of one length ({type(error).__name__}: {error})"
        raise damaged(path, f"it is not of {form.name}'s form: {what}", form.remedy) from None
    listed = set(names)
    if len(listed) < len(names):
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise damaged(path, f"user {twice} stands twice among its users", form.remedy)
    for user in (*names, *rows["x"], *rows["y"]):
        if user not in listed:
            raise damaged(path, f"user {user} has data, but does not stand among its users", form.remedy)
        if user not in rows["x"]:
            raise damaged(path, f"user {user} has no inputs in user_data", form.remedy)
        if user not in rows["y"]:
            raise damaged(path, f"user {user} has no targets, neither in user_data nor in user_data_label", form.remedy)
        if rows["x"][user] != rows["y"][user]:
            what = f"user {user} has {rows['x'][user]} inputs, but {rows['y'][user]} targets"
            raise damaged(path, what, form.remedy)
    there = {user: rows["x"][user] for user in names}
    return there, [_Wrong(u, path, n, there[u]) for u, n in compared if n != there[u]], sum(n for _, n in compared)


def _fill(
    paths: Sequence[Path], starts: Sequence[dict[str, int]], blocks: dict[str, int], M: int, form: Form, encode: Encode
) -> tuple[np.ndarray, np.ndarray]:
    """x [M, ...] and y [M, ...]: the second pass."""
    filled: dict[str, tuple[np.ndarray, str]] = {}  # of each column: all of its rows, and whose shape they have
    for path, start in zip(paths, starts, strict=True):
        for entry in form.read(path):
            for user, column, values in _columns(entry, path, form):
                if not len(values):
                    continue
                try:
                    rows = getattr(encode, column)(values if isinstance(values, list) else values[()])
                except (ValueError, TypeError, OSError) as error:
                    raise damaged(path, f"user {user}: {error}", form.remedy) from None
                if column not in filled:
                    filled[column] = np.empty((M, *rows.shape[1:]), rows.dtype), user
                everyone, first = filled[column]
                if rows.shape[1:] != everyone.shape[1:]:
                    what = (
                        f"user {user}: one example's {column} has the shape {list(rows.shape[1:])}, "
                        f"but user {first}'s has {list(everyone.shape[1:])}; all must agree"
                    )
                    raise damaged(path, what, form.remedy)
                if rows.dtype != everyone.dtype:
                    everyone = everyone.astype(_common(everyone.dtype, rows.dtype), copy=False)
                    filled[column] = everyone, first
                if len(rows) != len(values):
                    raise damaged(path, f"user {user}: {len(values)} values are {len(rows)} rows", form.remedy)
                at = blocks[user] + start[user]
                everyone[at : at + len(rows)] = rows
    return filled["x"][0], filled["y"][0]


def _common(a: np.dtype, b: np.dtype) -> np.dtype:
    """The type for two users' values: a float type where either is one, since some writers drop the fraction .0."""
    return (
        b if a.kind in "biu" and b.kind == "f" else a if a.kind == "f" and b.kind in "biu" else np.promote_types(a, b)
    )


def _columns(entry: Entry, path: Path, form: Form) -> Iterator[tuple[str, str, Any]]:
    """(user, x or y, values) of a part of a file."""
    section, user, value = entry
    if section not in ("user_data", "user_data_label"):
        return
    if user is None:
        raise damaged(path, f"it is not of {form.name}'s form: its {section} is no object", form.remedy)
    if section == "user_data_label":
        columns = {"y": value}
    elif isinstance(value, Mapping):
        columns = {column: value[column] for column in ("x", "y") if column in value}
    else:
        raise damaged(path, f"user {user} has no object with an x in user_data", form.remedy)
    for column, values in columns.items():
        try:
            if not isinstance(values, Sized) or isinstance(values, str | bytes | Mapping):
                raise TypeError(f"a {type(values).__name__} is none")
            len(values)
        except TypeError as error:  # an HDF5 data set has a length unless it is a scalar
            raise damaged(path, f"user {user}: {column} is no list ({error})", form.remedy) from None
        yield user, column, values
