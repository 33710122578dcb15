"""What unlabelled examples are worth: FedLabels beside FedAvg on the labelled examples alone, on the embedded digits.

    python scripts/few_labels.py --seeds 3

Every line takes as many local steps, at each of two step sizes; FedAvg on all labels is what more labels would bring.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import vfl
from algorithms.fedavg import FedAvg
from algorithms.fedlabels import FedLabels

CLIENTS, COHORT = 20, 10
STEPS, BATCH = 20, 20
RATES = (0.1, 0.3)
EVERY = 5  # rounds between evaluations; a run's accuracy is the mean of its last three


def labelled_part(data: vfl.data.FederatedData, share: float, seed: int = 0) -> vfl.data.FederatedData:
    """The data without the examples that are unlabelled to FedLabels of this share and label seed."""
    key, offsets, kept = vfl.random.key(seed), data.clients.offsets.tolist(), []
    for first, end in itertools.pairwise(offsets):
        order = vfl.random.fold_in(vfl.random.fold_in(key, end - first), torch.arange(end - first)).argsort().numpy()
        kept.append(first + np.sort(order[: math.ceil(share * (end - first) - 1e-9)]))
    starts = np.cumsum([0, *map(len, kept)])
    return data._replace(clients=data.clients.take(np.concatenate(kept), starts))


def accuracy(config: vfl.AlgorithmConfig, data: vfl.data.FederatedData, seed: int, rounds: int) -> float:
    """A run's test accuracy in percent."""
    torch.manual_seed(seed)
    task = vfl.task(vfl.models.model("mlp:64", tuple(data.clients.x.shape[1:]), data.classes))
    played = vfl.simulate(
        config,
        task,
        data,
        rounds,
        seed=seed,
        clients_per_round=COHORT,
        local_steps=STEPS,
        batch_size=BATCH,
        evaluation=vfl.Evaluation(EVERY),
        execution="vmap",
    )
    return 100 * float(np.mean([row["test_accuracy"] for row in played.history if "test_accuracy" in row][-3:]))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n − 1)."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main(seeds: int = 3, rounds: int = 40, labelled: float = 0.1, burn_in: int = 0) -> dict[str, list[list[float]]]:
    """Prints the table; returns the accuracies in percent of each line, by step size and seed.

    Args:
        seeds: Runs of each line; each has a split and a model of its own.
        rounds: Communication rounds of a run.
        labelled: Share of each client's examples that are labelled.
        burn_in: Rounds at the start in which FedLabels has no pseudo-labels yet.
    """
    split = [vfl.data.federated("digits", partition="iid", clients=CLIENTS, seed=s) for s in range(seeds)]
    few = [labelled_part(data, labelled) for data in split]
    found: dict[str, list[list[float]]] = {"fedavg, labelled part": [], "fedlabels": [], "fedavg, all labels": []}
    for lr in RATES:
        plain = FedAvg(local_lr=lr, weighting="uniform")
        semi = FedLabels(local_lr=lr, labelled=labelled, burn_in=burn_in)
        for name, config, versions in zip(found, (plain, semi, plain), (few, split, split), strict=True):
            found[name].append([accuracy(config, data, seed, rounds) for seed, data in enumerate(versions)])
    title = f"{labelled:.0%} of each client's digits labelled: test accuracy, %"
    table = Table("", *(f"η = {lr:g}" for lr in RATES), title=title)
    for name, by_rate in found.items():
        table.add_row(name, *map(spread, by_rate))
    Console().print(table)
    return found


if __name__ == "__main__":
    tyro.cli(main)
