"""What the clients of a federated data set hold, in numbers and as a picture. N clients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vfl.data.container import FederatedData
from vfl.errors import UsageError

_SHOWN = 100  # clients of a picture, at most


class Summary(NamedTuple):
    """A federated data set's training examples at a glance. Labels and distances are None for regression."""

    clients: int  # N
    examples: int  # training examples of all clients
    minimum: int  # examples a client
    median: float
    maximum: int
    empty: int  # clients without examples
    labels: float | None  # distinct labels a client, the mean over clients with examples
    distance: float | None  # total variation of a client's label distribution from everyone's, the same mean


def label_table(data: FederatedData) -> np.ndarray:
    """How many training examples (of sequences: positions) of each label each client holds, int64 [N, classes].

    Raises UsageError.
    """
    if not data.classes:
        raise UsageError(f"{data.name} has no class labels to count: its targets are numbers")
    y = data.clients.y.cpu().numpy()
    N, C = data.clients.population, data.classes
    if y.size and not 0 <= y.min() <= y.max() < C:
        raise UsageError(f"{data.name} holds labels from {y.min()} to {y.max()}, but classes={C} allows 0 to {C - 1}")
    owner = np.repeat(np.arange(N), data.clients.sizes() * math.prod(y.shape[1:]))
    return np.bincount(owner * C + y.ravel(), minlength=N * C).reshape(N, C)


def summary(data: FederatedData) -> Summary:
    """Sizes, and how much the clients' labels differ: ½ Σ_c |p_i(c) − p(c)|, 0 for equal distributions, below 1."""
    sizes = data.clients.sizes()
    labels = distance = None
    if data.classes and sizes.any():
        table = label_table(data)[sizes > 0]
        share = table / table.sum(1, keepdims=True)
        everyone = table.sum(0) / table.sum()
        labels = float((table > 0).sum(1).mean())
        distance = float(np.abs(share - everyone).sum(1).mean() / 2)
    return Summary(
        clients=len(sizes),
        examples=int(sizes.sum()),
        minimum=int(sizes.min()),
        median=float(np.median(sizes)),
        maximum=int(sizes.max()),
        empty=int((sizes == 0).sum()),
        labels=labels,
        distance=distance,
    )


def plot_labels(data: FederatedData, path: str | Path) -> Path:
    """Draws each client's size above its labels (the area of a disc is a number of examples) into `path`.

    The file's ending (.png, .pdf, .svg) says the format. Of more than 100 clients it shows 100, evenly spaced by
    number, and says so. Raises UsageError where matplotlib is missing, the ending is unknown, or for regression.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UsageError("plots need matplotlib; run `pip install vfl[plots]`") from None
    path = Path(path)
    table = label_table(data)
    N, C = table.shape
    shown = np.arange(min(N, _SHOWN)) * N // min(N, _SHOWN)
    table = table[shown]
    at = np.arange(len(shown))

    width, lines = 1.6 + max(3.4, 0.105 * len(shown)), max(2.0, min(0.26 * C, 9.0))  # inches
    figure = Figure(figsize=(width, lines + 1.9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, lines])
    ink, line = "#2a6f97", "#d9dee2"

    above.bar(at, data.clients.sizes()[shown], width=0.7, color="#8fb8cf")
    above.set_ylabel("examples")
    above.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    about = f"{len(shown)} of {N:,} clients, evenly spaced" if len(shown) < N else f"{N:,} clients"
    above.set_title(f"{data.name} · {about} · {data.clients.offsets[-1]:,} examples", loc="left", fontsize=11)

    i, c = np.nonzero(table)
    cell = 72 * min((width - 1.0) / len(shown), lines / C)  # points; the largest disc just spills over its cell
    most = max(int(table.max()), 1)
    below.scatter(at[i], c, s=(1.25 * cell) ** 2 * table[i, c] / most, color=ink, alpha=0.85, linewidths=0)
    below.set(xlabel="client", ylabel="label", xlim=(-0.8, len(shown) - 0.2), ylim=(C - 0.3, -0.7))
    unit = "position" if data.clients.y.dim() > 1 else "example"
    below.set_title(f"largest disc: {most:,} {unit}{'s' * (most > 1)}", loc="right", fontsize=9, color="#5c6770")
    below.set_axisbelow(True)
    below.grid(axis="y", color=line, linewidth=0.6)
    ticks = at[:: -(-len(shown) // 10)]
    below.set_xticks(ticks, [f"{n:,}" for n in shown[ticks]])
    below.set_yticks(np.arange(0, C, max(1, -(-C // 25))))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
    figure.align_ylabels()

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=160)
    except ValueError as error:
        raise UsageError(f"{path} cannot be drawn: {error}") from None
    return path
