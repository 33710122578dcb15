"""What aggregators are worth when a fifth of the clients do harm: two tables on the embedded digits, in two minutes.

First, the labels of some clients are shuffled: DGA, which weighs clients by exp(−β · training loss), beside FedAvg.
Then some clients send −scale times what they should: the mean beside the robust aggregators, each told how many.

    python scripts/robust_aggregation.py --seeds 5
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import vfl
from algorithms.dga import DGA
from algorithms.fedavg import FedAvg

Build = Callable[[vfl.Task, vfl.data.FederatedData, int], vfl.Algorithm]
"""(task, data, seed) → the algorithm."""

EVERY = 5  # rounds between evaluations; a run's accuracy is the mean of its last three


def accuracy(data: vfl.data.FederatedData, build: Build, seed: int, rounds: int, **work: Any) -> float:
    """A run's test accuracy in percent; `work` says how many clients do what in a round."""
    torch.manual_seed(seed)
    task = vfl.task(vfl.models.model("mlp:64", tuple(data.clients.x.shape[1:]), data.classes))
    played = vfl.simulate(
        build(task, data, seed),
        task,
        data,
        rounds,
        seed=seed,
        evaluation=vfl.Evaluation(EVERY),
        execution="vmap",
        **work,
    )
    return 100 * float(np.mean([row["test_accuracy"] for row in played.history if "test_accuracy" in row][-3:]))


def shuffled_labels(fraction: float, seeds: Sequence[int], rounds: int) -> Table:
    """FedAvg and DGA on 50 clients, 20 a round."""
    table = Table("algorithm", "labels", "accuracy, %", title=f"{fraction:.0%} of 50 clients with shuffled labels")
    algorithms = {"fedavg": FedAvg(), **{f"dga, β = {beta:g}": DGA(beta=beta) for beta in (1, 5, 20)}}
    for name, config, share in (("fedavg", FedAvg(), 0.0), *((name, c, fraction) for name, c in algorithms.items())):
        found = []
        for seed in seeds:
            clean = vfl.data.federated("digits", partition="iid", clients=50, seed=seed)
            data = vfl.corrupt_labels(clean, share, seed)
            work = {"clients_per_round": 20, "local_epochs": 5, "batch_size": 10}
            found.append(accuracy(data, lambda task, data, seed, c=config: c.build(task, 50), seed, rounds, **work))
        table.add_row(name, f"{share:.0%} shuffled" if share else "clean", spread(found))
    return table


def flipped_messages(fraction: float, scale: float, seeds: Sequence[int], rounds: int) -> Table:
    """FedAvg under each aggregator on 10 clients, all in every round."""
    title = f"{fraction:.0%} of 10 clients send −{scale:g} times their change"
    table = Table("aggregator", "all honest, %", "attacked, %", "attacked, less the clean mean", title=title)
    f = round(10 * fraction)
    specs = ("mean", "median", f"trimmed_mean:{f / 10:g}", f"krum:f={f}", f"multi_krum:f={f},m={10 - 2 * f}",
             "geometric_median", "norm_clip:0.4")  # fmt: skip
    reference = 0.0
    for spec in specs:
        config = FedAvg(aggregator=spec)

        def honest(task: vfl.Task, data: vfl.data.FederatedData, seed: int, c: FedAvg = config) -> vfl.Algorithm:
            return c.build(task, 10)

        def attacked(task: vfl.Task, data: vfl.data.FederatedData, seed: int, c: FedAvg = config) -> vfl.Algorithm:
            return vfl.sign_flipping(c.build(task, 10), data, fraction, seed, scale)

        found = []
        for build in (honest, attacked):
            split = [vfl.data.federated("digits", partition="iid", clients=10, seed=seed) for seed in seeds]
            work = {"clients_per_round": "all", "local_epochs": 1, "batch_size": 20}
            found.append([accuracy(d, build, s, rounds, **work) for d, s in zip(split, seeds, strict=True)])
        if spec == "mean":
            reference = float(np.mean(found[0]))
        table.add_row(spec, *map(spread, found), f"{np.mean(found[1]) - reference:+.1f}")
    return table


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n − 1)."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main(seeds: int = 5, rounds: int = 40, fraction: float = 0.2, scale: float = 5.0) -> None:
    """Prints both tables.

    Args:
        seeds: Runs of each line; each has a split, a model and adversaries of its own.
        rounds: Communication rounds of a run.
        fraction: Share of the clients that do harm.
        scale: How much longer than their own change a flipped message is.
    """
    console = Console()
    console.print(shuffled_labels(fraction, range(seeds), rounds))
    console.print(flipped_messages(fraction, scale, range(seeds), rounds))


if __name__ == "__main__":
    tyro.cli(main)
