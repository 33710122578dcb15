"""Text as numbers, and Shakespeare by speaker. T characters a window, N speakers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from vfl.data.container import Dataset, Examples, Packed, tokens
from vfl.data.files import again, damaged, find, packed, unpacked
from vfl.data.partition import Assignment
from vfl.errors import UsageError

LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""The 80 characters of LEAF's Shakespeare, in the order of their codes; a character's number is its place here."""

_CODES = np.array([ord(letter) for letter in LETTERS], np.uint32)
_SPEECH = re.compile(r"\n\n+")
_FILES = ("input.txt", "tinyshakespeare_input.txt")
_NAME = "tiny_shakespeare"


def encode(text: str) -> np.ndarray:
    """The numbers of a text's characters, uint8 [len(text)]. Raises ValueError for one that is not in `LETTERS`."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    numbers = np.searchsorted(_CODES, codes).clip(max=len(_CODES) - 1)
    strange = np.flatnonzero(_CODES[numbers] != codes)
    if len(strange):
        raise ValueError(f"the character {text[strange[0]]!r} is none of the {len(LETTERS)} that LEAF's data have")
    return numbers.astype(np.uint8)


def tiny_shakespeare(length: int = 80, *, root: Path) -> Dataset:
    """Karpathy's tiny Shakespeare (1.1 million characters), a client a speaker: windows, and each character's next one.

    x uint8 and y int64 [M, T], T = `length`, index the 80 characters of `LETTERS` (the one other that occurs, $, is
    left out). A speaker's words are cut into windows one after the other, the last fifth of them the test set, as in
    McMahan et al. (1602.05629, §3); who has fewer than T + 1 characters is left out.
    """
    if length < 1:
        raise UsageError(f"{_NAME}: length must be at least 1, not {length}")
    folders = [_NAME, "shakespeare", "."]
    path = packed(root, folders, _FILES[1]) or find(root, folders, _FILES[0], _NAME)
    try:
        text = unpacked(path, again(_NAME)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is not UTF-8 ({error})", again(_NAME)) from None
    words = [encode(re.sub(f"[^{re.escape(LETTERS)}]", "", said)) for said in speakers(text).values()]
    windows = [said[: (len(said) - 1) // length * length + 1] for said in words if len(said) > length]
    if not windows:
        raise damaged(path, f"no speaker has {length + 1} characters", again(_NAME))
    x, y = (np.concatenate([w[first : len(w) - 1 + first] for w in windows]).reshape(-1, length) for first in (0, 1))
    offsets = np.cumsum([0, *(len(w) // length for w in windows)])
    everyone = Packed(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)), offsets)
    before, after = (everyone.take(*part) for part in earlier_and_later(offsets))
    train, test = Examples(before.x, before.y), Examples(after.x, after.y)
    return Dataset(_NAME, train, test, len(LETTERS), tokens, offsets=before.offsets)


def speakers(play: str) -> dict[str, str]:
    """What each speaker says, in order of appearance, from paragraphs that each begin with a line `NAME:`."""
    said: dict[str, list[str]] = {}
    for speech in _SPEECH.split(play.strip()):
        name, _, words = speech.partition("\n")
        said.setdefault(name.removesuffix(":"), []).append(words)
    return {name: "\n".join(filter(None, speeches)) for name, speeches in said.items()}


def earlier_and_later(offsets: np.ndarray, gap: int = 0) -> tuple[Assignment, Assignment]:
    """The first four fifths of each client's rows (rounded up) and the rest, without `gap` rows between them."""
    sizes = np.diff(offsets)
    place, cut = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes), np.repeat(-(-4 * sizes // 5), sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)

    def rows(chosen: np.ndarray) -> Assignment:
        counts = np.bincount(owner[chosen], minlength=len(sizes))
        return Assignment(np.flatnonzero(chosen), np.concatenate([[0], np.cumsum(counts)]))

    return rows(place < cut), rows(place >= cut + gap)
