"""Figure 2 of FL_PyTorch (Burlachenko, Horváth & Richtárik, arXiv 2202.03099): SCAFFOLD with compressed messages.

    python scripts/fl_pytorch_fig2.py --out FOLDER

As in the paper: a quadratic with D = 20, μ = 1 and L = 2, 10 clients who all take part in 100 rounds, rand-k with k of
100, 40 and 20 % of D, K = 1 and 5 local steps, and mean ± standard deviation of ‖∇f‖ over 10 realisations, against
rounds and against bits.

Chosen here, since they are not known to be the paper's: 12 examples a client; full local gradients; the local step size
η = `step`/L_max, the same for all curves (several `--step`: each curve shows its best one), and server step size 1; a
realisation is a seed of the compressor, while the problem stays; the model starts at 0; option II. Compressed are both
Δy and Δc, and cᵢ moves by C(Δc)/(1 + ω) on both sides (algorithms/scaffold.py). The problem comes twice: with one
minimiser for all clients, as FL_PyTorch's published generator makes it, and with minimisers of their own, where a
wrong control variate would show.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from reproduction import Curve, Panel, bits, draw, first, save
from rich.console import Console
from rich.table import Table

import vfl
from algorithms.scaffold import Scaffold
from vfl.engine import RoundMetrics
from vfl.replicas import by_setting

PROBLEMS = {"one minimiser": 0.0, "own minimisers": 1.0}  # title → spread of the clients' minimisers
SHARES = ("100%", "40%", "20%")
LOCAL_STEPS = (1, 5)
TARGET = 1e-3  # of the table


def curve(spread: float, K: int, share: str, step: tuple[float, ...], rounds: int, seeds: int) -> list[RoundMetrics]:
    """The rounds of SCAFFOLD with the best of the step sizes."""
    data = vfl.data.federated(f"quadratic:dim=20,L=2,mu=1,spread={spread}", clients=10, seed=0)
    problem = vfl.LinearProblem(data)
    grid = {"local_lr": tuple(s / problem.smoothness.L_max for s in step)}
    played = vfl.simulate(
        Scaffold(compressor=f"rand_k:{share}"), problem.task(torch.float64), data, rounds,
        clients_per_round="all", batch_size=None, local_steps=K, execution="vmap",
        replicas=vfl.Replication(seeds, grid), evaluation=vfl.Evaluation(metrics=("grad_norm",)),
    )  # fmt: skip
    each = by_setting(played.history, ["local_lr"])
    return min(each.values(), key=lambda rows: rows[-1]["grad_norm"])


def main(
    out: Path = Path("runs/fl_pytorch_fig2"), rounds: int = 100, seeds: int = 10, step: tuple[float, ...] = (0.2,)
) -> None:
    """Plays Figure 2: out/fig2.png, fig2.pdf and fig2.json.

    Args:
        out: Folder of the plot and the numbers.
        rounds: Communication rounds.
        seeds: Realisations.
        step: Local step sizes in units of 1/L_max; of several, each curve shows the one with the least last ‖∇f‖.
    """
    console, panels = Console(), []
    table = Table("problem", "K", "rand-k", "last ‖∇f‖", f"rounds to {TARGET:g}", "bits to it")
    for title, spread in PROBLEMS.items():
        curves = []
        for K in LOCAL_STEPS:
            for n, share in enumerate(SHARES):
                rows = curve(spread, K, share, step, rounds, seeds)
                curves.append(Curve(f"K = {K}, rand-k {share}", rows, n, dashed=K == 1))
                last, there = rows[-1], first(rows, "grad_norm", TARGET)
                reached = (str(there["round"]), bits(there["bits_up"])) if there else ("–", "–")
                table.add_row(title, str(K), share, f"{last['grad_norm']:.1e} ± {last['grad_norm_std']:.0e}", *reached)
        panels.append(Panel(title, "grad_norm", curves))
    draw(panels, f"SCAFFOLD with compressed messages, mean ± std of {seeds} seeds", out / "fig2")
    save(panels, {"rounds": rounds, "seeds": seeds, "step": step}, out / "fig2.json")
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
