"""Learning curves as a picture."""

from __future__ import annotations

import math
import re
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vfl.engine import RoundMetrics
from vfl.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

XAxis = Literal["round", "bits_up", "bits_down", "gradients", "seconds"]
"""What learning may be measured against."""

_X_LABELS: dict[XAxis, str] = {
    "round": "round",
    "bits_up": "uplink, all clients",
    "bits_down": "downlink, all clients",
    "gradients": "sample-gradients",
    "seconds": "time without evaluation (s)",
}
_UNITS: dict[XAxis, str] = {"bits_up": "bit", "bits_down": "bit", "gradients": ""}  # those with SI prefixes
_STYLES = {"train": (0, (4, 1.5)), "test": "-", "validation": (0, (1, 1.2))}
# Okabe & Ito's colours, told apart by the colour-blind; yellow is too pale for lines.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LOG_ABOVE = 100  # losses that span more than this factor are drawn on a logarithmic axis
_FEW = 15  # points a line, up to which they are marked


class Score(NamedTuple):
    """What a metric such as `test_accuracy` says about a model."""

    split: str  # train, test or validation
    quantity: str  # loss, accuracy, …

    @property
    def low(self) -> bool:
        """Whether lower is better: losses; all else counts as the higher the better."""
        return self.quantity == "loss"


def score(name: str) -> Score | None:
    """The score that a metric's name means; None for all other metrics."""
    match = re.fullmatch(r"(train|test|validation)_(\w+)", name)
    return Score(*match.groups()) if match else None


def series(history: list[RoundMetrics], name: str, x_axis: XAxis = "round") -> tuple[list[float], list[float]]:
    """(x, y) of a metric: the rounds in which both are known and finite."""
    if x_axis == "seconds":
        at = list(accumulate(row["seconds"] if _known(row.get("seconds")) else 0.0 for row in history))
    else:
        at = [row.get(x_axis) for row in history]
    points = [(x, row[name]) for x, row in zip(at, history, strict=True) if _known(x) and _known(row.get(name))]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def learning_curves(histories: dict[str, list[RoundMetrics]], path: str | Path, x_axis: XAxis = "round") -> Path:
    """Draws losses and accuracies of one run or several (label → its rounds) into `path`; returns the path.

    One panel a quantity: loss, accuracy where there is one, and whatever else is measured on a split. `x_axis` is the
    round, or what was spent until then: uplink or downlink bits, sample-gradients, seconds without evaluation. Rounds
    where either is missing are left out; several runs with test sets are drawn without their validation sets. The
    file's ending (.png, .pdf, .svg) says the format. Raises UsageError where matplotlib is missing, there is nothing to
    draw, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UsageError("plots need matplotlib; run `pip install vfl[plots]`") from None
    if x_axis not in _X_LABELS:
        raise UsageError(f"x-axis must be one of {', '.join(_X_LABELS)}, not {x_axis!r}")
    path = Path(path)
    known = {name: s for rows in histories.values() for row in rows for name in row if (s := score(name))}
    drawn = {name: s for name, s in known.items() if any(series(rows, name, x_axis)[0] for rows in histories.values())}
    if not drawn:
        raise UsageError(f"there is nothing to draw: no round has both a loss or an accuracy and {x_axis}")
    alone = len(histories) == 1
    if not alone and any(s.split == "test" for s in drawn.values()):
        drawn = {name: s for name, s in drawn.items() if s.split != "validation"}
    quantities = sorted({s.quantity for s in drawn.values()}, key=lambda q: (q != "loss", q != "accuracy", q))
    splits = [split for split in _STYLES if any(s.split == split for s in drawn.values())]
    colors = dict(zip(histories, _colors(len(histories)), strict=True))

    figure = Figure(figsize=(4.4 * len(quantities) + 0.2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(quantities), sharex=True, squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        for label, rows in histories.items():
            for split in splits:
                x, y = series(rows, f"{split}_{quantity}", x_axis)
                if not x:
                    continue
                color = _COLORS[splits.index(split)] if alone else colors[label]
                # The training loss is the noisiest line and the least telling one: behind the others, and paler.
                alpha, width, order = (0.65 if alone else 0.4, 1.2, 2) if split == "train" else (1.0, 1.6, 3)
                style: dict[str, Any] = {"color": color, "alpha": alpha, "linewidth": width, "zorder": order}
                marker = "o" if len(x) <= _FEW else None
                axes.plot(x, y, linestyle=_STYLES[split], marker=marker, markersize=3, **style)
        _dress(axes, quantity, x_axis)

    runs = {} if alone else colors
    keys = [Line2D([], [], color=color, linewidth=2.4, label=_plain(label)) for label, color in runs.items()]
    for i, split in enumerate(splits):
        keys.append(Line2D([], [], color=_COLORS[i] if alone else "#5c6770", linestyle=_STYLES[split], label=split))
    if alone:
        figure.suptitle(_plain(next(iter(histories))), x=0.01, ha="left", fontsize=11)
    widest = max(len(str(key.get_label())) for key in keys)
    columns = max(1, min(len(keys), int(11 * figure.get_figwidth() / (widest + 6))))
    figure.set_figheight(3.4 + 0.2 * -(-len(keys) // columns))
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be drawn: {error}") from None
    return path


def _dress(axes: Axes, quantity: str, x_axis: XAxis) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    heights = np.concatenate([np.asarray(line.get_ydata()) for line in axes.get_lines()])
    if quantity == "loss" and 0 < heights.min() * _LOG_ABOVE < heights.max():
        axes.set_yscale("log")
    axes.set_xlabel(_X_LABELS[x_axis])
    axes.set_ylabel(quantity.replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=x_axis == "round"))
    if x_axis in _UNITS:
        axes.xaxis.set_major_formatter(EngFormatter(_UNITS[x_axis]))
    axes.grid(color="#d9dee2", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.margins(x=0.02)


def _colors(count: int) -> list[Any]:
    """As many colours, as different as can be."""
    from matplotlib import colormaps

    if count <= len(_COLORS):
        return list(_COLORS[:count])
    return [colormaps["turbo"]((i + 0.5) / count) for i in range(count)]


def _plain(label: str) -> str:
    """A label that matplotlib neither takes for a formula nor leaves out of the legend."""
    return ("\u200b" if label.startswith("_") else "") + label.replace("$", r"\$")


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
