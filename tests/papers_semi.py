"""The reference of FedLabels, as those of papers.py: plain numpy loops over single examples, from its definition.

Beside the data order, it shares two draws: the hashes that say which examples are labelled, and the views' noise.
"""

import math
from typing import Any

import numpy as np
import torch
from helpers import ALGORITHMS, CLASSES, FEATURES, SIZES, Numbers
from papers import DATA, ROUNDS, Array, Cohort, Cohorts, client_key, drawn, gradient, own_rows

import vfl

BITS = 64  # of a number
SEED = 7  # of the run


def probabilities(x: Array, a: Array) -> Array:
    """Softmax regression's probabilities [classes] of one input a [features]."""
    W, b = x[: CLASSES * FEATURES].reshape(CLASSES, FEATURES), x[CLASSES * FEATURES :]
    e = np.exp(W @ a + b)
    return e / e.sum()


def pull(u: Array, a: Array, target: Array) -> Array:
    """∇ [D] of −Σ target log softmax u(a): of the cross-entropy for a unit vector, of KL(target ‖ ·) for any other."""
    r = probabilities(u, a) - target
    return np.concatenate([np.outer(r, a).ravel(), r])


def labelled_rows(i: int, share: float) -> set[int]:
    """The ⌈share · n⌉ rows of client i that the hashes put first."""
    rows = own_rows(i)
    key = vfl.random.fold_in(vfl.random.key(0), len(rows))
    hashes = vfl.random.fold_in(key, torch.arange(len(rows))).numpy()
    return set(rows[np.argsort(hashes)[: math.ceil(share * len(rows) - 1e-9)]].tolist())


def noise(t: int, i: int, k: int, size: int) -> Array:
    """The standard normal draws [size, features] of the view of client i's minibatch k."""
    minibatch = vfl.random.fold_in(vfl.random.fold_in(client_key(SEED, t, i), 1), k)
    key = vfl.random.split(vfl.random.fold_in(minibatch, 0xF1AB), 5)[2]
    return vfl.random.normal(key, (size, FEATURES), torch.float64).numpy()


def in_the_engines_order(t: int, clients: Cohort) -> Cohort:
    """Noise belongs to places in a minibatch, so the order of examples counts even where it holds all of them."""
    if all(len(rows) == SIZES[i] for i, batches in clients.items() for rows in batches):
        return drawn(SEED, t, clients, vfl.Work(None, steps=max(map(len, clients.values()))))
    return clients


def fedlabels(config: Any, cohort: Cohorts, x: Array, rounds: int = ROUNDS) -> Numbers:
    """x ← x + ½ mean (w − x) + ½ Σ m (u − x) / Σ m; the pseudo-labels as in FLUTE's strategy of this name."""
    lr, up, down = config.local_lr, 0, 0
    seen = set()  # what happened to unlabelled examples
    for t in range(rounds):
        clients = in_the_engines_order(t, cohort(t))
        down += len(clients) * x.size * BITS
        supervised, unsupervised, weights, counts = [], [], [], []
        for i, batches in clients.items():
            if not batches:
                continue
            known, w, u, m = labelled_rows(i, config.labelled), x, x, 0
            for rows in batches:
                mine = np.array([row for row in rows if row in known])
                if len(mine):
                    w = w - lr * gradient(w, mine)
            for k, rows in enumerate(batches):
                drawn_noise, kept, agreeing = config.noise * noise(t, i, k, len(rows)), [], []
                for row, epsilon in zip(rows, drawn_noise, strict=True):
                    if row in known or t < config.burn_in:
                        continue
                    a = DATA.x.numpy()[row]
                    at_x, at_w = probabilities(x, a), probabilities(w, a)
                    by_global = at_x.var(ddof=1) >= at_w.var(ddof=1)
                    p = at_x if by_global else at_w
                    if p.max() <= config.threshold:
                        seen.add("left out")
                        continue
                    seen.add("by the global model" if by_global else "by the local model")
                    kept.append(pull(u, a + epsilon, np.eye(CLASSES)[p.argmax()]))
                    if at_x.argmax() == at_w.argmax():
                        agreeing.append(p.var(ddof=1) * pull(u, a, at_w))
                    else:
                        seen.add("disputed")
                if kept:
                    g = sum(kept) / len(kept) + config.l2 * (u - x)
                    u = u - lr * (g + config.consistency * sum(agreeing) / max(len(agreeing), 1))
                    m += len(kept)
            supervised.append(w - x)
            unsupervised.append(u - x)
            weights.append(SIZES[i] if config.weighting == "examples" else 1)
            counts.append(m)
            up += (2 * x.size + 1) * BITS
        delta = np.average(supervised, axis=0, weights=weights)
        if sum(counts):
            delta = (delta + np.average(unsupervised, axis=0, weights=counts)) / 2
        x = x + delta
    if rounds == ROUNDS:
        assert seen == {"left out", "by the global model", "by the local model", "disputed"}, seen
    return {"server.x": x, "server.t": rounds, "client.ids": [], "bits_up": up, "bits_down": down}


REFERENCES = {name: fedlabels for name in ALGORITHMS if name.startswith("fedlabels")}
