"""The references of aggregators and of DGA, as those of papers.py: plain numpy float64 from the definitions."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from helpers import SIZES, Numbers
from papers import ROUNDS, Array, Cohorts, gradient, local_model
from papers_local import mean_loss

BITS = 64  # of a number

Rule = Callable[[Array, Array], Array]
"""(messages [S, D], weights [S]) → [D]."""


def mean(rows: Array, weight: Array) -> Array:
    return sum(w * v for w, v in zip(weight, rows, strict=True)) / sum(weight)


def median(rows: Array, weight: Array) -> Array:
    return np.median(rows, axis=0)


def trimmed_mean(rows: Array, weight: Array, share: float) -> Array:
    """Yin et al. 1803.01498, Definition 2."""
    cut = int(share * len(rows))
    return np.array([np.mean(sorted(column)[cut : len(rows) - cut]) for column in rows.T])


def multi_krum(rows: Array, weight: Array, f: int, m: int) -> Array:
    """Blanchard et al. 1703.02757, sections 3 and 4."""
    n = len(rows)
    scores = []
    for i in range(n):
        distances = sorted(float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(n) if j != i)
        scores.append(sum(distances[: n - f - 2]))
    best = sorted(range(n), key=lambda i: scores[i])[:m]
    return np.mean([rows[i] for i in best], axis=0)


def geometric_median(rows: Array, weight: Array, iterations: int, nu: float) -> Array:
    """Pillutla et al. 1912.13445, Algorithm 2, from the mean."""
    z = mean(rows, weight)
    for _ in range(iterations):
        beta = np.array([w / max(nu, np.linalg.norm(z - v)) for w, v in zip(weight, rows, strict=True)])
        z = mean(rows, beta)
    return z


def norm_clip(rows: Array, weight: Array, bound: float) -> Array:
    """Sun et al. 1911.07963: each message over max(1, ‖v‖/bound)."""
    return mean(np.stack([v / max(1, np.linalg.norm(v) / bound) for v in rows]), weight)


RULES: dict[str, Rule] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": lambda rows, weight: trimmed_mean(rows, weight, 0.1),
    "trimmed_mean:0.3": lambda rows, weight: trimmed_mean(rows, weight, 0.3),
    "krum:f=2": lambda rows, weight: multi_krum(rows, weight, 2, 1),
    "multi_krum:f=1,m=3": lambda rows, weight: multi_krum(rows, weight, 1, 3),
    "geometric_median": lambda rows, weight: geometric_median(rows, weight, 10, 1e-6),
    "geometric_median:iterations=3": lambda rows, weight: geometric_median(rows, weight, 3, 1e-6),
    "geometric_median:iterations=2,eps=0.5": lambda rows, weight: geometric_median(rows, weight, 2, 0.5),
    "norm_clip:0.2": lambda rows, weight: norm_clip(rows, weight, 0.2),
}


def aggregated(config: Any, cohort: Cohorts, x: Array, rule: Rule, rounds: int = ROUNDS) -> Numbers:
    """FedAvg whose server steps along the rule's value of the clients' changes."""
    up = down = 0
    for t in range(rounds):
        clients = cohort(t)
        working = {i: batches for i, batches in clients.items() if batches}
        changes = [local_model(x, batches, config.local_lr, lambda g, y: g) - x for batches in working.values()]
        x = x + rule(np.stack(changes), np.array([SIZES[i] for i in working], dtype=float))
        up, down = up + len(working) * x.size * BITS, down + len(clients) * x.size * BITS
    return {"server.x": x, "server.t": rounds, "client.ids": [], "bits_up": up, "bits_down": down}


def nearest_the_optimum(rows: Array, weight: Array, z: Array) -> bool:
    """Whether no small step from z makes Σ wᵢ ‖z − vᵢ‖ less by more than rounding."""

    def cost(point: Array) -> float:
        return float(sum(w * np.linalg.norm(point - v) for w, v in zip(weight, rows, strict=True)))

    steps = itertools.product((-1e-3, 1e-3), np.eye(len(z)))
    return all(cost(z) <= cost(z + size * direction) + 1e-12 for size, direction in steps)


def dga(
    config: Any,
    cohort: Cohorts,
    x: Array,
    rounds: int = ROUNDS,
    gradient: Callable[[Array, Array], Array] = gradient,
) -> Numbers:
    """Dimitriadis et al. 2106.07578: softmax of −β s over the cohort, s as FLUTE's sufficient statistics define it."""
    up = down = 0
    last = 0.0
    for t in range(rounds):
        clients = cohort(t)
        working = {i: batches for i, batches in clients.items() if batches}
        changes, s = [], []
        for batches in working.values():
            y, losses, visited, gradients = x, 0.0, 0, []
            for rows in batches:
                losses, visited = losses + mean_loss(y, rows) * len(rows), visited + len(rows)
                gradients.append(gradient(y, rows))
                y = y - config.local_lr * gradients[-1]
            entries = np.concatenate(gradients) if config.gradient == "steps" else x - y
            of = {"variance": np.var, "mean": np.mean, "rms": lambda g: np.sqrt(np.mean(g**2))}
            s.append(losses / visited if config.statistic == "loss" else of[config.statistic](entries))
            changes.append(y - x)
        e = np.exp(-config.beta * (np.array(s) - min(s)))
        weight = e / e.sum()
        x, last = x + weight @ np.stack(changes), weight @ s
        up, down = up + len(working) * (x.size + 1) * BITS, down + len(clients) * x.size * BITS
    return {"server.x": x, "server.t": rounds, "server.s": last, "client.ids": [], "bits_up": up, "bits_down": down}


REFERENCES = {
    "dga": dga,
    "dga-statistic=variance-beta=20.0": dga,
    "fedavg-aggregator=geometric_median:iterations=3": lambda config, cohort, x: aggregated(
        config, cohort, x, RULES[config.aggregator]
    ),
}
