"""`vfl list`: what can be written where."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import tyro

from vfl.algorithms import algorithms, load_algorithm, origin
from vfl.compressors import COMPRESSORS
from vfl.data import DATASETS, PARTITIONS, SOURCES
from vfl.errors import UsageError
from vfl.models import MODELS
from vfl.optimizers import OPTIMIZERS
from vfl.regularizers import REGULARIZERS
from vfl.robust import AGGREGATORS
from vfl.samplers import SAMPLERS
from vfl.schedules import SCHEDULES
from vfl.spec import describe
from vfl.terminal import section, table, terminal

Kind = Literal[
    "all",
    "algorithms",
    "models",
    "data",
    "partitions",
    "samplers",
    "optimizers",
    "schedules",
    "regularizers",
    "compressors",
    "aggregators",
]

TABLES: dict[Kind, tuple[str, Mapping[str, Callable[..., Any]]]] = {
    "models": ("--model, or your own as package.module:factory", MODELS),
    "data": ("--data", DATASETS),
    "partitions": ("--partition", PARTITIONS),
    "samplers": ("--sampling", SAMPLERS),
    "optimizers": ("--local-optimizer, --server-optimizer", OPTIMIZERS),
    "schedules": ("--local-schedule, --server-schedule; a + joins two", SCHEDULES),
    "regularizers": ("--regularizer", REGULARIZERS),
    "compressors": ("--compressor, --downlink; compose(C1,C2), switch(C1:p1,C2:p2)", COMPRESSORS),
    "aggregators": ("--aggregator", AGGREGATORS),
}


@dataclasses.dataclass(frozen=True)
class List:
    """Lists what a run can be made of, and how to write it."""

    kind: Annotated[Kind, tyro.conf.Positional, tyro.conf.arg(metavar="[KIND]")] = "all"
    """What to list: all, algorithms, models, data, partitions, samplers, optimizers, schedules, regularizers,
    compressors or aggregators."""

    def run(self) -> None:
        """Prints the tables."""
        console = terminal()
        kinds: list[Kind] = ["algorithms", *TABLES] if self.kind == "all" else [self.kind]
        for kind in kinds:
            if kind != kinds[0]:
                console.print()
            if kind == "algorithms":
                option = "vfl run NAME"
                shown = table("name", "from", "what it is")
                rows = _algorithms()
            else:
                option, entries = TABLES[kind]
                shown = table("how to write it", "what it is")
                rows = _entries(kind, entries)
            for row in rows:
                shown.add_row(*row)
            section(console, f"{kind}: {option}", shown)


def _algorithms() -> Iterable[tuple[str, ...]]:
    for name, point in algorithms().items():
        try:
            about = summary(load_algorithm(name))
        except UsageError as error:  # one broken package must not hide the others
            about = f"broken: {error}"
        yield name, origin(point), about


def _entries(kind: Kind, entries: Mapping[str, Callable[..., Any]]) -> Iterable[tuple[str, ...]]:
    for name, function in entries.items():
        get = f" Get it with `vfl data get {name}`." if kind == "data" and name in SOURCES else ""
        yield usage(name, function), summary(function) + get


def usage(name: str, function: Callable[..., Any]) -> str:
    """How to write this entry of a table; keyword-only parameters without a value are vfl's to fill."""
    parameters = inspect.signature(function).parameters.values()
    filled = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default in (p.empty, None)]
    return describe(name, function, dict.fromkeys(filled))


def summary(documented: Any) -> str:
    """The first paragraph of its docstring, in one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())
