"""Figure 4 of FL_PyTorch (Burlachenko, Horváth & Richtárik, arXiv 2202.03099): MARINA on CIFAR-10 by ResNet-18.

    python scripts/fl_pytorch_fig4.py --data-root FOLDER_OF_CIFAR10 --out FOLDER

As in the paper: CIFAR-10 split uniformly over 100 clients, 25 of them a round, ResNet-18, 200 rounds, τ-nice gradients
with τ of 10 %, 50 % and all of a client's examples, the Bernoulli (lazy) compressor with probability 0.1 and 0.6.

Without a GPU, or with `--reduced True`, the setting is REDUCED, and named so on the plot and in the table: images
averaged to 8×8, an MLP with one hidden layer of 64, 50 rounds. Its numbers say nothing about ResNet-18.

Chosen here, since they are not known to be the paper's: γ = `step`/(1 + √((1 − p)ω/(25p))), MARINA's theorem with
`step` for 1/L and the cohort for all clients, p = 1/(1 + ω); one local step a round; group norm in ResNet-18; no
augmentation; the quantities drawn, test accuracy and test loss every fifth round; the number of seeds, which are those
of cohorts, minibatches, compressor and coin, while split and initial model stay.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from reproduction import Curve, Panel, bits, draw, save
from rich.console import Console
from rich.table import Table
from torch.nn.functional import avg_pool2d

import vfl
from algorithms.marina import Marina
from vfl.data import Dataset, Examples
from vfl.engine import RoundMetrics

CLIENTS, COHORT = 100, 25
BATCHES = ("10%", "50%", "all")
PROBABILITIES = (0.1, 0.6)


class Setting(NamedTuple):
    """What is trained for how long."""

    name: str
    model: str
    rounds: int
    pixels: int  # of an image's side
    step: float
    seeds: int


FULL = Setting("ResNet-18", "resnet18", 200, 32, 0.1, 1)
REDUCED = Setting("REDUCED: MLP on 8×8 images", "mlp:64", 50, 8, 0.5, 3)


def shrunk(dataset: Dataset, pixels: int) -> Dataset:
    """The data set with images [M, 3, h, h] averaged to [M, 3, pixels, pixels]."""

    def smaller(examples: Examples) -> Examples:
        return Examples(avg_pool2d(examples.x.float(), examples.x.shape[-1] // pixels), examples.y)

    test = None if dataset.test is None else smaller(dataset.test)
    return dataset._replace(train=smaller(dataset.train), test=test)


def curve(setting: Setting, dataset: Dataset, probability: float, batch: str) -> list[RoundMetrics]:
    """The rounds of one line."""
    data = vfl.data.federate(dataset, partition="iid", clients=CLIENTS, seed=0)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = vfl.models.model(setting.model, tuple(data.clients.x.shape[1:]), data.classes)
    p, omega = probability, 1 / probability - 1
    gamma = setting.step / (1 + math.sqrt((1 - p) * omega / (COHORT * p)))
    return vfl.simulate(
        Marina(compressor=f"bernoulli:{probability}", server_lr=gamma), vfl.task(module, device=device), data,
        setting.rounds, clients_per_round=COHORT, batch_size=batch, draw="nice", local_steps=1,
        replicas=setting.seeds if setting.seeds > 1 else None, evaluation=vfl.Evaluation(every=5),
    ).history  # fmt: skip


def main(
    out: Path = Path("runs/fl_pytorch_fig4"),
    reduced: bool | None = None,
    rounds: int | None = None,
    seeds: int | None = None,
    step: float | None = None,
    data_root: Path | None = None,
) -> None:
    """Plays Figure 4: out/fig4.png, fig4.pdf and fig4.json.

    Args:
        out: Folder of the plot and the numbers.
        reduced: The setting for a CPU; by default where there is no GPU.
        rounds: Communication rounds; by default 200, reduced 50.
        seeds: Realisations; by default 1, reduced 3.
        step: For 1/L in the step size; by default 0.1, reduced 0.5.
        data_root: Folder of the data sets; by default $VFL_DATA, then the user's cache folder.
    """
    setting = REDUCED if (not torch.cuda.is_available() if reduced is None else reduced) else FULL
    given = {"rounds": rounds, "seeds": seeds, "step": step}
    setting = setting._replace(**{name: value for name, value in given.items() if value is not None})
    dataset = vfl.data.load("cifar10", data_root)
    if setting.pixels < dataset.train.x.shape[-1]:
        dataset = shrunk(dataset, setting.pixels)
    curves = []
    table = Table("Bernoulli", "τ", "test accuracy", "test loss", "bits from all clients")
    table.title = f"MARINA, {setting.name}, {setting.rounds} rounds, {setting.seeds} seed(s)"
    for probability in PROBABILITIES:
        for n, batch in enumerate(BATCHES):
            rows = curve(setting, dataset, probability, batch)
            curves.append(
                Curve(f"Bernoulli {probability}, τ = {batch}", rows, n, dashed=probability == min(PROBABILITIES))
            )
            last = rows[-1]
            accuracy, loss = (
                f"{last[name]:.{digits}} ± {last.get(f'{name}_std', 0.0):.{digits}}"
                for name, digits in (("test_accuracy", "1%"), ("test_loss", "3f"))
            )
            table.add_row(str(probability), batch, accuracy, loss, bits(last["bits_up"]))
    panels = [Panel(setting.name, name, curves, log=False) for name in ("test_accuracy", "test_loss")]
    draw(panels, f"MARINA on CIFAR-10, {setting.name}, mean ± std of {setting.seeds} seed(s)", out / "fig4")
    save(panels[:1], setting._asdict(), out / "fig4.json")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
