"""TensorFlow Federated's four layouts of HDF5 (`tff.simulation.datasets`), told apart by what a client's group holds.

emnist: pixels, label · cifar100: image, coarse_label, label · shakespeare: snippets · stackoverflow: tokens, title, …
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vfl.data import hdf5
from vfl.data.container import Normalize, Packed, Transform, cast, tokens
from vfl.data.files import damaged
from vfl.data.packing import NUMBERS, Encode, Form, pack
from vfl.errors import UsageError

LETTERS = "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
"""The 86 characters of the models trained on TFF's Shakespeare, in their order. Number 0 is left to padding, which this
reader does not make; 1 to 86 are these; then come the unknown, a start and an end: 90 in all."""

_REMEDY = "get it anew"
_OPENING = 3  # numbers after the vocabulary's: unknown, start, end


class Layout(NamedTuple):
    """How to read the clients' groups."""

    convert: Callable[[Any], dict[str, Any]]  # a group → its x and y
    encode: Encode
    classes: int
    transform: Transform
    model: str


def tff_splits(
    train: Sequence[Path], test: Sequence[Path], label: str, length: int, words: int
) -> tuple[list[tuple[Packed, list[str]]], int, Transform, str]:
    """The training clients and, where there are files, the test clients; classes, transform, default model.

    Raises UsageError for a parameter out of range, and files that are not of one of the layouts.
    """
    if length < 1 or not 1 <= words < 2**15 - _OPENING:
        raise UsageError(f"tff: length is at least 1 and words from 1 to 32,764, not {length} and {words}")
    layout = _layout(train, label, length, words)
    form = Form("TFF", lambda path: hdf5.tff(path, layout.convert), _REMEDY)
    parts = [pack(files, form, layout.encode) for files in (train, test) if files]
    return parts, layout.classes, layout.transform, layout.model


def _layout(files: Sequence[Path], label: str, length: int, words: int) -> Layout:
    with hdf5.opened(files[0]) as file:
        groups = hdf5.examples(file, files[0])
        first = groups[next(iter(groups))] if len(groups) else ()
        held = set(first) if isinstance(first, Mapping) else set()
    if "pixels" in held:
        classes = 62
        return Layout(_columns("pixels", label), Encode(_grey, NUMBERS.y), classes, cast, "cnn")
    if "image" in held:
        normalize = Normalize(255.0, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
        classes = 20 if label == "coarse_label" else 100
        return Layout(_columns("image", label), Encode(_colours, NUMBERS.y), classes, normalize, "resnet18")
    if "snippets" in held:
        return _text("snippets", _letters, len(LETTERS), length, np.uint8)
    if "tokens" in held:
        known = _frequent(files, words)
        return _text("tokens", lambda text: [known.get(w, len(known) + 1) for w in text.split()],
                     len(known), length, np.int16)  # fmt: skip
    shown = ", ".join(sorted(held)) or "nothing"
    what = f"its clients hold {shown}, but one of pixels, image, snippets and tokens is wanted"
    raise damaged(files[0], what, _REMEDY)


def _columns(x: str, y: str) -> Callable[[Any], dict[str, Any]]:
    return lambda group: {name: group[column] for name, column in (("x", x), ("y", y)) if column in group}


def _grey(pixels: np.ndarray) -> np.ndarray:
    """[n, 28, 28] → [n, 1, 28, 28], as the file has them: float32 from 0, ink, to 1."""
    return _images(NUMBERS.x(pixels), (28, 28))[:, None]


def _colours(image: np.ndarray) -> np.ndarray:
    """Bytes [n, 32, 32, 3] → [n, 3, 32, 32]."""
    return np.moveaxis(_images(NUMBERS.x(image), (32, 32, 3)), -1, 1)


def _images(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if x.shape[1:] != shape:
        raise ValueError(f"an image is {list(shape)}, not {list(x.shape[1:])}")
    return x


def _text(
    column: str, encode: Callable[[bytes], Sequence[int] | np.ndarray], vocabulary: int, length: int, dtype: Any
) -> Layout:
    """Windows of `length` tokens of a client's texts, and their next tokens."""
    start, end = vocabulary + 2, vocabulary + 3

    def windows(group: Any) -> dict[str, np.ndarray]:
        pieces = [[start, *encode(text), end] for text in group[column][()].tolist()]
        stream = np.array([token for piece in pieces for token in piece], dtype)
        n = max(len(stream) - 1, 0) // length
        return {"x": stream[: n * length].reshape(n, length), "y": stream[1 : n * length + 1].reshape(n, length)}

    return Layout(windows, NUMBERS, end + 1, tokens, "char_lstm")


_NUMBER = np.full(256, len(LETTERS) + 1)
_NUMBER[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(1, len(LETTERS) + 1)


def _letters(text: bytes) -> np.ndarray:
    """The numbers of a text's bytes."""
    return _NUMBER[np.frombuffer(text, np.uint8)]


def _frequent(files: Sequence[Path], words: int) -> dict[bytes, int]:
    """The most frequent words of the sentences and their numbers, from 1; words of one count in alphabetical order."""
    counts: Counter[bytes] = Counter()
    for path in files:
        with hdf5.opened(path) as file:
            for group in hdf5.examples(file, path).values():
                for sentence in group["tokens"][()].tolist():
                    counts.update(sentence.split())
    kept = heapq.nsmallest(words, counts.items(), key=lambda item: (-item[1], item[0]))
    return {word: n for n, (word, _) in enumerate(kept, 1)}
