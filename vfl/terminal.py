"""Numbers, tables and small curves as text."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 1000  # columns of what is not a terminal: a table keeps a row in one line, for grep
_LEVELS = "▁▂▃▄▅▆▇█"


def terminal() -> Console:
    """The console to print to: no markup, and no line breaks of its own where the output is no terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNLIMITED
    return console


def si(value: float, unit: str = "") -> str:
    """Three digits and a prefix: `1.23 Mbit` for 1234567 and "bit"."""
    if not math.isfinite(value):
        return "-"
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(value) >= 999.5 and (larger := next(prefixes, None)):
        value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}{unit}".rstrip()


def number(value: float) -> str:
    """A loss or an accuracy: four decimals, or a power of ten where those would hide it."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"


def duration(seconds: float) -> str:
    """`0:01:23`."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve of at most `width` characters, each the mean of as many consecutive values; finite values only."""
    count = min(width, len(values))
    if not count:
        return ""
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(_LEVELS) - 1) or 1.0
    return "".join(_LEVELS[round((mean - low) / step)] for mean in means)


def section(console: Console, title: str, body: Table) -> None:
    """Prints a table under its title, which a narrow table does not break."""
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(body)


def table(*columns: str) -> Table:
    """An empty table in the house style; a column that starts with > is flush right, for numbers.

    Where the width does not suffice, text goes on in the next line; only numbers are cut off, with an ellipsis.
    """
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        if column.startswith(">"):
            made.add_column(column.removeprefix(">"), justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="fold", min_width=8)
    return made


def facts(pairs: Mapping[str, str]) -> Table:
    """A table of names and values."""
    made = table("", "")
    made.show_header = False
    for name, value in pairs.items():
        made.add_row(Text(name, "dim"), value)
    return made
