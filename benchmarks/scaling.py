"""How a round's time and memory grow: with the population, the cohort, the model, local work, ranks and replicas.

    python -m benchmarks.scaling --what population     # 1,000 to 10,000,000 clients, same cohort
    python -m benchmarks.scaling --what cohort         # 10 to 5,000 clients
    python -m benchmarks.scaling --what dimension      # models of 1,000 to 100,000,000 parameters
    python -m benchmarks.scaling --what steps          # 1 to 50 local steps
    python -m benchmarks.scaling --what ranks          # 1 and 2 processes of one thread
    python -m benchmarks.scaling --what replicas       # 1 to 50 runs at once, which differ in their seeds
    python -m benchmarks.scaling --what overhead       # a round with next to nothing to compute: at most 2 ms

Every row is a process of its own, so that its peak memory is its own, with one thread unless OMP_NUM_THREADS says
otherwise. Times are medians over rounds. `--json benchmarks/results/scaling_cohort.json` writes the numbers, and a plot
beside them where matplotlib is installed.
"""

from __future__ import annotations

import importlib.util
import json as json_
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console

import vfl
from algorithms.fedavg import FedAvg
from benchmarks.growth import columns, plot
from benchmarks.measuring import apart, result, save
from benchmarks.tables import number, terminal
from vfl.chunks import Memory
from vfl.errors import UsageError
from vfl.tuning import MODES, Execution

MB = 1e6
AT_ONCE = 256 * MB  # of the clients' models
WARM_UP = 2  # rounds: the first one learns what results look like, the second one compiles
FEWEST = 3  # rounds measured, however long they take


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured setting."""

    population: int = 1000
    """Clients N."""
    cohort: int = 100
    """Clients a round, all in one vmap unless their models fill more than 256 MB."""
    rounds: int = 20
    """Rounds measured, after two that are not."""
    seconds: float = 10.0
    """Seconds after which no further round is measured; three are, at least."""
    examples: int = 20
    """Examples a client."""
    features: int = 32
    """Numbers an example."""
    classes: int = 10
    """Classes."""
    model: str = "softmax"
    """Model."""
    steps: int = 1
    """Local steps, of 20 examples."""
    execution: Execution = "vmap"
    """How clients are computed."""
    ranks: int = 1
    """Processes that share the cohort."""
    replicas: int = 1
    """Runs that are played at once."""


class Axis(NamedTuple):
    """What is varied."""

    values: tuple[int | str, ...]
    at: Callable[[Case, Any], Case]  # the case there


def _width(case: Case, parameters: int) -> int:
    """Units w of two equal hidden layers: w² + (features + classes + 2) w + classes are about as many parameters."""
    b = (case.features + case.classes + 2) / 2
    return max(round(math.sqrt(b * b + max(parameters - case.classes, 0)) - b), 1)


AXES: dict[str, Axis] = {
    # 32 bytes of inputs a client, so that ten million of them fit into a laptop's memory.
    "population": Axis(
        (10**3, 10**4, 10**5, 10**6, 10**7), lambda case, N: replace(case, population=N, examples=2, features=4)
    ),
    "cohort": Axis(
        (10, 100, 500, 1_000, 5_000), lambda case, S: replace(case, cohort=S, population=max(S, case.population))
    ),
    "dimension": Axis(
        (10**3, 10**4, 10**5, 10**6, 10**7, 10**8),
        lambda case, D: replace(
            case, model="mlp:{0},{0}".format(_width(case, D)), cohort=max(min(case.cohort, 10**9 // D), 1)
        ),
    ),
    "steps": Axis((1, 2, 5, 10, 20, 50), lambda case, K: replace(case, steps=K)),
    "ranks": Axis((1, 2), lambda case, R: replace(case, ranks=R, model="mlp", features=784, examples=60, steps=3)),
    "replicas": Axis(
        (1, 2, 5, 10, 20, 50),
        lambda case, R: replace(case, replicas=R, population=10, cohort=10, features=4, classes=4),
    ),
    # 4 features of 2 classes: a model of 10 parameters.
    "overhead": Axis(
        MODES,
        lambda case, execution: replace(case, execution=execution, cohort=1, features=4, classes=2, steps=1),
    ),
}
"""By name. Some set more than their own value: populations have clients of 2 examples of 4 numbers, the largest models
have cohorts of 10, ranks share the work of the throughput benchmark's mlp, replicas are of 10 clients with a model of
20 parameters, and overhead is measured on one client with one step of a model of 10."""


def measure(case: Case) -> dict[str, float]:
    """Median seconds a round, and the peak memory beside the data (MB), of FedAvg on synthetic data."""
    memory = Memory(torch.device("cpu"))
    before = memory.used() or 0
    spec = f"synthetic:features={case.features},classes={case.classes},examples={case.examples}"
    data = vfl.data.federated(spec, clients=case.population)
    task = vfl.task(vfl.models.model(case.model, (case.features,), case.classes))
    parameters = task.x.numel()
    chunk = max(min(case.cohort, int(AT_ONCE / (parameters * task.x.element_size()))), 1)
    seconds: list[float] = []
    with vfl.launched(task.x.device) as ranks:
        stream = vfl.rounds(
            FedAvg(), task, data, case.rounds + WARM_UP, clients_per_round=case.cohort, chunk=chunk, ranks=ranks,
            execution=case.execution, local_steps=case.steps, evaluation=vfl.Evaluation(every=0),
            stop=_after(case.seconds), replicas=case.replicas if case.replicas > 1 else None,
        )  # fmt: skip
        seconds += [metrics["seconds"] for _, metrics in stream]
    held = data.clients.x.nbytes + data.clients.y.nbytes + data.clients.offsets.nbytes
    return {
        "s_per_round": statistics.median(seconds[WARM_UP:]),
        "rounds": len(seconds) - WARM_UP,
        "parameters": parameters,
        "data_mb": held / MB,
        "beside_mb": ((memory.peak() or 0) - before - held) / MB,
    }


def _after(seconds: float) -> Callable[[], bool]:
    """Whether to stop, asked once a round: when the time is over that begins after the warm-up."""
    started, asked = 0.0, 0

    def stop() -> bool:
        nonlocal started, asked
        asked += 1
        if asked == WARM_UP:
            started = time.monotonic()
        return asked >= WARM_UP + FEWEST and time.monotonic() - started > seconds

    return stop


def measured_apart(case: Case) -> dict[str, float]:
    """`measure` in a process of its own, or several. Raises UsageError where they fail."""
    arguments = [f"--case.{name}={value}" for name, value in asdict(case).items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    command = [*(launcher if case.ranks > 1 else []), "-m", "benchmarks.scaling", "--what", "case", *arguments]
    loopback = (
        "GLOO_SOCKET_IFNAME" not in os.environ and sys.platform == "linux"
    )  # the host's own name need not resolve
    return apart(command, case, **({"GLOO_SOCKET_IFNAME": "lo"} if loopback else {}))


def main(
    what: Literal["population", "cohort", "dimension", "steps", "ranks", "replicas", "overhead", "case"],
    case: Case = Case(),
    values: tuple[int, ...] = (),
    repeats: int = 3,
    json: Path | None = None,
) -> None:
    """Measures along one axis.

    Args:
        what: The axis; `case` measures one setting in this process and prints JSON.
        case: The setting, but for the axis.
        values: Points on the axis; none: those above.
        repeats: Runs of each row, in turn; the medians are shown.
        json: The file to write the numbers to, and beside it the plot.
    """
    if what == "case":
        found = measure(case)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json_.dumps(found))
        return
    if values and what == "overhead":
        raise UsageError("overhead is measured at no values, so --values has no meaning there")
    progress = Console(stderr=True)
    runs: dict[int | str, list[dict[str, float]]] = {value: [] for value in values or AXES[what].values}
    for turn in range(1, repeats + 1):
        for value, found in runs.items():
            found.append(measured_apart(AXES[what].at(case, value)))
            said = f"{number(1e3 * found[-1]['s_per_round'])} ms a round"
            progress.print(f"{turn}/{repeats} {what} {value}: {said}", highlight=False)
    rows = [_row(value, AXES[what].at(case, value), found) for value, found in runs.items()]
    Console().print(terminal(columns(what, rows[0]["s_per_round"]), rows, f"scaling with the {what}"))
    if json is not None:
        drawn = bool(importlib.util.find_spec("matplotlib")) and len(rows) > 1 and what != "overhead"
        image = json.with_suffix(".png").name if drawn else None
        same = common([AXES[what].at(case, value) for value in runs])
        save(result("scaling", what=what, same=same, repeats=repeats, rows=rows, plot=image), json)
        if image:
            plot(what, rows, json.with_name(image))


def common(cases: Sequence[Case]) -> dict[str, Any]:
    """The fields that all cases share, in which they do not differ."""
    first, *others = map(asdict, cases)
    return {name: value for name, value in first.items() if all(other[name] == value for other in others)}


def _row(value: int | str, case: Case, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The repeats of a row as one: medians."""
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    rate = case.cohort * case.replicas / middle["s_per_round"]
    return {"value": value, "clients_per_s": rate, **middle, "parameters": int(middle["parameters"]), "runs": runs}


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.scaling: {error}", file=sys.stderr)
        sys.exit(2)
