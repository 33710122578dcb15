"""Each algorithm once more, from its paper, as plain numpy loops over clients: the references of test_algorithms.py.

A reference shares with the engine the data order alone: the cohorts, and which rows a client's minibatches hold. It
takes (the algorithm's options, round from 0 → cohort, x⁰ [D]) and returns what the run ends with, by name.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from helpers import CLASSES, FEATURES, SIZES, N, Numbers, federated, round_keys
from torch import Tensor

import vfl
from vfl.local import minibatches

ROUNDS = 50
DATA = federated().clients
OFFSETS = DATA.offsets.tolist()
Array = np.ndarray


def gradient(x: Array, rows: Array) -> Array:
    """∇ [D] of softmax regression's mean cross-entropy on some rows; x [D] is W [classes, features] and b [classes]."""
    inputs, labels = DATA.x.numpy()[rows], DATA.y.numpy()[rows]
    W, b = x[: CLASSES * FEATURES].reshape(CLASSES, FEATURES), x[CLASSES * FEATURES :]
    e = np.exp(inputs @ W.T + b)
    r = e / e.sum(1, keepdims=True) - np.eye(CLASSES)[labels]
    return np.concatenate([(r.T @ inputs).ravel(), r.sum(0)]) / len(rows)


def own_rows(i: int) -> Array:
    """The rows of client i."""
    return np.arange(OFFSETS[i], OFFSETS[i + 1])


Cohort = dict[int, list[Array]]
"""The clients of a round, and the rows of each one's minibatches; no minibatch for a client without data."""

Cohorts = Callable[[int], Cohort]
"""Round t from 0 → its cohort."""


def client_key(seed: int, t: int, i: int) -> Tensor:
    """The engine's key [] of client i in round t: its minibatches draw from it folded with 0, the algorithm with 2."""
    return vfl.random.fold_in(round_keys(seed, t)[1], i)


def drawn(seed: int, t: int, clients: Iterable[int], work: vfl.Work) -> Cohort:
    """The minibatches that the engine draws for these clients in round t."""
    found: Cohort = {}
    for i in clients:
        key = vfl.random.fold_in(client_key(seed, t, i), 0)
        plan = minibatches(work, key[None], DATA.offsets[[i]], DATA.sizes()[[i]])
        pairs = zip(plan.rows[0], plan.mask[0], strict=True)
        found[i] = [rows[mask].numpy() for rows, mask in pairs if mask.any()]
    return found


def local_model(x: Array, batches: list[Array], lr: float, corrected: Callable[[Array, Array], Array]) -> Array:
    """The model after gradient steps on these minibatches, each along `corrected(gradient, model)`."""
    y = x
    for rows in batches:
        y = y - lr * corrected(gradient(y, rows), y)
    return y


Step = Callable[[Array, Array], tuple[Array, dict[str, Array]]]
"""(mean change Δ [D], x [D]) → new x, and the optimizer's memory by name."""


def averaging(config: Any, cohort: Cohorts, x: Array, step: Step, mu: float = 0.0) -> Numbers:
    """FedAvg and its kin: the server steps along Σ nᵢ Δᵢ / Σ nᵢ; clients descend g + μ (y − x)."""
    up = down = 0
    memory: dict[str, Array] = {}
    for t in range(ROUNDS):
        clients = cohort(t)
        total, weight = np.zeros_like(x), 0
        for i, batches in clients.items():
            if batches:
                y = local_model(x, batches, config.local_lr, lambda g, y, x=x: g + mu * (y - x))
                total, weight, up = total + SIZES[i] * (y - x), weight + SIZES[i], up + x.size * 64
        down += len(clients) * x.size * 64
        x, memory = step(total / weight, x)
    server = {f"server.{name}": value for name, value in memory.items()}
    return {"server.x": x, "server.t": ROUNDS, "client.ids": [], "bits_up": up, "bits_down": down} | server


def fedavg(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """McMahan et al. 1602.05629, Algorithm 1."""
    return averaging(config, cohort, x, lambda delta, x: (x + delta, {}))


def fedprox(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Li et al. 1812.06127, Algorithm 2."""
    return averaging(config, cohort, x, lambda delta, x: (x + delta, {}), mu=0.5)


def fedavgm(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Hsu et al. 1909.06335, section 4.3: v ← βv + Δ, x ← x − v with Δ = x − mean of the models, β = 0.9."""
    v = np.zeros_like(x)

    def step(delta: Array, x: Array) -> tuple[Array, dict[str, Array]]:
        nonlocal v
        v = 0.9 * v - delta
        return x - v, {"opt.m": v}

    return averaging(config, cohort, x, step)


def adaptive(config: Any, cohort: Cohorts, x: Array, b1: float, second: Callable[[Array, Array], Array]) -> Numbers:
    """Reddi et al. 2003.00295, Algorithm 2: m ← β₁m + (1−β₁)Δ, x ← x + η m / (√v + τ), with τ = 1e-3 and v₋₁ = τ²."""
    m, v, tau = np.zeros_like(x), np.full_like(x, 1e-3**2), 1e-3

    def step(delta: Array, x: Array) -> tuple[Array, dict[str, Array]]:
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * delta, second(v, delta)
        memory = {"opt.m": -m, "opt.v": v} if b1 else {"opt.v": v}  # ours is the mean of the gradient −Δ
        return x + config.server_lr * m / (np.sqrt(v) + tau), memory

    return averaging(config, cohort, x, step)


def fedadagrad(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """v ← v + Δ², with β₁ = 0 as in the paper's experiments."""
    return adaptive(config, cohort, x, 0, lambda v, delta: v + delta**2)


def fedyogi(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """v ← v − (1−β₂) Δ² sign(v − Δ²), β₂ = 0.99."""
    return adaptive(config, cohort, x, 0.9, lambda v, delta: v - 0.01 * delta**2 * np.sign(v - delta**2))


def fedadam(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """v ← β₂v + (1−β₂) Δ², β₂ = 0.99."""
    return adaptive(config, cohort, x, 0.9, lambda v, delta: 0.99 * v + 0.01 * delta**2)


def scaffold(config: Any, cohort: Cohorts, x: Array, option: int) -> Numbers:
    """Karimireddy et al. 1910.06378, Algorithm 1, with γ = 1."""
    eta, up, down = config.local_lr, 0, 0
    c, c_i = np.zeros_like(x), {i: np.zeros_like(x) for i in range(N)}
    seen: set[int] = set()
    for t in range(ROUNDS):
        clients = cohort(t)
        working = [i for i, batches in clients.items() if batches]
        dy, dc = np.zeros_like(x), np.zeros_like(x)
        for i in working:
            y = local_model(x, clients[i], eta, lambda g, y, c=c, i=i: g - c_i[i] + c)
            K = len(clients[i])
            new = gradient(x, own_rows(i)) if option == 1 else c_i[i] - c + (x - y) / (K * eta)
            dy, dc = dy + (y - x) / len(working), dc + (new - c_i[i]) / len(working)
            c_i[i] = new
        x, c = x + dy, c + len(working) / N * dc
        seen |= set(working)
        up, down = up + len(working) * 2 * x.size * 64, down + len(clients) * 2 * x.size * 64
    ids = sorted(seen)
    return {"server.x": x, "server.c": c, "server.t": ROUNDS, "client.ids": ids,
            "client.0": np.stack([c_i[i] for i in ids]), "bits_up": up, "bits_down": down}  # fmt: skip


REFERENCES = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedprox-mu=0.5": fedprox,
    "scaffold-option=1": lambda config, cohort, x: scaffold(config, cohort, x, 1),
    "scaffold-option=2": lambda config, cohort, x: scaffold(config, cohort, x, 2),
}
