"""The work that every system of `benchmarks.throughput` does: FedAvg, in which all clients train in every round.

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
from typing import NamedTuple, TypeVar

import numpy as np

Arrays = list[np.ndarray]
T = TypeVar("T")

CLASSES = 10
SIDE = 28  # pixels
# Parameters in torch's order and layout: linear [out, in], convolution [out, in, height, width].
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "softmax": ((10, 784), (10,)),
    "mlp": ((200, 784), (200,), (200, 200), (200,), (10, 200), (10,)),
    "cnn": ((32, 1, 5, 5), (32,), (64, 32, 5, 5), (64,), (512, 3136), (512,), (10, 512), (10,)),
}
"""The models: each layer's weight and bias, with ReLU between layers and 2×2 max pooling after a convolution (5×5, same
size): the softmax regression, the 2NN and the CNN of McMahan et al. (1602.05629, §3)."""
ROUNDS = {"softmax": 50, "mlp": 30, "cnn": 5}
"""Rounds played where `Work.rounds` is 0: enough for a median."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much of it. Each client holds as many examples as any other and weighs as many in the mean."""

    clients: int = 100
    """Clients C, all of them in every round."""
    rounds: int = 0
    """Rounds; 0: 50 for softmax, 30 for mlp, 5 for cnn."""
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


class Outcome(NamedTuple):
    """What a system did."""

    seconds: list[float]  # of each round
    model: Arrays  # after the last round, as in SHAPES
    execution: str | None = None  # vfl alone
    chunk: int | None = None  # vfl alone
    peak_rss: float | None = None  # bytes, where only the system itself can tell


def examples(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Random images float32 [C, n, 28, 28], standard normal, and random labels int64 [C, n]."""
    draw = np.random.default_rng(work.seed)
    size = (work.clients, work.examples)
    return draw.standard_normal((*size, SIDE, SIDE), np.float32), draw.integers(CLASSES, size=size)


def parameters(model: str, work: Work) -> Arrays:
    """The initial model, float32: uniform within ±1/√(inputs of a unit), as torch draws its layers."""
    draw, made = np.random.default_rng([work.seed, 1]), []
    bound = 0.0
    for shape in SHAPES[model]:
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
