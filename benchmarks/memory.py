"""What a round takes of memory: for each client of a chunk, beside the sum of its parts; and nothing for the cohort.

    python -m benchmarks.memory --json benchmarks/results/memory.json
    python -m benchmarks.memory --models mlp --case.algorithm scaffold

Random images, on the CPU. Every setting is a process of its own. Its memory is the most that it has resident in a
round, above what it had after a round of one client, in which everything is imported. The C library hands freed memory
back (MALLOC_MMAP_THRESHOLD_), so that the peak is that of what is in use, not of what is kept for reuse. Client states
are the one thing that a round keeps for the whole cohort: it must be able to take them back.
"""

from __future__ import annotations

import json as json_
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

import vfl
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from benchmarks.measuring import apart, result, save
from benchmarks.tables import Column, Row, markdown, number, terminal
from benchmarks.work import CLASSES, SIDE
from vfl.chunks import Memory
from vfl.errors import UsageError

MB = 1e6
PARTS = ("model", "gradient", "message", "batch", "activations", "state")
ALGORITHMS = {"fedavg": FedAvg, "scaffold": Scaffold}
HANDED_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured setting."""

    model: str = "mlp"
    """Model: softmax, mlp, cnn, lenet, or package.module:factory."""
    algorithm: Literal["fedavg", "scaffold"] = "fedavg"
    """Algorithm; scaffold's clients keep state."""
    chunk: int = 25
    """Clients at once, under vmap."""
    cohort: int = 0
    """Clients a round; 0: three times the largest chunk, so that it has others before and after it."""
    population: int = 1000
    """Clients N, of as many examples as a batch holds; no cohort is larger."""
    batch: int = 20
    """Examples of a local step."""
    steps: int = 2
    """Local steps; from the second on, every client has a model of its own."""
    rounds: int = 1
    """Rounds."""


def measure(case: Case) -> dict[str, float]:
    """The peak memory of a round above that of a round of one client, and the parts of a client, in bytes.

    Raises UsageError where the system does not tell a process's memory.
    """
    memory = Memory(torch.device("cpu"))
    N, B = case.population, case.batch
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (N * B, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    y = torch.randint(CLASSES, (N * B,), generator=generator)
    clients = vfl.data.Packed(x, y, np.arange(N + 1) * B)
    data = vfl.data.FederatedData("random", clients, None, None, None, CLASSES, vfl.data.cast)
    module = vfl.models.model(case.model, (1, SIDE, SIDE), CLASSES)
    task, algorithm = vfl.task(module), ALGORITHMS[case.algorithm](local_lr=0.01)

    def play(rounds: int, cohort: int, chunk: int) -> float:
        """Bytes of a client's message."""
        stream = vfl.rounds(
            algorithm, task, data, rounds, clients_per_round=cohort, chunk=chunk, batch_size=B, local_steps=case.steps,
            execution="vmap", evaluation=vfl.Evaluation(every=0),
        )  # fmt: skip
        *_, (_, last) = stream
        return last["bits_up"] / 8 / rounds / cohort

    play(1, 1, 1)
    before = memory.used()
    message = play(case.rounds, case.cohort, case.chunk)
    peak = memory.peak()
    if before is None or peak is None:
        raise UsageError("the memory of a process is read from /proc, which this system lacks")
    state = vfl.leaves(algorithm.build(task, N).init_client(task.x))
    inputs = vfl.data.cast(x[:B], torch.float32)
    return {
        "peak": peak - before,
        "model": task.x.nbytes,
        "gradient": task.x.nbytes,
        "message": message,
        "batch": inputs.nbytes + y[:B].nbytes,
        "activations": activations(module, inputs, y[:B]),
        "state": 2 * sum(leaf.nbytes for leaf in state),  # as it was and as it will be
    }


def activations(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, beside parameters and inputs."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers(), x, y)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(module(x), y)  # which holds on to what is packed
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in known)


def by_chunk(found: dict[Case, dict[str, float]]) -> list[Row]:
    """The growth from one chunk size to the next, a client."""
    rows: list[Row] = []
    for a, b in pairwise(found):
        if a.model == b.model:
            grown = (found[b]["peak"] - found[a]["peak"]) / (b.chunk - a.chunk)
            parts = {part: found[b][part] for part in PARTS}
            rows.append({"model": a.model, "from": a.chunk, "to": b.chunk, "a_client": grown,
                         "ratio": grown / sum(parts.values()), "parts": parts})  # fmt: skip
    return rows


def by_cohort(found: dict[Case, dict[str, float]]) -> list[Row]:
    """The peak of each cohort."""
    first: dict[str, float] = {}
    return [
        {"model": case.model, "cohort": case.cohort, "peak": numbers["peak"],
         "ratio": numbers["peak"] / first.setdefault(case.model, numbers["peak"])}
        for case, numbers in found.items()
    ]  # fmt: skip


CHUNKS = (
    Column("model", lambda row: row["model"]),
    Column("chunk", lambda row: f"{row['from']} → {row['to']}"),
    Column("MB a client", lambda row: number(row["a_client"] / MB)),
    Column("of its parts", lambda row: f"{row['ratio']:.2f}"),
    *(Column(part, lambda row, part=part: number(row["parts"][part] / MB)) for part in PARTS),
)
COHORTS = (
    Column("model", lambda row: row["model"]),
    Column("cohort", lambda row: f"{row['cohort']:,}"),
    Column("MB", lambda row: number(row["peak"] / MB)),
    Column("of the first's", lambda row: f"{row['ratio']:.2f}"),
)


def section(found: dict[str, Any]) -> str:
    """The report's section."""
    case = found["case"]
    return "\n".join([
        "## Memory of a round",
        "",
        f"{case['algorithm']}, batches of {case['batch']} images, {case['steps']} local steps, under vmap. By how much "
        "a round's peak grows with each client of a chunk, beside the sum of the client's parts (MB); a model of its "
        "own, a gradient, the message, a minibatch, what the forward pass keeps, its state before and after:",
        "",
        *markdown(CHUNKS, found["chunks"]),
        "",
        f"A round in chunks of {case['chunk']}, by its cohort:",
        "",
        *markdown(COHORTS, found["cohorts"]),
    ])  # fmt: skip


def main(
    models: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model"])] = ("softmax", "mlp", "cnn"),
    chunks: tuple[int, ...] = (1, 8, 64),
    cohorts: tuple[int, ...] = (100, 500, 1000),
    case: Case = Case(),
    repeats: int = 1,
    json: Path | None = None,
    here: bool = False,
) -> None:
    """Measures the memory that a client of a chunk takes, and that of a cohort.

    Args:
        models: The models.
        chunks: Chunk sizes, ascending, all with the same cohort.
        cohorts: Cohort sizes, all with the case's chunk.
        case: The setting, but for these.
        repeats: Runs of each setting, in turn; the medians are shown.
        json: The file to write the numbers to.
        here: Measure the case alone, in this process, and print JSON.
    """
    if here:
        print(json_.dumps(measure(case)))
        return
    _check(chunks, cohorts, case, repeats)
    cohort = case.cohort or min(3 * chunks[-1], case.population)
    grown = [replace(case, model=model, chunk=chunk, cohort=cohort) for model in models for chunk in chunks]
    varied = [replace(case, model=model, cohort=size) for model in models for size in cohorts]
    runs: dict[Case, list[dict[str, float]]] = {setting: [] for setting in (*grown, *varied)}
    for turn in range(1, repeats + 1):
        for setting, each in runs.items():
            each.append(measured_apart(setting))
            said = f"chunk {setting.chunk}, cohort {setting.cohort}: {number(each[-1]['peak'] / MB)} MB"
            Console(stderr=True).print(f"{turn}/{repeats} {setting.model}, {said}", highlight=False)
    found = {s: {key: statistics.median(run[key] for run in each) for key in each[0]} for s, each in runs.items()}
    by_size, by_count = by_chunk({s: found[s] for s in grown}), by_cohort({s: found[s] for s in varied})
    Console().print(terminal(CHUNKS[:4], by_size, "memory of a client of a chunk"))
    Console().print(terminal(COHORTS, by_count, f"memory of a round in chunks of {case.chunk}"))
    if json is not None:
        raw = [asdict(s) | run for s, each in runs.items() for run in each]
        save(result("memory", case=asdict(case), chunks=by_size, cohorts=by_count, runs=raw), json)


def measured_apart(case: Case) -> dict[str, float]:
    """`measure` in a process of its own. Raises UsageError where it fails."""
    arguments = [f"--case.{name}={value}" for name, value in asdict(case).items()]
    return apart(["-m", "benchmarks.memory", "--here", *arguments], case, **HANDED_BACK)


def _check(chunks: Sequence[int], cohorts: Sequence[int], case: Case, repeats: int) -> None:
    if len(chunks) < 2 or any(a >= b for a, b in pairwise(chunks)) or chunks[0] < 1:
        raise UsageError(f"chunks must be two or more ascending sizes from 1, not {' '.join(map(str, chunks))}")
    if max(*cohorts, chunks[-1]) > case.population:
        raise UsageError(f"no chunk or cohort can be above the population, {case.population}")
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, not {repeats}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.memory: {error}", file=sys.stderr)
        sys.exit(2)
