"""Learning curves as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vfl.engine import RoundMetrics
from vfl.errors import UsageError
from vfl.evaluation import OBJECTIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

XAxis = Literal[
    "round", "bits_up", "bits_down", "bits_total", "client_bits_up", "client_bits_down", "gradients", "seconds",
    "simulated_seconds", "memory",
]  # fmt: skip
"""What learning may be measured against."""

_X_LABELS: dict[XAxis, str] = {
    "round": "round",
    "bits_up": "uplink, all clients",
    "bits_down": "downlink, all clients",
    "bits_total": "uplink and downlink, all clients",
    "client_bits_up": "uplink, a client",
    "client_bits_down": "downlink, a client",
    "gradients": "sample-gradients",
    "seconds": "time without evaluation (s)",
    "simulated_seconds": "simulated time (s)",
    "memory": "peak memory",
}
_UNITS: dict[XAxis, str] = {  # those with SI prefixes
    "bits_up": "bit",
    "bits_down": "bit",
    "bits_total": "bit",
    "client_bits_up": "bit",
    "client_bits_down": "bit",
    "gradients": "",
    "memory": "B",
}
_STYLES = {"train": (0, (4, 1.5)), "test": "-", "validation": (0, (1, 1.2)), "": "-"}
# Okabe & Ito's colours, told apart by the colour-blind; yellow is too pale for lines.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LOG_ABOVE = 100  # losses that span more than this factor are drawn on a logarithmic axis
_FEW = 15  # points a line, up to which they are marked


class Score(NamedTuple):
    """What a metric such as `test_accuracy` says about a model."""

    split: str  # train, test or validation; empty: the objective f, or no score
    quantity: str  # loss, accuracy, grad_norm, …

    @property
    def low(self) -> bool:
        """Whether lower is better: losses and what is said of f; all else counts as the higher the better."""
        return self.quantity == "loss" or self.quantity in OBJECTIVE


def score(name: str) -> Score | None:
    """The score that a metric's name means; None for all other metrics."""
    if name.endswith("_std"):  # over replicas
        return None
    match = re.fullmatch(r"(train|test|validation)_(\w+)", name)
    return Score(*match.groups()) if match else Score("", name) if name in OBJECTIVE else None


def series(history: list[RoundMetrics], name: str, x_axis: XAxis = "round") -> tuple[list[float], list[float]]:
    """(x, y) of a metric: the rounds in which both are known and finite."""
    at: list[Any]
    if x_axis in ("seconds", "simulated_seconds"):
        each = [row.get(x_axis) for row in history]
        at = list(accumulate(s if _known(s) else 0.0 for s in each)) if any(map(_known, each)) else [None] * len(each)
    elif x_axis == "bits_total":
        at = [_total(row.get("bits_up"), row.get("bits_down")) for row in history]
    else:
        at = [row.get(x_axis) for row in history]
    points = [(x, row[name]) for x, row in zip(at, history, strict=True) if _known(x) and _known(row.get(name))]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def learning_curves(
    histories: dict[str, list[RoundMetrics]],
    path: str | Path,
    x_axis: XAxis = "round",
    metrics: Sequence[str] = (),
    log: bool | None = None,
) -> Path:
    """Draws losses and accuracies of one run or several (label → its rounds) into `path`; returns the path.

    One panel a quantity: loss, accuracy where there is one, whatever else is measured on a split, and the metrics of
    the objective; or these `metrics` alone, any of a round's, in this order. `x_axis` is the round, or what was spent
    until then: uplink bits, downlink bits or both, sample-gradients, seconds without evaluation, simulated seconds.
    Rounds where either is missing are left out; several runs with test sets are drawn without their validation sets.
    `log` makes the y-axes logarithmic, or linear; None: where losses and metrics of the objective span two orders of
    magnitude. The file's ending (.png, .pdf, .svg) says the format. Raises UsageError where matplotlib is missing,
    there is nothing to draw, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UsageError("plots need matplotlib; run `pip install vfl[plots]`") from None
    if x_axis not in _X_LABELS:
        raise UsageError(f"x-axis must be one of {', '.join(_X_LABELS)}, not {x_axis!r}")
    path = Path(path)
    drawn = _drawn(histories, x_axis, metrics)
    alone = len(histories) == 1
    quantities = list(dict.fromkeys(s.quantity for s in drawn.values()))
    splits = [split for split in _STYLES if any(s.split == split for s in drawn.values())]
    colors = dict(zip(histories, _colors(len(histories)), strict=True))

    figure = Figure(figsize=(4.4 * len(quantities) + 0.2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(quantities), sharex=True, squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        for label, rows in histories.items():
            for name, (split, shown) in drawn.items():
                x, y = series(rows, name, x_axis)
                if not x or shown != quantity:
                    continue
                color = _COLORS[splits.index(split)] if alone else colors[label]
                # The training loss is the noisiest line and the least telling one: behind the others, and paler.
                alpha, width, order = (0.65 if alone else 0.4, 1.2, 2) if split == "train" else (1.0, 1.6, 3)
                style: dict[str, Any] = {"color": color, "alpha": alpha, "linewidth": width, "zorder": order}
                marker = "o" if len(x) <= _FEW else None
                axes.plot(x, y, linestyle=_STYLES[split], marker=marker, markersize=3, **style)
                at, deviations = series(rows, f"{name}_std", x_axis)
                if at == x:  # mean ± one standard deviation over replicas
                    low, high = ([v + sign * d for v, d in zip(y, deviations, strict=True)] for sign in (-1, 1))
                    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0, zorder=1)
        _dress(axes, quantity, x_axis, log)

    runs = {} if alone else colors
    keys = [Line2D([], [], color=color, linewidth=2.4, label=_plain(label)) for label, color in runs.items()]
    for i, split in enumerate(filter(None, splits)):
        keys.append(Line2D([], [], color=_COLORS[i] if alone else "#5c6770", linestyle=_STYLES[split], label=split))
    if alone:
        figure.suptitle(_plain(next(iter(histories))), x=0.01, ha="left", fontsize=11)
    if keys:
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


def _drawn(histories: dict[str, list[RoundMetrics]], x_axis: XAxis, metrics: Sequence[str]) -> dict[str, Score]:
    """The metrics to draw, panel by panel. Raises UsageError where there is none, or not all that were asked for."""
    names = dict.fromkeys(metrics or (name for rows in histories.values() for row in rows for name in row))
    known = {name: score(name) or Score("", name) for name in names if metrics or score(name)}
    found = {name: s for name, s in known.items() if any(series(rows, name, x_axis)[0] for rows in histories.values())}
    if not found or (metrics and len(found) < len(known)):
        wanted = next((name for name in metrics if name not in found), "a loss or an accuracy")
        raise UsageError(f"there is nothing to draw: no round has both {wanted} and {x_axis}")
    if metrics:
        return found
    if len(histories) > 1 and any(s.split == "test" for s in found.values()):
        found = {name: s for name, s in found.items() if s.split != "validation"}
    order = list(_STYLES)
    return dict(sorted(found.items(), key=lambda item: (
        item[1].quantity != "loss", item[1].quantity != "accuracy", item[1].quantity, order.index(item[1].split)
    )))  # fmt: skip


def _dress(axes: Axes, quantity: str, x_axis: XAxis, log: bool | None) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    heights = np.concatenate([np.asarray(line.get_ydata()) for line in axes.get_lines()])
    positive = heights[heights > 0] if quantity == "suboptimality" or log else heights  # rounding may put f below f*
    if log and not len(positive):
        raise UsageError(f"{quantity} has no value above 0, which a logarithmic axis needs")
    spans = len(positive) > 0 and 0 < positive.min() * _LOG_ABOVE < positive.max()
    if log or (log is None and spans and Score("", quantity).low):
        axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel(_X_LABELS[x_axis])
    axes.set_ylabel(OBJECTIVE.get(quantity, quantity.replace("_", " ")))
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


def _total(up: float | None, down: float | None) -> float | None:
    return None if up is None or down is None else up + down


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
