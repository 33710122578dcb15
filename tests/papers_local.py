"""The references of the local-update family beyond FedAvg, as those of papers.py: plain numpy loops from the papers.

Beside the data order, these share the coins that the papers leave to chance.
"""

from typing import Any

import numpy as np
from helpers import CLASSES, FEATURES, SIZES, N, Numbers, round_keys
from papers import DATA, ROUNDS, Array, Cohorts, gradient, local_model, own_rows

import vfl

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


class BaseOptimizer:
    """Karimireddy et al. 2008.03606: an optimizer as an update U and the tracking V of its statistics m and v."""

    def __init__(self, config: Any, x: Array) -> None:
        self.momentum, self.scaled = config.base != "rmsprop", config.base != "sgd"
        self.b1, self.b2, self.eps = config.b1, config.b2, config.eps
        self.m, self.v = np.zeros_like(x), np.zeros_like(x)

    def update(self, g: Array) -> Array:
        u = (1 - self.b1) * g + self.b1 * self.m if self.momentum else g
        return u / (self.eps + np.sqrt(self.v)) if self.scaled else u

    def track(self, g: Array) -> None:
        self.m = (1 - self.b1) * g + self.b1 * self.m
        self.v = (1 - self.b2) * g**2 + self.b2 * self.v

    def numbers(self) -> Numbers:
        return ({"server.s.m": self.m} if self.momentum else {}) | ({"server.s.v": self.v} if self.scaled else {})


def mime(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Algorithm 1, Mime: c from the even rounds, local steps in the odd ones."""
    base, c, up, down = BaseOptimizer(config, x), np.zeros_like(x), 0, 0
    for t in range(ROUNDS):
        clients = cohort(t)
        working = {i: batches for i, batches in clients.items() if batches}
        up += len(working) * x.size * BITS
        if t % 2 == 0:
            c = sum(gradient(x, own_rows(i)) for i in working) / len(working)
            down += len(clients) * x.size * BITS
        else:
            models = []
            for batches in working.values():
                y = x
                for rows in batches:
                    y = y - config.local_lr * base.update(gradient(y, rows) - gradient(x, rows) + c)
                models.append(y)
            down += len(clients) * (2 + base.momentum + base.scaled) * x.size * BITS
            base.track(c)
            x = sum(models) / len(models)
    server = {"server.x": x, "server.c": c, "server.t": ROUNDS} | base.numbers()
    return server | {"client.ids": [], "bits_up": up, "bits_down": down}


def mimelite(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Algorithm 1, MimeLite."""
    base, up, down = BaseOptimizer(config, x), 0, 0
    for t in range(ROUNDS):
        clients = cohort(t)
        models, gradients = [], []
        for i, batches in clients.items():
            if batches:
                models.append(local_model(x, batches, config.local_lr, lambda g, y: base.update(g)))
                gradients.append(gradient(x, own_rows(i)))
        up += len(models) * 2 * x.size * BITS
        down += len(clients) * (1 + base.momentum + base.scaled) * x.size * BITS
        base.track(sum(gradients) / len(gradients))
        x = sum(models) / len(models)
    server = {"server.x": x, "server.t": ROUNDS} | base.numbers()
    return server | {"client.ids": [], "bits_up": up, "bits_down": down}


def fedexp(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Jhunjhunwala et al. 2301.09604, Algorithm 1, with γ = max(1, Σ ‖Δᵢ‖² / 2M (‖Δ̄‖² + ε)) over M clients."""
    up = down = 0
    for t in range(ROUNDS):
        clients = cohort(t)
        deltas = [x - local_model(x, b, config.local_lr, lambda g, y: g) for b in clients.values() if b]
        M, mean = len(deltas), sum(deltas) / len(deltas)
        gamma = max(1, sum(d @ d for d in deltas) / (2 * M * (mean @ mean + config.eps)))
        x = x - gamma * mean
        up, down = up + M * (x.size + 1) * BITS, down + len(clients) * x.size * BITS
    return {"server.x": x, "server.t": ROUNDS, "client.ids": [], "bits_up": up, "bits_down": down}


def mean_loss(x: Array, rows: Array) -> float:
    """Softmax regression's mean cross-entropy on some rows."""
    W, b = x[: CLASSES * FEATURES].reshape(CLASSES, FEATURES), x[CLASSES * FEATURES :]
    scores = DATA.x.numpy()[rows] @ W.T + b
    return float(np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(rows)), DATA.y.numpy()[rows]]))


def qfedavg(config: Any, cohort: Cohorts, x: Array, q: float, L: float) -> Numbers:
    """Li et al. 1905.10497, Algorithm 2, for uniform draws: the sums over the sampled devices are weighed by nᵢ."""
    up = down = 0
    for t in range(ROUNDS):
        clients = cohort(t)
        delta, h = np.zeros_like(x), 0.0
        for i, batches in clients.items():
            if batches:
                F = mean_loss(x, own_rows(i))
                dw = L * (x - local_model(x, batches, config.local_lr, lambda g, y: g))
                delta += SIZES[i] * F**q * dw
                h += SIZES[i] * (q * F ** (q - 1) * (dw @ dw) + L * F**q)
                up += (x.size + 1) * BITS
        x = x - delta / h
        down += len(clients) * x.size * BITS
    return {"server.x": x, "server.t": ROUNDS, "client.ids": [], "bits_up": up, "bits_down": down}


def server_coin(t: int, p: float) -> bool:
    """Whether round t of a run with seed 7 communicates."""
    return bool(vfl.random.bernoulli(round_keys(7, t)[3], p, ()))


def client_coin(t: int, i: int, q: float) -> bool:
    """Client i's coin in round t of a run with seed 7."""
    key = vfl.random.fold_in(round_keys(7, t)[1], i)
    return bool(vfl.random.bernoulli(vfl.random.fold_in(key, 2), q, ()))


def scaffnew(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Mishchenko et al. 2202.09357, Algorithm 2. Who is away in a communication counts at the average of the last one.

    The clients are those that have come so far. Our clients report x̂ᵢ of their last step, and hᵢ − (p/γ) x.
    """
    gamma, p, up, down, count, news = config.local_lr, config.p, 0, 0, 0, True
    X: dict[int, Array] = {}
    h: dict[int, Array] = {}
    hat: dict[int, Array] = {}
    heard: dict[int, int] = {}
    for t in range(ROUNDS):
        clients = cohort(t)
        working = [i for i, batches in clients.items() if batches]
        for i in working:
            X.setdefault(i, x)
            h.setdefault(i, np.zeros_like(x))
            hat[i] = X[i] - gamma * (gradient(X[i], clients[i][0]) - h[i])
            heard[i] = count
        down += news * len(clients) * x.size * BITS
        news = server_coin(t, p) or len(working) < len(X)
        if server_coin(t, p):
            counted = {i: hat[i] if i in working else x for i in X}
            x = sum(counted.values()) / len(X)
            for i in X:
                h[i] = h[i] + p / gamma * (x - counted[i])
                X[i] = x
            count, up = count + 1, up + len(working) * x.size * BITS
        else:
            X |= {i: hat[i] for i in working}
    ids = sorted(X)
    server = {"server.x": x, "server.n": count, "server.seen": len(X), "server.news": news}
    states = {"client.0": [hat[i] for i in ids], "client.1": [h[i] - p / gamma * x for i in ids],
              "client.2": [heard[i] for i in ids]}  # fmt: skip
    return server | {k: np.array(v) for k, v in states.items()} | {"client.ids": ids, "bits_up": up, "bits_down": down}


def gradskip(config: Any, cohort: Cohorts, x: Array) -> Numbers:
    """Maranjyan et al. 2210.16402, Algorithm 1; where a client has not moved, its gradient is the one it has."""
    gamma, p, up, down, count, news = config.local_lr, config.p, 0, 0, 0, True
    X: dict[int, Array] = {}
    h: dict[int, Array] = {}
    at_average: dict[int, Array] = {}  # hᵢ after the last communication
    hat: dict[int, tuple[Array, Array]] = {}
    known: dict[int, Array] = {}  # the gradient at X[i]
    heard: dict[int, int] = {}
    rests: dict[int, bool] = {}
    for t in range(ROUNDS):
        clients = cohort(t)
        working = [i for i, batches in clients.items() if batches]
        for i in working:
            if i not in X:
                X[i], h[i], at_average[i] = x, np.zeros_like(x), np.zeros_like(x)
            g = known[i] if i in known else gradient(X[i], clients[i][0])
            eta = client_coin(t, i, config.q)
            h_hat = eta * h[i] + (1 - eta) * g
            hat[i] = X[i] - gamma * (g - h_hat), h_hat
            rests[i] = i in known or not eta
            heard[i] = count
            if rests[i]:
                known[i] = g
        down += news * len(clients) * x.size * BITS
        news = server_coin(t, p) or len(working) < len(X)
        if server_coin(t, p):
            counted = {i: hat[i] if i in working else (x, at_average[i]) for i in X}
            x = sum(x_hat - gamma / p * h_hat for x_hat, h_hat in counted.values()) / len(X)
            for i, (x_hat, h_hat) in counted.items():
                h[i] = at_average[i] = h_hat + p / gamma * (x - x_hat)
                X[i] = x
            known = {}
            count, up = count + 1, up + len(working) * x.size * BITS
        else:
            for i in working:
                X[i], h[i] = hat[i]
    ids = sorted(X)
    server = {"server.x": x, "server.n": count, "server.seen": len(X), "server.news": news}
    states = {"client.0": [hat[i][0] for i in ids], "client.1": [hat[i][1] for i in ids],
              "client.2": [at_average[i] - p / gamma * x for i in ids], "client.3": [heard[i] for i in ids],
              "client.4": [rests[i] for i in ids]}  # fmt: skip
    return server | {k: np.array(v) for k, v in states.items()} | {"client.ids": ids, "bits_up": up, "bits_down": down}


REFERENCES = {
    "scaffnew-p=0.5": scaffnew,
    "gradskip-p=0.5-q=0.5": gradskip,
    "fedexp-eps=0.01": fedexp,
    "qfedavg": lambda config, cohort, x: qfedavg(config, cohort, x, 1, 10),
    "qfedavg-q=0.5-lipschitz=4.0": lambda config, cohort, x: qfedavg(config, cohort, x, 0.5, 4),
    "mime-base=sgd": mime,
    "mime-base=adam-local_lr=0.01": mime,
    "mimelite-base=sgd": mimelite,
    "mimelite-base=rmsprop-local_lr=0.01": mimelite,
    "feddyn": feddyn,
    "fednova": lambda config, cohort, x: fednova(config, cohort, x, 0, 0, False),
    "fednova-local_optimizer=sgd:momentum=0.8": lambda config, cohort, x: fednova(config, cohort, x, 0.8, 0, False),
    "fednova-mu=0.5-tau_eff=steps": lambda config, cohort, x: fednova(config, cohort, x, 0, 0.5, True),
}
