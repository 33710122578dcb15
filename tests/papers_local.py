"""The references of the local-update family beyond FedAvg, as those of papers.py: plain numpy loops from the papers."""

from typing import Any

import numpy as np
from helpers import SIZES, N, Numbers
from papers import ROUNDS, Array, Cohorts, gradient, local_model

BITS = 64  # of a number


def fednova(config: Any, cohort: Cohorts, x: Array, rho: float, mu: float, by_steps: bool) -> Numbers:
    """Wang et al. 2007.07481: x ← x − τ_eff Σ pᵢ η dᵢ with dᵢ = Gᵢ aᵢ / ‖aᵢ‖₁, and their closed forms of ‖aᵢ‖₁."""
    eta, up, down = config.local_lr, 0, 0
    alpha = eta * mu
    for t in range(ROUNDS):
        clients = cohort(t)
        total = sum(SIZES[i] for i in clients)
        direction, tau_eff = np.zeros_like(x), 0.0
        for i, batches in clients.items():
            if not batches:
                continue
            K, m, y = len(batches), np.zeros_like(x), x
            if rho:
                for rows in batches:
                    m = rho * m + gradient(y, rows)
                    y = y - eta * m
                norm = (K - rho * (1 - rho**K) / (1 - rho)) / (1 - rho)
            else:
                y = local_model(x, batches, eta, lambda g, y, x=x: g + mu * (y - x))
                norm = (1 - (1 - alpha) ** K) / alpha if mu else K
            eta_d = (x - y) / norm
            direction += SIZES[i] / total * eta_d
            tau_eff += SIZES[i] / total * (K if by_steps else norm)
            up += (x.size + 1) * BITS
        down += len(clients) * x.size * BITS
        x = x - tau_eff * direction
    return {"server.x": x, "server.t": ROUNDS, "client.ids": [], "bits_up": up, "bits_down": down}


def feddyn(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Acar et al. 2111.04263, Algorithm 1, with θ the model, grad[i] its ∇Lᵢ(θᵢ), and local steps for the argmin."""
    alpha, theta, up, down = config.alpha, x, 0, 0
    grad, h = {i: np.zeros_like(x) for i in range(N)}, np.zeros_like(x)
    seen: set[int] = set()
    for t in range(ROUNDS):
        clients = cohort(t)
        active = {}
        for i, batches in clients.items():
            if batches:
                active[i] = local_model(
                    theta, batches, config.local_lr, lambda g, y, i=i, theta=theta: g - grad[i] + alpha * (y - theta)
                )
                grad[i] = grad[i] - alpha * (active[i] - theta)
        h = h - alpha * (1 / N) * sum(theta_i - theta for theta_i in active.values())
        theta = sum(active.values()) / len(active) - h / alpha
        seen |= set(active)
        up, down = up + len(active) * x.size * BITS, down + len(clients) * x.size * BITS
    ids = sorted(seen)
    return {"server.x": theta, "server.h": h, "server.t": ROUNDS, "client.ids": ids,
            "client.0": np.stack([grad[i] for i in ids]), "bits_up": up, "bits_down": down}  # fmt: skip


REFERENCES = {
    "feddyn": feddyn,
    "fednova": lambda config, cohort, x: fednova(config, cohort, x, 0, 0, False),
    "fednova-local_optimizer=sgd:momentum=0.8": lambda config, cohort, x: fednova(config, cohort, x, 0.8, 0, False),
    "fednova-mu=0.5-tau_eff=steps": lambda config, cohort, x: fednova(config, cohort, x, 0, 0.5, True),
}
