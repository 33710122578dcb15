"""A table once, for the terminal and for the report: its columns, and how each shows a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

Row = Mapping[str, Any]
"""A measured case, as it stands in the JSON file; one that could not be measured has its reason in `missing`."""


class Column(NamedTuple):
    """A heading, and what stands below it."""

    title: str
    show: Callable[[Row], str]


def terminal(columns: Sequence[Column], rows: Iterable[Row], title: str, caption: str = "") -> Table:
    """For the terminal. The first column names the row; all others are numbers."""
    rows = list(rows)
    made = Table(
        title=title, caption="\n".join(filter(None, [caption, *_reasons(columns, rows)])), caption_justify="left"
    )
    for i, column in enumerate(columns):
        made.add_column(column.title, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        made.add_row(*_cells(columns, row))
    return made


def markdown(columns: Sequence[Column], rows: Iterable[Row]) -> list[str]:
    """The lines of the same table in Markdown."""
    rows = list(rows)
    table = [*header([column.title for column in columns]), *(line(_cells(columns, row)) for row in rows)]
    reasons = [f"- {reason}" for reason in _reasons(columns, rows)]
    return [*table, "", *reasons] if reasons else table


def _cells(columns: Sequence[Column], row: Row) -> list[str]:
    if "missing" in row:
        return [columns[0].show(row), "not measured", *[""] * (len(columns) - 2)]
    return [column.show(row) for column in columns]


def _reasons(columns: Sequence[Column], rows: Iterable[Row]) -> list[str]:
    """Why rows are missing."""
    return [f"{columns[0].show(row)}: {row['missing']}" for row in rows if "missing" in row]


def line(values: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def header(titles: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [line(titles), "|" + "---|" * len(titles)]


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mark(holds: bool) -> str:
    """Whether a bound holds."""
    return "✓" if holds else "✗"
