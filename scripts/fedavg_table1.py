"""Reproduces a line of Table 1 of the FedAvg paper (McMahan et al., arXiv 1602.05629): rounds to 97 % on MNIST.

The 2NN (784-200-200-10), 100 clients of 600 examples, C = 0.1, E = 1, B = 10, on the iid and the 2-shard split; the
best local rate of a small grid, as the paper does. The paper needs 87 rounds (iid) and 664 (non-iid).

    python scripts/fedavg_table1.py --data-root FOLDER_OF_MNIST
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

import vfl
from algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class Split:
    """One half of the line."""

    partition: str
    paper: int  # rounds the paper needed
    limit: int  # rounds after which a rate is given up


SPLITS = (Split("iid", 87, 130), Split("shards:2", 664, 900))


def rounds_to_target(
    split: Split, rate: float, seed: int, target: float, root: Path | None
) -> tuple[int | None, float]:
    """Rounds until the test accuracy first reaches the target (None: not within the limit), and the best accuracy."""
    data = vfl.data.federated("mnist", partition=split.partition, clients=100, seed=seed, root=root)
    torch.manual_seed(seed)
    task = vfl.task(vfl.models.model("mlp:200,200", (1, 28, 28), 10))
    best = 0.0
    play = vfl.rounds(FedAvg(local_lr=rate), task, data, split.limit, clients_per_round=0.1, batch_size=10, seed=seed)
    try:
        for state, metrics in play:
            best = max(best, metrics["test_accuracy"])
            if best >= target:
                return state.round, best
    except vfl.DivergedError as error:  # a rate too large for this split
        print(f"{split.partition}, rate {rate:g}: {error}", flush=True)
    return None, best


def main(
    rates: tuple[float, ...] = (0.05, 0.1, 0.2),
    seed: int = 0,
    target: float = 0.97,
    data_root: Path | None = None,
) -> None:
    """Rounds to the target accuracy for each split and local rate.

    Args:
        rates: Local step sizes η to try.
        seed: Seed of the split, the model and the cohorts.
        target: Test accuracy to reach.
        data_root: Folder of the data sets; by default $VFL_DATA, then the user's cache folder.
    """
    table = Table("split", "local rate", "rounds", "best accuracy", "paper's rounds", title=f"rounds to {target:.0%}")
    for split in SPLITS:
        for rate in rates:
            rounds, best = rounds_to_target(split, rate, seed, target, data_root)
            shown = str(rounds) if rounds else f"> {split.limit}"
            table.add_row(split.partition, f"{rate:g}", shown, f"{best:.2%}", str(split.paper))
            print(f"{split.partition}, rate {rate:g}: {shown} rounds, best {best:.2%}", flush=True)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
