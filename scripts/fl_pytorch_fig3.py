"""Figure 3 of FL_PyTorch (Burlachenko, Horváth & Richtárik, arXiv 2202.03099): local steps in DIANA and MARINA.

    python scripts/fl_pytorch_fig3.py --out FOLDER

As in the paper: a quadratic with D = 20, μ = 1 and L = 5, 10 clients who all take part, the Bernoulli (lazy) compressor
with probability 0.8, K = 1 and 5 local steps, mean ± standard deviation of ‖∇f‖ over 10 realisations, against rounds
and against bits.

Chosen here, since they are not known to be the paper's: 100 rounds; 12 examples a client; full local gradients; the
step sizes γ of the theorems (algorithms/diana.py and marina.py), times K, since the paper's message (x − y)/η holds the
sum of K gradients where ours holds their mean; local steps of η = γ/K; a realisation is a seed of the compressor and of
MARINA's coin, while the problem stays; the model starts at 0. DIANA's local steps are corrected by h − hᵢ; MARINA's are
plain gradient steps, as the method here has no such correction. The problem comes twice: with one minimiser for all
clients, as FL_PyTorch's published generator makes it, and with minimisers of their own, where plain local steps end
elsewhere than at f's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import tyro
from reproduction import Curve, Panel, bits, draw, first, save
from rich.console import Console
from rich.table import Table

import vfl
from algorithms.diana import Diana
from algorithms.marina import Marina
from vfl.engine import RoundMetrics

PROBLEMS = {"one minimiser": 0.0, "own minimisers": 1.0}  # title → spread of the clients' minimisers
METHODS = {
    "DIANA": Diana(compressor="bernoulli:0.8", local_direction="corrected"),
    "MARINA": Marina(compressor="bernoulli:0.8"),
}
LOCAL_STEPS = (1, 5)
TARGET = 1e-3  # of the table


def curve(method: Diana | Marina, spread: float, K: int, rounds: int, seeds: int) -> list[RoundMetrics]:
    """The method's rounds with K local steps."""
    data = vfl.data.federated(f"quadratic:dim=20,L=5,mu=1,spread={spread}", clients=10, seed=0)
    problem = vfl.LinearProblem(data)
    task = problem.task(torch.float64)
    gamma = method.step_size(problem.smoothness, task, data.clients.population)
    return vfl.simulate(
        dataclasses.replace(method, server_lr=K * gamma, local_lr=gamma / K), task, data, rounds,
        clients_per_round="all", batch_size=None, local_steps=K, execution="vmap",
        replicas=seeds, evaluation=vfl.Evaluation(metrics=("grad_norm",)),
    ).history  # fmt: skip


def main(out: Path = Path("runs/fl_pytorch_fig3"), rounds: int = 100, seeds: int = 10) -> None:
    """Plays Figure 3: out/fig3.png, fig3.pdf and fig3.json.

    Args:
        out: Folder of the plot and the numbers.
        rounds: Communication rounds.
        seeds: Realisations.
    """
    console, panels = Console(), []
    table = Table("problem", "method", "K", "last ‖∇f‖", f"rounds to {TARGET:g}", "bits to it")
    for title, spread in PROBLEMS.items():
        curves = []
        for n, (name, method) in enumerate(METHODS.items()):
            for K in LOCAL_STEPS:
                rows = curve(method, spread, K, rounds, seeds)
                curves.append(Curve(f"{name}, K = {K}", rows, n, dashed=K == 1))
                last, there = rows[-1], first(rows, "grad_norm", TARGET)
                reached = (str(there["round"]), bits(there["bits_up"])) if there else ("–", "–")
                table.add_row(title, name, str(K), f"{last['grad_norm']:.1e} ± {last['grad_norm_std']:.0e}", *reached)
        panels.append(Panel(title, "grad_norm", curves))
    draw(panels, f"DIANA and MARINA, Bernoulli 0.8, mean ± std of {seeds} seeds", out / "fig3")
    save(panels, {"rounds": rounds, "seeds": seeds}, out / "fig3.json")
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
