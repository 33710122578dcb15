"""The references of the personalized methods, as those of papers.py: plain numpy loops from the papers."""

from typing import Any

import numpy as np
from helpers import CLASSES, FEATURES, SIZES, N, Numbers
from papers import ROUNDS, Array, Cohorts, gradient, local_model

BITS = 64  # of a number
BIAS = np.arange(CLASSES * FEATURES + CLASSES) >= CLASSES * FEATURES  # of softmax regression's x [D]


def mean_of(models: dict[int, Array]) -> Array:
    """Σ nᵢ yᵢ / Σ nᵢ."""
    return sum(SIZES[i] * y for i, y in models.items()) / sum(SIZES[i] for i in models)


def partial(config: Any, cohort: Cohorts, x: Array, own: Array) -> Numbers:
    """Arivazhagan et al. 1912.00818, Algorithms 1 and 2, with W_P the entries `own` [D], W_B the others."""
    W_B, W_P = x[~own], dict.fromkeys(range(N), x[own])
    up = down = 0
    seen: set[int] = set()
    for t in range(ROUNDS):
        clients, sent = cohort(t), {}
        for i, batches in clients.items():
            if batches:
                y = np.empty_like(x)
                y[own], y[~own] = W_P[i], W_B
                y = local_model(y, batches, config.local_lr, lambda g, y: g)
                W_P[i], sent[i] = y[own], y[~own]
        W_B = mean_of(sent)
        seen |= set(sent)
        up, down = up + len(sent) * W_B.size * BITS, down + len(clients) * W_B.size * BITS
    return _numbers(x, W_B, W_P, own, seen, up, down)


def fedrep(config: Any, cohort: Cohorts, x: Array, own: Array, passes: int) -> Numbers:
    """Collins et al. 2102.07078, Algorithm 1: GRD steps of h at the φ sent, then of φ at the new h."""
    phi, h = x[~own], dict.fromkeys(range(N), x[own])
    up = down = 0
    seen: set[int] = set()

    def whole(h_i: Array, phi_i: Array) -> Array:
        y = np.empty_like(x)
        y[own], y[~own] = h_i, phi_i
        return y

    for t in range(ROUNDS):
        clients, sent = cohort(t), {}
        for i, batches in clients.items():
            if batches:
                for rows in batches * passes:
                    h[i] = h[i] - config.local_lr * gradient(whole(h[i], phi), rows)[own]
                sent[i] = phi
                for rows in batches:
                    sent[i] = sent[i] - config.local_lr * gradient(whole(h[i], sent[i]), rows)[~own]
        phi = mean_of(sent)
        seen |= set(sent)
        up, down = up + len(sent) * phi.size * BITS, down + len(clients) * phi.size * BITS
    return _numbers(x, phi, h, own, seen, up, down)


def _numbers(x: Array, shared: Array, personal: dict[int, Array], own: Array, seen: set, up: int, down: int) -> Numbers:
    final = x.copy()
    final[~own] = shared
    ids = sorted(seen)
    return {"server.x": final, "server.t": ROUNDS, "client.ids": ids, "client.0": np.stack([personal[i] for i in ids]),
            "bits_up": up, "bits_down": down}  # fmt: skip


def ditto(config: Any, cohort: Cohorts, x: Array, lam: float) -> Numbers:
    """Li et al. 2012.04221, Algorithm 1, with FedAvg for the global model."""
    v = dict.fromkeys(range(N), x)
    up = down = 0
    seen: set[int] = set()
    for t in range(ROUNDS):
        clients = cohort(t)
        w, models = x, {}
        for i, batches in clients.items():
            if batches:
                models[i] = local_model(w, batches, config.local_lr, lambda g, y: g)
                for rows in batches:
                    v[i] = v[i] - config.local_lr * (gradient(v[i], rows) + lam * (v[i] - w))
        x = mean_of(models)
        seen |= set(models)
        up, down = up + len(models) * x.size * BITS, down + len(clients) * x.size * BITS
    ids = sorted(seen)
    return {"server.x": x, "server.t": ROUNDS, "client.ids": ids, "client.0": np.stack([v[i] for i in ids]),
            "bits_up": up, "bits_down": down}  # fmt: skip


def apfl(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Deng et al. 2003.13461, Algorithm 1, with the step of α in every local step."""
    eta, v, alpha = config.local_lr, dict.fromkeys(range(N), x), dict.fromkeys(range(N), config.alpha)
    up = down = 0
    seen: set[int] = set()
    for t in range(ROUNDS):
        clients, models = cohort(t), {}
        for i, batches in clients.items():
            w = x
            for rows in batches:
                v_bar = alpha[i] * v[i] + (1 - alpha[i]) * w
                g = gradient(v_bar, rows)
                new_alpha = alpha[i] - config.alpha_lr * (v[i] - w) @ g
                v[i] = v[i] - eta * alpha[i] * g
                w = w - eta * gradient(w, rows)
                alpha[i] = min(max(new_alpha, 0.0), 1.0)
            if batches:
                models[i] = w
        x = mean_of(models)
        seen |= set(models)
        up, down = up + len(models) * x.size * BITS, down + len(clients) * x.size * BITS
    ids = sorted(seen)
    assert len({alpha[i] for i in ids}) > 2, "α has hardly moved"
    return {"server.x": x, "server.t": ROUNDS, "client.ids": ids, "client.0": np.stack([v[i] for i in ids]),
            "client.1": np.array([alpha[i] for i in ids]), "bits_up": up, "bits_down": down}  # fmt: skip


REFERENCES = {
    "fedper-personal=*bias": lambda config, cohort, x: partial(config, cohort, x, BIAS),
    "fedbn-personal=*bias": lambda config, cohort, x: partial(config, cohort, x, BIAS),
    "lgfedavg-personal=*,!*bias": lambda config, cohort, x: partial(config, cohort, x, ~BIAS),
    "fedrep-personal=*bias-head_passes=2": lambda config, cohort, x: fedrep(config, cohort, x, BIAS, 2),
    "ditto-lam=0.5": lambda config, cohort, x: ditto(config, cohort, x, 0.5),
    "apfl-alpha=0.3-alpha_lr=0.02": apfl,
}
