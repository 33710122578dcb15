"""How the findings of `benchmarks.scaling` are shown: a table along an axis, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import Column, Row, mark, markdown, number

LIMIT = 2e-3
"""Seconds that a round may take which has next to nothing to compute."""


def columns(what: str, first: float) -> tuple[Column, ...]:
    """The table along an axis, whose first row takes `first` seconds a round."""
    bound = () if what != "overhead" else (
        Column(f"at most {1e3 * LIMIT:g} ms", lambda row: mark(row["s_per_round"] <= LIMIT)),
    )  # fmt: skip
    return (
        Column(what, lambda row: row["value"] if isinstance(row["value"], str) else f"{row['value']:,}"),
        Column("D", lambda row: f"{row['parameters']:,}"),
        Column("ms a round", lambda row: number(1e3 * row["s_per_round"])),
        Column("ratio", lambda row: f"{row['s_per_round'] / first:.3g}"),
        Column("clients/s", lambda row: number(row["clients_per_s"])),
        Column("data MB", lambda row: f"{row['data_mb']:,.0f}"),
        Column("beside it MB", lambda row: f"{row['beside_mb']:,.0f}"),
        *bound,
    )


def section(found: dict[str, Any]) -> str:
    """The report's section on one axis."""
    what, rows = found["what"], found["rows"]
    same = ", ".join(f"{name} {value}" for name, value in found["same"].items())
    lines = [
        f"## Scaling: {what}",
        "",
        f"FedAvg on synthetic data, a process a row; medians over rounds and over {found['repeats']} repeats. D is "
        f"the number of parameters, MB are of the data and beside it. In all rows: {same}.",
        "",
        *markdown(columns(what, rows[0]["s_per_round"]), rows),
    ]
    if found["plot"]:
        lines += ["", f"![scaling with the {what}](results/{found['plot']})"]
    return "\n".join(lines)


def plot(what: str, rows: Sequence[Row], path: Path) -> None:
    """A round's time along the axis beside proportional growth, and its memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    at = [row["value"] for row in rows]
    for axes, key, unit, label in ((times, "s_per_round", 1e3, "ms a round"), (memory, "beside_mb", 1, "MB")):
        axes.plot(at, [unit * row[key] for row in rows], marker="o", markersize=4, color="#0072B2", label="measured")
        for row in rows:
            runs = [unit * run[key] for run in row["runs"]]
            axes.plot([row["value"]] * len(runs), runs, linestyle="", marker="_", color="#0072B2", alpha=0.5)
        axes.set_xscale("log")
        axes.set_xlabel(what)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    first, power = 1e3 * rows[0]["s_per_round"], -1 if what == "ranks" else 1
    ideal = [first * (value / at[0]) ** power for value in at]
    times.plot(at, ideal, color="#9aa5ad", linestyle=":", label="perfect" if what == "ranks" else "proportional")
    times.set_yscale("log")
    times.legend(frameon=False)
    memory.set_ylim(bottom=0)
    memory.set_title("peak memory beside the data", fontsize=10)
    figure.savefig(path, dpi=160)
