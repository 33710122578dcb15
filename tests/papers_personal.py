"""The references of the personalized methods, as those of papers.py: plain numpy loops from the papers."""

from typing import Any

import numpy as np
from helpers import ALGORITHMS, CLASSES, FEATURES, SIZES, N, Numbers, round_keys
from papers import ROUNDS, Array, Cohorts, gradient, local_model

import vfl
from algorithms.feddf import public_inputs

FEDDF = [name for name in ALGORITHMS if name.startswith("feddf")]
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


def feddf(config: Any, cohort: Cohorts, x: Array, models: bool, adam: bool) -> Numbers:
    """Lin et al. 2006.07242, Algorithms 1 and 3; the minibatches of the public inputs are the engine's."""
    public = public_inputs(config.public, config.public_examples).x.double().numpy()
    up = down = 0
    for t in range(ROUNDS):
        clients = cohort(t)
        y = {i: local_model(x, b, config.local_lr, lambda g, y: g) for i, b in clients.items() if b}
        teacher = softmax(sum(logits(y_i, public) for y_i in y.values()) / len(y))
        x = mean_of(y) if models else x
        m, v = np.zeros_like(x), np.zeros_like(x)
        for k in range(config.distill_steps):
            draw = vfl.random.split(vfl.random.fold_in(round_keys(7, t)[2], k))[0]
            rows = vfl.random.choice(draw, len(public), min(config.distill_batch_size, len(public))).numpy()
            r = softmax(logits(x, public[rows])) - teacher[rows]  # ∂KL(p ‖ q)/∂logits = q − p
            g = np.concatenate([(r.T @ public[rows]).ravel(), r.sum(0)]) / len(rows)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            u = m / (1 - 0.9 ** (k + 1)) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
            x = x - config.distill_lr * (u if adam else g)
        up += len(y) * (models * x.size + len(public) * CLASSES) * BITS
        down += len(clients) * x.size * BITS
    return {"server.x": x, "server.t": ROUNDS, "client.ids": [], "bits_up": up, "bits_down": down}


def logits(x: Array, inputs: Array) -> Array:
    """Softmax regression's outputs."""
    return inputs @ x[: CLASSES * FEATURES].reshape(CLASSES, FEATURES).T + x[CLASSES * FEATURES :]


def softmax(z: Array) -> Array:
    """Probabilities of the rows."""
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


REFERENCES = {
    FEDDF[0]: lambda config, cohort, x: feddf(config, cohort, x, models=True, adam=False),
    FEDDF[1]: lambda config, cohort, x: feddf(config, cohort, x, models=False, adam=config.distill_optimizer == "adam"),
    "fedper-personal=*bias": lambda config, cohort, x: partial(config, cohort, x, BIAS),
    "fedbn-personal=*bias": lambda config, cohort, x: partial(config, cohort, x, BIAS),
    "lgfedavg-personal=*,!*bias": lambda config, cohort, x: partial(config, cohort, x, ~BIAS),
    "fedrep-personal=*bias-head_passes=2": lambda config, cohort, x: fedrep(config, cohort, x, BIAS, 2),
    "ditto-lam=0.5": lambda config, cohort, x: ditto(config, cohort, x, 0.5),
    "apfl-alpha=0.3-alpha_lr=0.02": apfl,
}
