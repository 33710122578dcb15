"""`vfl show`: what a run's folder holds, and how several runs compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vfl import runs
from vfl.algorithms import load_algorithm
from vfl.checkpoint import every
from vfl.cli.options import option_fields
from vfl.display import TOTALS
from vfl.engine import RoundMetrics
from vfl.errors import UsageError
from vfl.evaluation import OBJECTIVE
from vfl.plots import XAxis, learning_curves, score, series
from vfl.terminal import duration, facts, number, section, si, sparkline, table, terminal

_COMPARISON = Path("comparison.png")
_ALWAYS = ("algorithm", "data", "model")  # options shown even at their defaults


@dataclasses.dataclass(frozen=True)
class Show:
    """Shows a run: its options, scores, totals and files. Several runs are compared."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs."""
    plot: bool = False
    """Draw the learning curves: into the run's curves.png, or comparison.png here for several runs."""
    x_axis: XAxis = "round"
    """What the curves are drawn against; any but round implies --plot."""
    metrics: str | None = None
    """What is drawn, one panel each, separated by commas: grad_norm,train_loss; implies --plot. Default: losses,
    accuracies and the metrics of the objective."""
    log: bool = False
    """Draw on logarithmic y-axes. Default: where losses span two orders of magnitude."""
    out: Path | None = None
    """File of the curves in place of those, .png, .pdf or .svg; implies --plot."""

    def run(self) -> None:
        """Prints the tables, and draws the curves if asked to."""
        if not self.runs:
            raise UsageError("vfl show needs the folder of at least one run, as in `vfl show runs/NAME`")
        console = terminal()
        found = [Run.read(folder) for folder in self.runs]
        alone = len(found) == 1
        if alone:
            _print_run(console, found[0])
        else:
            _print_comparison(console, found)
        if self.plot or self.out or self.metrics or self.log or self.x_axis != "round":
            labels = [str(found[0].config.get("algorithm"))] if alone else _labels(self.runs)
            histories = {label: run.history for label, run in zip(labels, found, strict=True)}
            path = self.out or (found[0].folder / runs.CURVES if alone else _COMPARISON)
            metrics = tuple(name.strip() for name in self.metrics.split(",")) if self.metrics else ()
            path = learning_curves(histories, path, self.x_axis, metrics, self.log or None)
            console.print(f"\nplot   {path}", soft_wrap=True)


class Best(NamedTuple):
    """The best value of a score."""

    value: float
    round: int


class Run(NamedTuple):
    """What a run's folder says."""

    folder: Path
    config: dict[str, Any]
    history: list[RoundMetrics]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises UsageError where no run lies there."""
        if not runs.is_run(folder):
            raise UsageError(f"{folder} is not the folder of a run: it has no {runs.CONFIG}")
        return cls(folder, runs.read_config(folder / runs.CONFIG), runs.read_metrics(folder))

    @property
    def progress(self) -> str:
        """Rounds done of how many."""
        return f"{self.history[-1]['round'] if self.history else 0}/{self.config.get('rounds', '?')}"

    def total(self, name: str) -> float:
        """A cumulative metric after the last round."""
        return self.history[-1][name] if self.history else 0.0

    @property
    def seconds(self) -> float:
        """Time of all rounds, without evaluation."""
        return sum(row["seconds"] for row in self.history)

    def last(self, name: str) -> float | None:
        """The latest known value of a score."""
        _, values = series(self.history, name)
        return values[-1] if values else None

    def best(self, name: str) -> Best | None:
        """The best value of a score and its first round."""
        at, values = series(self.history, name)
        meaning = score(name)
        if meaning is None or not values:
            return None
        value = min(values) if meaning.low else max(values)
        return Best(value, int(at[values.index(value)]))

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, where those are known."""
        known = _defaults(self.config)
        return {k: v for k, v in self.config.items() if k in _ALWAYS or k not in known or known[k] != v}


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a run's options; those of the algorithm as far as it is still installed."""
    try:
        own = load_algorithm(str(config.get("algorithm")))
    except UsageError:
        own = None
    return {name: field.default for name, field in option_fields(own).items()}


def _print_run(console: Console, run: Run) -> None:
    options = {name.replace("_", "-"): _plain(value) for name, value in run.changed().items()}
    totals = {
        "uplink": si(run.total("bits_up"), "bit"),
        "downlink": si(run.total("bits_down"), "bit"),
        "sample-gradients": si(run.total("gradients")),
        "clients trained": f"{sum(row['clients'] for row in run.history):,}",
        "clients dropped": f"{sum(row['dropped'] for row in run.history):,}",
        "time": f"{duration(run.seconds)}, without evaluation",
    }
    section(console, f"{run.folder}", facts(options))
    section(console, f"\nround {run.progress}", _scores(run, max(8, min(40, console.width - 50))))
    section(console, "\ntotals", facts(totals))
    section(console, "\nfiles", facts(_files(run.folder)))


def _scores(run: Run, width: int) -> Table:
    """One row for each loss, accuracy and other quantity that was measured, its curve at most `width` long."""
    names = dict.fromkeys(n for row in run.history for n, v in row.items() if isinstance(v, float) and n not in TOTALS)
    shown = table("", ">last", ">best", ">in round", "curve")
    for name in names:
        _, values = series(run.history, name)
        if values:
            best = None if name.startswith("train_") else run.best(name)
            cells = (number(best.value), f"{best.round}") if best else ("", "")
            shown.add_row(Text(name.replace("_", " "), "dim"), number(values[-1]), *cells, sparkline(values, width))
    return shown


def _files(folder: Path) -> dict[str, str]:
    """What is there, with its size."""
    names = [name for name in runs.FILES if name != runs.CHECKPOINTS]
    facts = {n: si((folder / n).stat().st_size, "B") for n in names if (folder / n).exists()}
    if saved := every(folder):
        newest = int(saved[-1].stem.removeprefix("round-"))
        size = si(sum(path.stat().st_size for path in saved), "B")
        facts[f"{runs.CHECKPOINTS}/"] = f"{size}, {len(saved)} of them, the newest of round {newest}"
    return facts


def _print_comparison(console: Console, found: list[Run]) -> None:
    """One row a run: scores and what was spent, then the options in which the runs differ."""
    judges = [n for n in ("test_accuracy", "test_loss", *OBJECTIVE) if any(run.last(n) is not None for run in found)]
    judge = judges[0] if judges else "test_loss"
    columns = (">rounds", f">{judge.replace('_', chr(10))}", ">best", ">train\nloss", ">uplink", ">gradients", ">time")
    scores = table("run", *columns)
    scores.padding = (0, 1, 0, 0)
    options = table("run", "options")
    keys = dict.fromkeys(key for run in found for key in run.config)
    differing = [key for key in keys if any(run.config.get(key) != found[0].config.get(key) for run in found)]
    for label, run in zip(_labels([run.folder for run in found]), found, strict=True):
        best = run.best(judge)
        scores.add_row(
            label,
            run.progress,
            _optional(run.last(judge)),
            f"{number(best.value)} @{best.round}" if best else "-",
            _optional(run.last("train_loss")),
            si(run.total("bits_up"), "bit"),
            si(run.total("gradients")),
            duration(run.seconds),
        )
        written = (f"{key.replace('_', '-')}={_plain(run.config[key])}" for key in differing if key in run.config)
        options.add_row(label, " ".join(written))
    section(console, f"{len(found)} runs", scores)
    section(console, "\nwhat differs", options)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _optional(value: float | None) -> str:
    return "-" if value is None else number(value)


def _plain(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
