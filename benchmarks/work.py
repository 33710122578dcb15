"""The work that the systems of `benchmarks.throughput` do: FedAvg, in which all clients train in every round.

It imports numpy alone, since the peers have environments of their own. Letters: C clients, n examples a client.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

Arrays = list[np.ndarray]
T = TypeVar("T")

CLASSES = 10
SIDE = 28  # pixels
CHARACTERS, POSITIONS = 80, 80  # of a text, and of the part of it that is one example
Shapes = tuple[tuple[int, ...], ...]


def _resnet18() -> Shapes:
    """Convolutions without bias, each with a norm's weight and bias; where the shape changes, a shortcut's, too."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    before = 64
    for c in (64, 64, 128, 128, 256, 256, 512, 512):
        shapes += [(c, before, 3, 3), (c,), (c,), (c, c, 3, 3), (c,), (c,)]
        if c != before:
            shapes += [(c, before, 1, 1), (c,), (c,)]
        before = c
    return (*shapes, (10, 512), (10,))


def _lstm() -> Shapes:
    """An embedding, two layers (weights of inputs and of states, their biases), and the scores of each character."""
    layers = [((1024, inputs), (1024, 256), (1024,), (1024,)) for inputs in (8, 256)]
    return ((CHARACTERS, 8), *layers[0], *layers[1], (CHARACTERS, 256), (CHARACTERS,))


# Parameters in torch's order and layout: linear [out, in], convolution [out, in, height, width].
SHAPES: dict[str, Shapes] = {
    "softmax": ((10, 784), (10,)),
    "mlp": ((200, 784), (200,), (200, 200), (200,), (10, 200), (10,)),
    "cnn": ((32, 1, 5, 5), (32,), (64, 32, 5, 5), (64,), (512, 3136), (512,), (10, 512), (10,)),
    "lstm": _lstm(),
    "resnet18": _resnet18(),
}
"""The models. Three of weights and biases, with ReLU between layers and 2×2 max pooling after a convolution (5×5, same
size): the softmax regression, the 2NN and the CNN of McMahan et al. (1602.05629, §3). Two as vfl has them: their LSTM,
which scores the next character at every position, and ResNet-18 with group norm for images of 32×32."""
SMALL = ("softmax", "mlp", "cnn")
"""The models that every system has."""
ROUNDS = {"softmax": 200, "mlp": 30, "cnn": 5, "lstm": 5, "resnet18": 3}
"""Rounds played where `Work.rounds` is 0: enough for a median."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much of it. Each client holds as many examples as any other and weighs as many in the mean."""

    clients: int = 100
    """Clients C, all of them in every round."""
    rounds: int = 0
    """Rounds; 0: 200 for softmax, 30 for mlp, 5 for cnn and lstm, 3 for resnet18."""
    examples: int = 60
    """Examples n a client; a multiple of the batch."""
    batch: int = 20
    """Examples a local step."""
    epochs: int = 1
    """Passes over its examples that a client makes in a round."""
    lr: float = 0.1
    """Local step size."""
    seed: int = 0
    """Seed of the examples and of the initial model."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    tf32: bool = False
    """Whether a GPU's matrix products use TF32 (vfl and the plain loop)."""


class Outcome(NamedTuple):
    """What a system did."""

    seconds: list[float]  # of each round
    model: Arrays  # after the last round, as in SHAPES
    execution: str | None = None  # vfl alone
    chunk: int | None = None  # vfl alone
    peak_memory: float | None = None  # bytes, where only the system itself can tell: on a GPU, that GPU's


def examples(work: Work, model: str = "cnn") -> tuple[np.ndarray, np.ndarray]:
    """Random inputs and random labels of a model, int64 [C, n]; images float32 [C, n, 28, 28], standard normal.

    For resnet18 images [C, n, 3, 32, 32]; for lstm characters int64 [C, n, 80], and a label for each.
    """
    draw = np.random.default_rng(work.seed)
    size = (work.clients, work.examples)
    if model == "lstm":
        x, y = draw.integers(CHARACTERS, size=(2, *size, POSITIONS))
        return x, y
    pixels = (3, 32, 32) if model == "resnet18" else (SIDE, SIDE)
    return draw.standard_normal((*size, *pixels), np.float32), draw.integers(CLASSES, size=size)


def parameters(model: str, work: Work) -> Arrays:
    """The initial model, float32: uniform within ±1/√(inputs of a unit), as torch draws layers; norms at 1 and 0."""
    draw, shapes = np.random.default_rng([work.seed, 1]), SHAPES[model]
    made: Arrays = []
    bound = 0.0
    for i, shape in enumerate(shapes):
        if model == "resnet18" and len(shape) == 1 and i < len(shapes) - 1:
            made.append(np.full(shape, len(shapes[i - 1]) == 4, np.float32))  # after a convolution's weight, a norm's
            continue
        bound = bound if len(shape) == 1 else 1 / sqrt(prod(shape[1:]))  # a bias takes its layer's
        made.append(draw.uniform(-bound, bound, shape).astype(np.float32))
    return made


def distance(a: Arrays, b: Arrays) -> float:
    """The Euclidean distance between two models."""
    return sqrt(sum(float(np.square(p.astype(np.float64) - q).sum()) for p, q in zip(a, b, strict=True)))


def timed(rounds: Iterable[T]) -> tuple[list[float], T]:
    """Plays the rounds: the seconds that each took, and what the last one gave."""
    moments, given = [time.perf_counter()], []
    for result in rounds:
        moments.append(time.perf_counter())
        given = [result]
    return gaps(moments), given[0]


def gaps(moments: Iterable[float]) -> list[float]:
    """The seconds between one moment and the next."""
    return [after - before for before, after in pairwise(moments)]


def peak_memory() -> float | None:
    """The most bytes ever resident, summed over this process and its living descendants; None where /proc is missing.

    Pages that processes share count for each of them.
    """
    status = {int(path.name): _status(path / "status") for path in Path("/proc").glob("[0-9]*")}
    family = {os.getpid()}
    while born := {pid for pid, fields in status.items() if int(fields.get("PPid", 0)) in family} - family:
        family |= born
    peaks = [int(status[pid]["VmHWM"].split()[0]) * 1024 for pid in family if "VmHWM" in status.get(pid, {})]
    return float(sum(peaks)) if peaks else None


def _status(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # the process has ended meanwhile
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
