"""How a round's time and memory grow: with the population, and with the cohort.

    python -m benchmarks.scaling --what population     # N = 1,000 against N = 1,000,000, same cohort
    python -m benchmarks.scaling --what cohort         # 10 to 500 clients in one vmap

Every row is a process of its own, so that its peak memory is its own. Times are medians over rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import vfl
from algorithms.fedavg import FedAvg
from vfl.chunks import Memory

MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured setting."""

    population: int = 1000
    """Clients N."""
    cohort: int = 100
    """Clients a round, all in one vmap."""
    rounds: int = 20
    """Rounds measured, after two that are not."""
    examples: int = 20
    """Examples a client."""
    features: int = 32
    """Numbers an example."""
    model: str = "softmax"
    """Model."""


def measure(case: Case) -> dict[str, float]:
    """Median seconds a round, and the peak memory beside the data (MB), of FedAvg on synthetic data."""
    memory = Memory(torch.device("cpu"))
    before = memory.used() or 0
    spec = f"synthetic:features={case.features},examples={case.examples}"
    data = vfl.data.federated(spec, clients=case.population)
    task = vfl.task(vfl.models.model(case.model, (case.features,), 10))
    stream = vfl.rounds(
        FedAvg(), task, data, case.rounds + 2, clients_per_round=case.cohort, chunk=case.cohort,
        evaluation=vfl.Evaluation(every=0),
    )  # fmt: skip
    seconds = [metrics["seconds"] for _, metrics in stream][2:]
    held = data.clients.x.nbytes + data.clients.y.nbytes + data.clients.offsets.nbytes
    return {
        "s_per_round": statistics.median(seconds),
        "data_mb": held / MB,
        "beside_mb": ((memory.peak() or 0) - before - held) / MB,
    }


def main(what: Literal["population", "cohort", "case"], case: Case = Case(), repeats: int = 3) -> None:
    """Measures along one axis.

    Args:
        what: The axis; `case` measures one setting in this process and prints JSON.
        case: The setting, but for the axis.
        repeats: Runs of each row, in turn; the medians are shown.
    """
    if what == "case":
        print(json.dumps(measure(case)))
        return
    axis: dict[str, tuple[int, ...]] = {"population": (1_000, 1_000_000), "cohort": (10, 100, 500)}
    rows: dict[int, list[dict[str, float]]] = {value: [] for value in axis[what]}
    for _ in range(repeats):
        for value, found in rows.items():
            found.append(_measured_apart(replace(case, **{what: value})))
    table = Table(what, "ms a round", "ratio", "clients/s", "data MB", "beside the data MB")
    first = 0.0
    for value, found in rows.items():
        s, data, beside = (statistics.median(f[k] for f in found) for k in ("s_per_round", "data_mb", "beside_mb"))
        first = first or s
        cohort = value if what == "cohort" else case.cohort
        numbers = (f"{1e3 * s:.2f}", f"{s / first:.2f}", f"{cohort / s:,.0f}", f"{data:,.0f}", f"{beside:,.0f}")
        table.add_row(f"{value:,}", *numbers)
    Console().print(table)


def _measured_apart(case: Case) -> dict[str, float]:
    arguments = [f"--case.{name}={value}" for name, value in asdict(case).items()]
    command = [sys.executable, "-m", "benchmarks.scaling", "--what", "case", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    tyro.cli(main)
