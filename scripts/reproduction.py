"""What the reproductions of compressed methods share: curves over seeds as a plot and as numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import vfl
from vfl.engine import RoundMetrics
from vfl.evaluation import OBJECTIVE

X_LABELS = {"round": "round", "bits_up": "bits from all clients"}
Y_LABELS = {**OBJECTIVE, "test_accuracy": "test accuracy", "test_loss": "test loss"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe & Ito's


class Curve(NamedTuple):
    """A setting's rounds: of each metric the mean over the seeds, and as `<name>_std` the standard deviation."""

    label: str
    rounds: list[RoundMetrics]
    color: int = 0  # of COLORS
    dashed: bool = False


class Panel(NamedTuple):
    """A row of the plot: one metric of several settings, once against rounds and once against bits."""

    title: str
    metric: str
    curves: Sequence[Curve]
    log: bool = True


def first(rounds: Sequence[RoundMetrics], metric: str, target: float) -> RoundMetrics | None:
    """The first round after which the metric, a mean over the seeds, is at most the target; None: none is."""
    return next((row for row in rounds if metric in row and row[metric] <= target), None)


def bits(number: float) -> str:
    """As 12.3 kbit or 4.56 Mbit."""
    for size, unit in ((1e9, "Gbit"), (1e6, "Mbit"), (1e3, "kbit")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bit"


def draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Draws the panels, mean ± one standard deviation over the seeds, into `path`.png and `path`.pdf.

    The band ends at the least seed's value where that is above mean − deviation.
    Raises UsageError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise vfl.UsageError("plots need matplotlib; run `pip install vfl[plots]`") from None
    figure = Figure(figsize=(9, 1 + 2.9 * len(panels)), layout="constrained")
    for row, panel in zip(figure.subplots(len(panels), 2, squeeze=False, sharey="row"), panels, strict=True):
        for axes, x_axis in zip(row, X_LABELS, strict=True):
            for curve in panel.curves:
                known = [r for r in curve.rounds if panel.metric in r]
                x, mean, std = (
                    np.array([r.get(name, 0.0) for r in known])
                    for name in (x_axis, panel.metric, f"{panel.metric}_std")
                )
                color = COLORS[curve.color % len(COLORS)]
                axes.plot(x, mean, "--" if curve.dashed else "-", color=color, linewidth=1.6, label=curve.label)
                # Where the deviation exceeds the mean, a logarithmic axis has no place for the rest of the band.
                least = [min(map(itemgetter(panel.metric), r.get("replicas", [r]))) for r in known]
                low = np.maximum(mean - std, least)
                axes.fill_between(x, low, mean + std, color=color, alpha=0.2, linewidth=0)
            if panel.log:
                axes.set_yscale("log", nonpositive="mask")
            if x_axis == "bits_up":
                axes.xaxis.set_major_formatter(EngFormatter("bit"))
            axes.set_xlabel(X_LABELS[x_axis])
            axes.set_title(panel.title, fontsize=10)
            axes.grid(color="#d9dee2", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(Y_LABELS[panel.metric])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=160)


def save(panels: Sequence[Panel], settings: Mapping[str, Any], path: Path) -> None:
    """Writes the settings and every curve's numbers, the seeds' own included, as JSON."""
    left_out = {"seconds", "memory", "chunk", "execution"}  # of the machine
    curves = {
        panel.title: {
            curve.label: [{name: value for name, value in row.items() if name not in left_out} for row in curve.rounds]
            for curve in panel.curves
        }
        for panel in panels
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": dict(settings), "curves": curves}, indent=1) + "\n", encoding="utf-8")
