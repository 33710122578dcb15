"""What an algorithm costs beside FedAvg on the same work, and a compressor beside the primitive that bounds it.

    python -m benchmarks.algorithms --json benchmarks/results/algorithms.json
    python -m benchmarks.algorithms --algorithms fedprox "scaffold --option 1" --setting.execution compile

Every algorithm with an entry point is measured: its rounds and FedAvg's by turns, all clients in each. A round may take
1.5 times as long as FedAvg's, and longer in proportion to the sample-gradients that it computes beyond FedAvg's, on the
clients and on the server: of every example in a minibatch, also of those that its mask leaves out, with a third for an
example that is passed forward alone (`benchmarks.counting`). Where its clients compress, so do FedAvg's, by the same
operator: compressors are measured on their own. An algorithm that a network without norm layers cannot serve is
measured on one with them, one that asks for constants that no network has on a quadratic problem; FedAvg there, too.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from benchmarks import compressors as compressing
from benchmarks.counting import counted
from benchmarks.measuring import result, save
from benchmarks.tables import Column, Row, mark, markdown, number, terminal
from vfl.algorithms import algorithms as entry_points
from vfl.algorithms import load_algorithm
from vfl.data.container import FederatedData
from vfl.engine import RoundMetrics
from vfl.errors import DivergedError, UsageError
from vfl.heap import keep_freed_memory
from vfl.training import IDENTITY

ALLOWED = 1.5
"""How many times as long as FedAvg's a round may take, that computes as many gradients."""
WARM_UP = 2  # rounds: the first one learns what results look like, the second one compiles
GIVEN = {"public": "synthetic:features={features},test=0"}
"""What an option is given that must fit the work, where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The work: FedAvg's defaults on synthetic data, all clients in every round."""

    model: str = "mlp"
    """Model of the algorithms, and whose shapes the compressed vectors have."""
    features: int = 784
    """Numbers an example."""
    clients: int = 50
    """Clients, all of them in every round."""
    examples: int = 60
    """Examples a client."""
    batch: int = 20
    """Examples a local step."""
    rounds: int = 15
    """Rounds measured, after two that are not."""
    execution: Literal["vmap", "trace", "compile"] = "vmap"
    """How clients are computed."""
    chunk: int = 10
    """Clients at once, and vectors compressed at once."""
    dim: int = 200
    """Parameters of the quadratic problem."""
    tries: int = 15
    """Calls measured of each compressor."""


class Work(NamedTuple):
    """What is trained on what."""

    name: str
    task: vfl.Task
    data: FederatedData


def network(setting: Setting) -> Work:
    """The model of the setting, on Gaussian classes."""
    module, data = _network(setting)
    return Work(setting.model, vfl.task(module), data)


def normalized(setting: Setting) -> Work:
    """The same with a batch norm before each linear layer of a chain. Raises UsageError for other models."""
    module, data = _network(setting)
    if not isinstance(module, nn.Sequential):
        raise UsageError(f"{setting.model} is no chain of layers, so it gets no norm layers")
    layers: list[nn.Module] = []
    for layer in module:
        layers += [nn.BatchNorm1d(layer.in_features), layer] if isinstance(layer, nn.Linear) else [layer]
    return Work(f"{setting.model} with norms", vfl.task(nn.Sequential(*layers)), data)


def _network(setting: Setting) -> tuple[nn.Module, FederatedData]:
    spec = f"synthetic:features={setting.features},examples={setting.examples},test=0"
    data = vfl.data.federated(spec, clients=setting.clients)
    torch.manual_seed(0)
    return vfl.models.model(setting.model, (setting.features,), data.classes), data


def problem(setting: Setting) -> Work:
    """A quadratic problem, which knows its constants."""
    data = vfl.data.federated(f"quadratic:dim={setting.dim},examples={setting.examples}", clients=setting.clients)
    return Work("quadratic", vfl.LinearProblem(data).task(), data)


def measure(text: str, setting: Setting) -> Row:
    """An algorithm's round beside FedAvg's. `text` is its name, with options as on the command line."""
    name, *options = shlex.split(text)
    kind = load_algorithm(name)
    options += [
        f"--{name}={value.format(**vars(setting))}"
        for name, value in GIVEN.items()
        if hasattr(kind, name) and not any(option.partition("=")[0] == f"--{name}" for option in options)
    ]
    missing = ""
    for make in (network, normalized, problem):
        try:
            return {"algorithm": text, **_beside_fedavg(tyro.cli(kind, args=options), make(setting), setting)}
        except (UsageError, DivergedError) as error:
            missing = missing or str(error)
    return {"algorithm": text, "missing": missing}


def _beside_fedavg(config: Any, work: Work, setting: Setting) -> dict[str, Any]:
    # The two play by turns, so that whatever slows the machine down slows both.
    usual = FedAvg(compressor=getattr(config, "compressor", IDENTITY))
    both = list(zip(_rounds(config, work, setting), _rounds(usual, work, setting), strict=True))
    s = np.array([[metrics["seconds"] for metrics in turn] for turn in both])[WARM_UP:]  # [rounds, 2]
    gradients = np.array([_computed(c, work, setting) for c in (config, usual)]).T[WARM_UP:]
    times, as_many = s[:, 0] / s[:, 1], gradients[:, 0] / gradients[:, 1]
    fair = np.maximum(as_many, 1)  # fewer gradients than FedAvg's are the algorithm's merit
    # Relative to what is fair first: rounds of different kinds may alternate.
    cost, extra = float(np.median(times / fair)), float(fair.mean())
    return {
        "model": work.name,
        "compressor": usual.compressor,
        "execution": both[-1][0]["execution"],
        "s_per_round": float(np.median(s[:, 0])),
        "fedavg_s_per_round": float(np.median(s[:, 1])),
        "ratio": cost * extra,
        "gradients": float(as_many.mean()),
        "allowed": ALLOWED * extra,
        "holds": cost <= ALLOWED,
    }


def _computed(config: Any, work: Work, setting: Setting) -> np.ndarray:
    """The sample-gradients that the same rounds compute, each [rounds]; under vmap, as the compiled program does."""
    task, count = counted(work.task)
    found = [count.total for _ in _rounds(config, work._replace(task=task), replace(setting, execution="vmap"))]
    return np.diff(found, prepend=0)


def _rounds(config: Any, work: Work, setting: Setting) -> Iterator[RoundMetrics]:
    stream = vfl.rounds(
        config, work.task, work.data, WARM_UP + setting.rounds, clients_per_round="all", batch_size=setting.batch,
        execution=setting.execution, chunk=setting.chunk, evaluation=vfl.Evaluation(every=0),
    )  # fmt: skip
    return (metrics for _, metrics in stream)


COLUMNS = (
    Column("algorithm", lambda row: row["algorithm"]),
    Column("on", lambda row: f"{row['model']}, {row['execution']}"),
    Column("compressor of both", lambda row: row["compressor"]),
    Column("ms a round", lambda row: number(1e3 * row["s_per_round"])),
    Column("FedAvg's", lambda row: number(1e3 * row["fedavg_s_per_round"])),
    Column("ratio", lambda row: f"{row['ratio']:.2f}"),
    Column("gradients computed", lambda row: f"{row['gradients']:.2f}"),
    Column("allowed", lambda row: f"{row['allowed']:.2f} {mark(row['holds'])}"),
)


def section(found: dict[str, Any]) -> str:
    """The report's section."""
    setting = found["setting"]
    lines = [
        "## Algorithms: a round beside FedAvg's",
        "",
        f"{setting['clients']} clients, all in every round, {setting['examples']} examples of {setting['features']} "
        f"numbers each, batches of {setting['batch']}; medians of {setting['rounds']} rounds by turns with FedAvg's. "
        f"Where an algorithm's clients compress, so do FedAvg's. Allowed is {ALLOWED}, times the sample-gradients "
        "computed relative to FedAvg's where those are more: of every example in a minibatch, masked or not, on "
        "clients and server, with a third for one that is passed forward alone.",
        "",
        *markdown(COLUMNS, found["algorithms"]),
    ]
    if found["compressors"]:
        lines += ["", "Compressors, beside the dearest primitive that each calls on the same numbers:", "",
                  *markdown(compressing.COLUMNS, found["compressors"])]  # fmt: skip
    return "\n".join(lines)


def main(
    setting: Setting = Setting(),
    algorithms: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--algorithm"])] = ("all",),
    compressors: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--compressor"])] = ("all",),
    json: Path | None = None,
) -> None:
    """Measures algorithms and compressors, and prints a table of each.

    Exits with 1 where a ratio is above what is allowed.

    Args:
        algorithms: Names of entry points, with their options: "scaffold --option 1"; all; or none.
        compressors: As vfl.compressors takes them, such as rand_k:0.01; all; or none.
        json: The file to write the numbers to.
    """
    keep_freed_memory()  # as an engine does, for the compressors, too
    console = Console()
    rows = []
    for text in _chosen(algorithms, list(entry_points())):
        rows.append(measure(text, setting))
        Console(stderr=True).print(f"{text}: {rows[-1].get('ratio', 'not measured')}", highlight=False)
    if rows:
        console.print(terminal(COLUMNS, rows, "a round beside FedAvg's"))
    compressed: list[Row] = []
    if not compressing.available():
        console.print("There is no module vfl.compressors, so no compressor was measured.")
    elif chosen := _chosen(compressors, compressing.specs()):
        shapes = network(setting).task.shapes
        compressed = [compressing.measure(spec, shapes, setting.chunk, setting.tries) for spec in chosen]
        console.print(terminal(compressing.COLUMNS, compressed, "compressors, ns an entry"))
    if json is not None:
        save(result("algorithms", setting=vars(setting), algorithms=rows, compressors=compressed), json)
    if not all(row.get("holds", True) for row in [*rows, *compressed]):
        sys.exit(1)


def _chosen(wanted: Sequence[str], known: list[str]) -> list[str]:
    if "none" in wanted:
        return []
    return known if "all" in wanted else list(wanted)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.algorithms: {error}", file=sys.stderr)
        sys.exit(2)
