"""Compressed-gradient methods side by side: rounds and bits until the gradient vanishes, and the time of a round.

    python scripts/compressed_methods.py converge --out FOLDER
    python scripts/compressed_methods.py converge --steps theory --seeds 1    # 60,000 rounds: some ten minutes
    python scripts/compressed_methods.py round-time
    torchrun --nproc-per-node 2 scripts/compressed_methods.py round-time    # the clients shared out to two ranks

`converge`: the quadratic with D = 50, μ = 1 and L = 20, 20 clients of 12 examples with minimisers of their own; rand-k
with k = 20 % of D, top-k for EF21; full local gradients, the model starts at 0, a seed is one of the compressors and of
MARINA's coin. The step size γ is `stated` in the table below, or that of `theory` (each algorithm's `step_size`). All
clients take part, but with stated steps 10 a round for COFIG, which with all of them is DIANA.

`round-time`: one DIANA round with rand-k, 1,000 clients of 12 examples, D = 1,000, full local gradients, all
in float32. The published FL_PyTorch needs 3.0 s for it on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from reproduction import Curve, Panel, bits, draw, first, save
from rich.console import Console
from rich.table import Table

import vfl
from algorithms.cofig import Cofig
from algorithms.dcgd import DCGD
from algorithms.diana import Diana
from algorithms.ef21 import EF21
from algorithms.frecon import Frecon
from algorithms.marina import Marina
from vfl.distributed import Ranks, launched
from vfl.engine import RoundMetrics

CLIENTS = 20
Config = DCGD | Diana | EF21 | Frecon | Marina  # COFIG is a Diana
GOAL, DIGITS = 1e-8, (1e-2, 1e-5, 1e-8)  # a linear rate takes as many rounds between the first two as the last two
FL_PYTORCH = 3.0  # seconds a round


class Method(NamedTuple):
    """A line of the table."""

    config: Config
    step: float  # γL, stated
    clients: int  # a round, with that step


METHODS = {
    "DIANA": Method(Diana(), 1.0, CLIENTS),
    "MARINA": Method(Marina(), 1.0, CLIENTS),
    "EF21": Method(EF21(), 1.5, CLIENTS),
    "FRECON": Method(Frecon(), 1.2, CLIENTS),
    "COFIG": Method(Cofig(), 0.5, 10),
    "DCGD": Method(DCGD(), 0.8, CLIENTS),
}


def play(
    config: Config, data: vfl.data.FederatedData, clients: int, rounds: int, every: int, seeds: int
) -> list[RoundMetrics]:
    """The evaluated rounds, until all seeds have reached the goal."""
    kept: list[RoundMetrics] = []
    played = vfl.rounds(
        config, vfl.LinearProblem(data).task(torch.float64), data, rounds, clients_per_round=clients, batch_size=None,
        execution="vmap", replicas=seeds, evaluation=vfl.Evaluation(every, metrics=("grad_norm",)),
    )  # fmt: skip
    for _, row in played:
        if "grad_norm" in row:
            kept.append(row)
            if max(replica["grad_norm"] for replica in row["replicas"]) <= GOAL:
                break
    return kept


def line(name: str, step: float, clients: int, rows: list[RoundMetrics]) -> list[str]:
    """A method's row of the table."""
    there, *at = [first(rows, "grad_norm", target) for target in (1e-6, *DIGITS)]
    decades = [f"{(b['round'] - a['round']) / 3:.1f}" if a and b else "–" for a, b in itertools.pairwise(at)]
    reached = (str(there["round"]), bits(there["bits_up"])) if there else ("–", "–")
    last = at[-1]
    least = min(row["grad_norm"] for row in rows)
    return [name, str(clients), f"{step:.3g}", *reached, str(last["round"]) if last else "–", *decades, f"{least:.0e}"]


def converge(
    out: Path = Path("runs/compressed_methods"),
    steps: Literal["stated", "theory"] = "stated",
    rounds: int | None = None,
    seeds: int = 3,
    methods: tuple[str, ...] = tuple(METHODS),
) -> None:
    """Rounds and bits to ‖∇f‖ ≤ 1e-6 and 1e-8 of each method: out/methods.png, methods.pdf and methods.json.

    Args:
        out: Folder of the plot and the numbers.
        steps: Step sizes: stated, or those of the methods' theorems.
        rounds: Most rounds a method gets; by default 1,500, and 30,000 with theory's.
        seeds: Realisations.
        methods: Which of them.
    """
    data = vfl.data.federated("quadratic:dim=50,L=20,mu=1", clients=CLIENTS, seed=0)
    problem, curves = vfl.LinearProblem(data), []
    constants, task = problem.smoothness, problem.task(torch.float64)
    theory = steps == "theory"
    most, every = (30_000, 25) if theory else (1_500, 2)
    table = Table("method", "|S|", "γL", "to 1e-6", "bits", "to 1e-8", "early", "late", "least ‖∇f‖")
    table.caption = "rounds and bits until ‖∇f‖ is that small; rounds a decade, early (1e-2 to 1e-5) and late (to 1e-8)"
    for n, name in enumerate(methods):
        config, step, clients = METHODS[name]
        gamma = config.step_size(constants, task, CLIENTS) if theory else step / constants.L
        config, clients = dataclasses.replace(config, server_lr=gamma), CLIENTS if theory else clients
        # What stalls does so at once, and need not be watched for as long.
        limit = min(most, 1_000) if name == "DCGD" else most
        rows = play(config, data, clients, limit if rounds is None else rounds, every, seeds)
        curves.append(Curve(name, rows, n))
        table.add_row(*line(name, gamma * constants.L, clients, rows))
    panel = Panel(f"D = 50, κ = 20, {CLIENTS} clients, step sizes: {steps}", "grad_norm", curves)
    draw([panel], f"Compressed methods, mean ± std of {seeds} seeds", out / "methods")
    save([panel], {"steps": steps, "seeds": seeds, "constants": constants._asdict()}, out / "methods.json")
    Console().print(table)


def round_time(
    clients: int = 1_000,
    dim: int = 1_000,
    compressor: str = "rand_k:0.2",
    rounds: int = 30,
    execution: Literal["auto", "vmap", "compile"] = "auto",
    chunk: str = "auto",
    profile: bool = False,
) -> None:
    """Seconds of one DIANA round, median and least, beside FL_PyTorch's.

    Args:
        clients: N, all in every round.
        dim: D.
        compressor: C.
        rounds: Rounds that are measured, after ten that are not.
        execution: How clients are computed.
        chunk: Clients at once.
        profile: Also prints where the Python time of these rounds goes.
    """
    with launched(torch.device("cpu")) as ranks:
        measure(clients, dim, compressor, rounds, execution, chunk, profile, ranks)


def measure(
    clients: int,
    dim: int,
    compressor: str,
    rounds: int,
    execution: Literal["auto", "vmap", "compile"],
    chunk: str,
    profile: bool,
    ranks: Ranks,
) -> None:
    """`round_time` on one of the ranks; the first one prints."""
    data = vfl.data.federated(f"quadratic:dim={dim},L=2,mu=1", clients=clients, seed=0)
    x, y, offsets = data.clients
    data = data._replace(clients=vfl.data.Packed(x.float(), y.float(), offsets))
    played = vfl.rounds(
        Diana(compressor=compressor), vfl.LinearProblem(data).task(), data, 10 + rounds, clients_per_round="all",
        batch_size=None, execution=execution, chunk=chunk, evaluation=vfl.Evaluation(0),
        ranks=ranks,
    )  # fmt: skip
    for _ in range(10):
        next(played)
    started, worked = time.perf_counter(), time.process_time()
    if profile:
        import cProfile

        with cProfile.Profile() as profiler:
            rows = [row for _, row in played]
        profiler.print_stats("tottime")
    else:
        rows = [row for _, row in played]
    if not ranks.first:
        return
    whole, work = (time.perf_counter() - started) / rounds, (time.process_time() - worked) / rounds
    seconds = np.array([row["seconds"] for row in rows])
    table = Table("", "seconds", "FL_PyTorch's 3.0 s are")
    # On a machine that others use too, the processors' own time says more than the clock.
    times = {
        "median": np.median(seconds),
        "least": seconds.min(),
        "mean, loop included": whole,
        "processors' own": work,
    }
    for name, value in times.items():
        table.add_row(name, f"{value:.4f}", f"{FL_PYTORCH / value:.0f} times as long")
    table.title = f"a DIANA round, {clients} clients, D = {dim}, {compressor}, {rows[-1]['execution']}"
    table.caption = f"{ranks.world} rank(s), {torch.get_num_threads()} thread(s), chunk {rows[-1]['chunk']}"
    Console().print(table)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"converge": converge, "round-time": round_time})
