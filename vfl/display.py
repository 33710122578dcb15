"""What a run shows in the terminal: a consumer of its metric stream."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vfl.chunks import Memory
from vfl.engine import RoundMetrics
from vfl.plots import Score, score
from vfl.terminal import duration, number, si, terminal

TOTALS = frozenset({"bits_up", "bits_down", "round_bits_up", "round_bits_down", "client_bits_up",
                    "client_bits_down", "gradients", "seconds",
                    "simulated_seconds"})  # fmt: skip
"""The float metrics that count costs; all others say how good the model is, or are an algorithm's own."""
_RECENT = 20  # rounds over which speeds are averaged


class Progress(Protocol):
    """Shows a round."""

    def __call__(self, metrics: RoundMetrics) -> None:
        """`metrics` are those that `vfl.rounds` yields."""
        ...


@contextlib.contextmanager
def progress(
    rounds: int,
    title: str = "",
    quiet: bool = False,
    console: Console | None = None,
    *,
    done: int = 0,
    verbose: bool = False,
) -> Iterator[Progress]:
    """`with progress(100, "fedavg on digits") as show:`, then `show(metrics)` after each round.

    A terminal gets a progress bar and a table that stay in place; anything else plain lines, one for each evaluated
    round and each tenth of the rounds. Warnings of the logger `vfl` appear above, information too if `verbose`. `quiet`
    shows nothing, warnings included. `done` counts the rounds that a resumed run has behind it.
    """
    console = console or terminal()
    tally = Tally(rounds, done)
    with _messages(console, logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING):
        if quiet:
            yield tally.add
            return
        if not console.is_interactive:
            yield _Lines(console, tally, title)
            return
        board = _Board(tally, title)
        with Live(board, console=console, refresh_per_second=4):
            yield board


class Known(NamedTuple):
    """A score's value."""

    meaning: Score
    value: float
    round: int  # after which it was measured

    def beats(self, other: Known) -> bool:
        """Whether the model was better then."""
        return self.value < other.value if self.meaning.low else self.value > other.value


class Tally:
    """What a metric stream has said so far."""

    def __init__(self, rounds: int, done: int = 0) -> None:
        self.rounds, self.round, self.began = rounds, done, time.monotonic()
        self.last: RoundMetrics = {}
        self.scores: dict[str, Known] = {}  # the latest losses, accuracies, …
        self.best: dict[str, Known] = {}  # and the best on data that was not trained on
        self.dropped = 0  # clients, in the rounds of this process
        self._played = 0
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=_RECENT)  # clients, gradients, seconds

    def add(self, metrics: RoundMetrics) -> None:
        """Takes a round in."""
        before = self.last.get("gradients", 0.0 if metrics["round"] == 1 else None)
        if before is not None:  # a resumed run's first round does not tell its own share of the total
            self._recent.append((metrics["clients"], metrics["gradients"] - before, metrics["seconds"]))
        self.last, self.round, self._played = metrics, metrics["round"], self._played + 1
        self.dropped += metrics["dropped"]
        for name, value in metrics.items():
            meaning = score(name)
            if meaning is None or not math.isfinite(value):
                continue
            known = self.scores[name] = Known(meaning, value, self.round)
            if meaning.split != "train" and (name not in self.best or known.beats(self.best[name])):
                self.best[name] = known

    @property
    def elapsed(self) -> float:
        """Seconds since this process began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds that the other rounds will take at the pace so far, evaluations included; NaN before the first."""
        return self.elapsed / self._played * (self.rounds - self.round) if self._played else math.nan

    def speed(self) -> tuple[float, float]:
        """Clients and gradients a second of the last rounds, evaluations left out; NaN as long as nobody knows."""
        clients, gradients, seconds = map(math.fsum, zip((0, 0, 0), *self._recent, strict=True))
        return (clients / seconds, gradients / seconds) if seconds else (math.nan, math.nan)


class _Lines:
    """Plain lines under a header, which comes again when a column is new."""

    def __init__(self, console: Console, tally: Tally, title: str) -> None:
        self.console, self.tally, self.header = console, tally, ""
        if title:
            self._print(title)

    def __call__(self, metrics: RoundMetrics) -> None:
        tally = self.tally
        tally.add(metrics)
        evaluated = any(name in metrics for name in tally.best)
        if not evaluated and tally.round % max(tally.rounds // 10, 1) and tally.round != tally.rounds:
            return
        clients, gradients = tally.speed()
        cells = {"round": f"{tally.round}/{tally.rounds}"}
        cells |= {n: number(k.value) if k.round == tally.round else "-" for n, k in tally.scores.items()}
        cells |= {
            "clients/s": si(clients),
            "gradients/s": si(gradients),
            "up": si(metrics["bits_up"], "bit"),
            "down": si(metrics["bits_down"], "bit"),
            "elapsed": duration(tally.elapsed),
            "left": duration(tally.left),
        }
        widths = [max(len(name), 9) for name in cells]
        header = "  ".join(name.rjust(w) for name, w in zip(cells, widths, strict=True))
        if header != self.header:
            self.header = header
            self._print(header)
        self._print("  ".join(cell.rjust(w) for cell, w in zip(cells.values(), widths, strict=True)))

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)  # as it is, flushed


class _Messages(logging.Handler):
    """Log records as lines of the console, which keeps them above a live display."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        line = Text(f"{record.levelname.lower()}: {self.format(record)}", style)
        self.console.print(line, soft_wrap=not self.console.is_interactive)


@contextlib.contextmanager
def _messages(console: Console, level: int) -> Iterator[None]:
    """Shows the logger `vfl` on this console alone: another handler would write into the live display."""
    log = logging.getLogger("vfl")
    before, propagate, handler = log.level, log.propagate, _Messages(console)
    handler.setLevel(level)
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        log.propagate = propagate


class _Board:
    """The live display: title, progress bar, and three groups of facts side by side where they fit.

    A thread redraws it, and a signal handler may log while a round is taken in: so no lock, only whole new values.
    """

    def __init__(self, tally: Tally, title: str) -> None:
        self.tally, self.title = tally, title
        self.groups: tuple[dict[str, str], ...] = ()

    def __call__(self, metrics: RoundMetrics) -> None:
        self.tally.add(metrics)
        self.groups = (_quality(self.tally), _costs(self.tally), _speed(self.tally))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The terminal echoes Ctrl-C as ^C behind the last line, where it must not begin a new one.
        yield Constrain(self._view(), options.max_width - 2)

    def _view(self) -> RenderableType:
        tally, groups = self.tally, self.groups
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            f"round {tally.round}/{tally.rounds}",
            ProgressBar(tally.rounds, tally.round),
            duration(tally.elapsed) + (f", {duration(tally.left)} left" if groups else ""),
        )
        heading = [Text(self.title, "bold", no_wrap=True, overflow="ellipsis")] if self.title else []
        facts = [_grid(group | (_memory() if group is groups[-1] else {})) for group in groups]
        return Group(*heading, bar, Columns(facts, padding=(0, 3)))


def _grid(facts: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True, min_width=9)
    for name, value in facts.items():
        grid.add_row(name, value)
    return grid


def _quality(tally: Tally) -> dict[str, str]:
    """The latest scores, with their round where it is not this one, and the best of each accuracy (or else loss)."""
    judges = [name for name, known in tally.best.items() if not known.meaning.low] or list(tally.best)
    facts: dict[str, str] = {}
    for name, known in tally.scores.items():
        facts[name.replace("_", " ")] = number(known.value) + (f" @{known.round}" if known.round != tally.round else "")
        if name in judges:
            best = tally.best[name]
            facts[f"best {name.replace('_', ' ')}"] = f"{number(best.value)} @{best.round}"
    for name, value in tally.last.items():
        own = isinstance(value, float) and name not in tally.scores and name not in TOTALS  # the algorithm's own
        if own and not name.startswith(("client_", "personal_")):  # the spreads over clients are too many
            facts[name.replace("_", " ")] = number(value)
    return facts


def _costs(tally: Tally) -> dict[str, str]:
    """What the run has used up so far."""
    last = tally.last
    facts = {
        "uplink": si(last["bits_up"], "bit"),
        "downlink": si(last["bits_down"], "bit"),
        "gradients": si(last["gradients"]),
    }
    return facts | ({"dropped clients": f"{tally.dropped}"} if tally.dropped else {})


def _speed(tally: Tally) -> dict[str, str]:
    clients, gradients = tally.speed()
    return {
        "clients/s": si(clients),
        "gradients/s": si(gradients),
        "at once": f"{tally.last['chunk']}, {tally.last['execution']}",
    }


def _memory() -> dict[str, str]:
    """What this process holds now, where the system tells."""
    resident = Memory(torch.device("cpu")).used()
    facts = {} if resident is None else {"memory": si(resident, "B")}
    if torch.cuda.is_initialized():
        facts["GPU memory"] = si(torch.cuda.memory_reserved(), "B")
    return facts
