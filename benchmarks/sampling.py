"""How long it takes to draw a cohort of a large population, and to gather its minibatches and client states.

    python -m benchmarks.sampling --json benchmarks/results/sampling.json

A round's costs that could grow with the population, each alone: medians, on the CPU. An example is a row of bytes. Rows
overlap, so that a client costs as many bytes as it has examples, however long they are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

import vfl
from benchmarks.measuring import result, save
from benchmarks.tables import Column, Row, mark, markdown, number, terminal
from vfl import random
from vfl.errors import UsageError
from vfl.local import minibatches
from vfl.store import Store

LIMIT = 50e-3
"""Seconds that drawing a cohort may take, and that gathering it may."""
SAMPLERS = ("uniform", "replacement", "poisson", "weighted")
GATHERING = ("plan", "gather", "read", "write")
"""Its minibatches' rows drawn, their examples gathered, its clients' states read and written."""
WARM_UP = 2  # rounds


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is the same for all populations."""

    cohort: int = 1000
    """Clients a round; no more than the population."""
    examples: int = 8
    """Examples a client."""
    features: int = 32
    """Bytes an example."""
    state: int = 1000
    """Floats of client state."""
    rounds: int = 20
    """Rounds measured, after two that are not."""


def measure(case: Case, population: int) -> Row:
    """Median seconds of each part, by name."""
    N, n, F, S = population, case.examples, case.features, min(case.cohort, population)
    offsets = np.arange(N + 1) * n
    x = torch.ones(N * n + F, dtype=torch.uint8).as_strided((N * n, F), (1, 1))  # [M, F]
    work, store = vfl.Work(), Store(torch.zeros(case.state), torch.device("cpu"))
    everyone = torch.ones(S, dtype=torch.bool)
    drawers = {name: vfl.sampler(name, S, offsets) for name in SAMPLERS}
    seconds: dict[str, list[float]] = {name: [] for name in (*SAMPLERS, *GATHERING)}

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        made = function(*arguments)
        seconds[name].append(time.perf_counter() - started)
        return made

    for t in range(case.rounds + WARM_UP):
        key = random.fold_in(random.key(0), t)
        cohorts = {name: timed(name, sampler.draw, key) for name, sampler in drawers.items()}
        ids = cohorts["uniform"].ids
        keys = random.fold_in(key, torch.from_numpy(ids))
        plan = timed("plan", minibatches, work, keys, offsets[ids], offsets[ids + 1] - offsets[ids])
        timed("gather", lambda rows: x[rows], plan.rows)
        states = timed("read", store.gather, ids, torch.device("cpu"))
        timed("write", store.scatter, ids, states, everyone)
    found = {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}
    return {"population": N, **found, "together": sum(found[name] for name in GATHERING)}


def _ms(name: str) -> Column:
    return Column(name, lambda row: number(1e3 * row[name]))


POPULATION = Column("population", lambda row: f"{row['population']:,}")
DRAWING = (
    POPULATION,
    *map(_ms, SAMPLERS),
    Column(f"≤ {1e3 * LIMIT:g} ms", lambda row: mark(max(row[name] for name in SAMPLERS) <= LIMIT)),
)
GATHERED = (
    POPULATION,
    *map(_ms, (*GATHERING, "together")),
    Column(f"≤ {1e3 * LIMIT:g} ms", lambda row: mark(row["together"] <= LIMIT)),
)


def tables(case: dict[str, Any]) -> tuple[tuple[str, tuple[Column, ...]], ...]:
    """Both tables: what they show, and their columns."""
    return (
        (f"ms to draw a cohort of {case['cohort']:,}, by sampler", DRAWING),
        (
            f"ms to gather it: to plan its minibatches (one epoch of {case['examples']} examples of {case['features']} "
            f"bytes), to gather these, and to read and write its clients' states ({case['state']:,} floats each)",
            GATHERED,
        ),
    )


def section(found: dict[str, Any]) -> str:
    """The report's section."""
    lines = ["## Sampling: a cohort of a large population"]
    for what, columns in tables(found["case"]):
        lines += ["", f"{what}:", "", *markdown(columns, found["rows"])]
    return "\n".join(lines)


def main(
    populations: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6, 10**7),
    case: tyro.conf.OmitArgPrefixes[Case] = Case(),
    json: Path | None = None,
) -> None:
    """Measures each population.

    Args:
        populations: Clients N.
        case: What is the same for all.
        json: The file to write the numbers to.
    """
    if min(populations) < 1 or case.rounds < 1 or case.cohort < 1:
        raise UsageError("populations, the cohort and rounds must all be at least 1")
    rows = [measure(case, population) for population in populations]
    for what, columns in tables(asdict(case)):
        Console().print(terminal(columns, rows, what))
    if json is not None:
        save(result("sampling", case=asdict(case), rows=rows), json)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.sampling: {error}", file=sys.stderr)
        sys.exit(2)
