"""The compressed-gradient methods once more, from their papers, as plain numpy loops: references as in papers.py.

They share with the engine the data order and the compressors' draws. Each takes (the algorithm's options, its run) and
returns what the run ends with, by name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers import CLASSES, FEATURES, SIZES, N, Numbers, round_keys
from papers import Array, Cohort, client_key, gradient, local_model, own_rows

import vfl

ROUNDS = 50
SHAPES = ((CLASSES, FEATURES), (CLASSES,))
FLOAT = 64


class Run(NamedTuple):
    """What the engine draws."""

    seed: int
    visits: Callable[[int, bool], Cohort]  # (round t from 0, whether everyone is asked) → who visits which rows
    x: Array  # [D] the initial model


def key(run: Run, t: int, i: int) -> torch.Tensor:
    """What client i's part of the algorithm draws from in round t."""
    return vfl.random.fold_in(client_key(run.seed, t, i), 2)


def compressor(spec: str) -> Callable[[Array, torch.Tensor], tuple[Array, float]]:
    """(v [D], key) → (C(v) [D], bits)."""
    c = vfl.compressor(spec, SHAPES, torch.float64)

    def compress(v: Array, key: torch.Tensor) -> tuple[Array, float]:
        value, bits = c.compress(torch.from_numpy(v), key)
        return value.numpy(), bits.item()

    return compress


def omega(config: Any) -> float:
    """ω of the options' compressor."""
    found = vfl.compressor(config.compressor, SHAPES, torch.float64).omega
    assert found is not None
    return found


def mean_gradient(x: Array, batches: list[Array], eta: float, correction: Array | float = 0.0) -> Array:
    """(x − y)/(Kη) less the correction, y the model after K steps along gradient + correction: the gradients' mean."""
    y, gradients = x, []
    for rows in batches:
        gradients.append(gradient(y, rows))
        y = y - eta * (gradients[-1] + correction)
    return np.mean(gradients, axis=0)


def working(cohort: Cohort) -> list[int]:
    """The clients with data."""
    return [i for i, batches in cohort.items() if batches]


def ends(ids: set[int], up: float, down: float, server: dict[str, Any], client: list[dict[int, Any]] | None) -> Numbers:
    """Names as the engine's."""
    found = {f"server.{name}": value for name, value in server.items()}
    seen = sorted(ids) if client else []
    rows = {f"client.{n}": np.stack([leaf[i] for i in seen]) for n, leaf in enumerate(client or [])}
    return found | rows | {"client.ids": seen, "bits_up": up, "bits_down": down}


def dcgd(config: Any, run: Run) -> Numbers:
    """x ← x − γ mean C(gᵢ)."""
    C, down_C, x = compressor(config.compressor), compressor(config.downlink), run.x
    up = down = 0.0
    for t in range(ROUNDS):
        cohort = run.visits(t, False)
        sent, size = down_C(x, vfl.random.fold_in(round_keys(run.seed, t)[3], 0))
        down += len(cohort) * size
        total = np.zeros_like(x)
        for i in working(cohort):
            c, bits = C(mean_gradient(sent, cohort[i], config.local_lr), vfl.random.fold_in(key(run, t, i), 0))
            total, up = total + c, up + bits
        x = x - config.server_lr * total / len(working(cohort))
    return ends(set(), up, down, {"x": x, "t": ROUNDS}, None)


def shifted(config: Any, run: Run, recursive: bool) -> Numbers:
    """DIANA, COFIG (1901.09269; 2112.13097, Algorithm 1) and FRECON (2112.13097, Algorithm 2), with h over all N."""
    C, w, eta, D = compressor(config.compressor), omega(config), config.local_lr, run.x.size
    a = 1 / (1 + w)
    x = previous = run.x
    h = g = np.zeros(D)
    shift, seen, held = {i: np.zeros(D) for i in range(N)}, set(), True
    up = down = 0.0
    for t in range(ROUNDS):
        cohort = run.visits(t, False)
        down += len(cohort) * D * FLOAT * (1 + config.corrected + (recursive and not held))
        us, qs, changes = [], [], []
        for i in working(cohort):
            correction = h - shift[i] if config.corrected else 0.0
            now = mean_gradient(x, cohort[i], eta, correction)
            k = key(run, t, i)
            if recursive:
                k, q_key = vfl.random.split(k).unbind()
                q, bits = C(now - mean_gradient(previous, cohort[i], eta, correction), q_key)
                qs, up = [*qs, q], up + bits
            if config.shifts == "gradient" and i not in seen:
                u, change, bits = now, now, D * FLOAT
            else:
                u, bits = C(now - shift[i], k)
                change = a * u
            us, changes, up = [*us, u], [*changes, change], up + bits
            shift[i] = shift[i] + change
            seen.add(i)
        estimate = h + np.mean(us, axis=0)
        if recursive:
            lam = len(us) / (2 * (1 + w) * N) if t else 1.0
            estimate = g = np.mean(qs, axis=0) + (1 - lam) * g + lam * estimate
        h = h + np.sum(changes, axis=0) / N
        x, previous, held = x - config.server_lr * estimate, x, len(us) == N
    state = {"x": x, "h": h, "t": ROUNDS} | ({"previous": previous, "g": g, "held": held} if recursive else {})
    started = [dict.fromkeys(range(N), True)] if config.shifts == "gradient" else []
    return ends(seen, up, down, state, [shift, *started])


def ef21(config: Any, run: Run) -> Numbers:
    """2106.05203, Algorithm 2; 2110.03294 for a sample: g is the mean of all N gᵢ."""
    C, D = compressor(config.compressor), run.x.size
    x, g_i, seen = run.x, {i: np.zeros(run.x.size) for i in range(N)}, set()
    up = down = 0.0
    for t in range(ROUNDS):
        cohort = run.visits(t, False)
        down += len(cohort) * D * FLOAT * (1 + config.corrected)
        g = np.mean(list(g_i.values()), axis=0)
        for i in working(cohort):
            correction = g - g_i[i] if config.corrected else 0.0
            now = mean_gradient(x, cohort[i], config.local_lr, correction)
            if config.shifts == "gradient" and i not in seen:
                c, bits = now, D * FLOAT
            else:
                c, bits = C(now - g_i[i], key(run, t, i))
            g_i[i], up = g_i[i] + c, up + bits
            seen.add(i)
        g = np.mean(list(g_i.values()), axis=0)
        x = x - config.server_lr * g
    started = [dict.fromkeys(range(N), True)] if config.shifts == "gradient" else []
    return ends(seen, up, down, {"x": x, "g": g, "t": ROUNDS}, [g_i, *started])


def marina(config: Any, run: Run, everyone: bool = False, whole: bool = False) -> Numbers:
    """2102.07845, Algorithms 1, 4 (everyone is asked to synchronize) and 2 (on whole data)."""
    C, D, eta = compressor(config.compressor), run.x.size, config.local_lr
    p = 1 / (1 + omega(config)) if config.p is None else config.p
    x, previous, g, sync, held = run.x, run.x, np.zeros(run.x.size), True, True
    up = down = 0.0
    syncs = 0
    for t in range(ROUNDS):
        cohort, came = run.visits(t, everyone and sync), []
        syncs += sync
        down += len(cohort) * D * FLOAT * (1 if sync or held else 2)
        for i in working(cohort):
            if sync:
                message, bits = gradient(x, own_rows(i)) if whole else mean_gradient(x, cohort[i], eta), D * FLOAT
            else:
                change = mean_gradient(x, cohort[i], eta) - mean_gradient(previous, cohort[i], eta)
                message, bits = C(change, vfl.random.fold_in(key(run, t, i), 0))
            came, up = [*came, message], up + bits
        g = np.mean(came, axis=0) + (0 if sync else g)
        x, previous = x - config.server_lr * g, x
        sync = bool(vfl.random.bernoulli(round_keys(run.seed, t)[2], p, ()))
        held = len(came) == N
    assert 2 < syncs < ROUNDS - 2
    state = {"x": x, "previous": previous, "g": g, "sync": sync, "held": held, "t": ROUNDS}
    return ends(set(), up, down, state, None)


def averaging(config: Any, run: Run) -> Numbers:
    """1602.05629 with C(Δ) in the place of Δ, and clients that start from C(x)."""
    C, down_C, x = compressor(config.compressor), compressor(config.downlink), run.x
    up = down = 0.0
    for t in range(ROUNDS):
        cohort, total, weight = run.visits(t, False), np.zeros_like(x), 0
        sent, size = down_C(x, vfl.random.fold_in(round_keys(run.seed, t)[3], 0))
        down += len(cohort) * size
        for i in working(cohort):
            delta = local_model(sent, cohort[i], config.local_lr, lambda g, y: g) - sent
            c, bits = C(delta, vfl.random.fold_in(key(run, t, i), 0))
            total, weight, up = total + SIZES[i] * c, weight + SIZES[i], up + bits
        x = x + total / weight
    return ends(set(), up, down, {"x": x, "t": ROUNDS}, None)


def scaffold(config: Any, run: Run) -> Numbers:
    """1910.06378 (option II) with C(Δy) and C(Δc) in the place of Δy and Δc, the latter taken by a = 1/(1 + ω) or 1."""
    C, down_C, x, eta = compressor(config.compressor), compressor(config.downlink), run.x, config.local_lr
    known = vfl.compressor(config.compressor, SHAPES, torch.float64).omega
    a = 1.0 if known is None else 1 / (1 + known)
    c_i, seen = {i: np.zeros_like(x) for i in range(N)}, set()
    up = down = 0.0
    for t in range(ROUNDS):
        cohort, c = run.visits(t, False), np.mean(list(c_i.values()), axis=0)
        sent_key = round_keys(run.seed, t)[3]
        sent_x, x_size = down_C(x, vfl.random.fold_in(sent_key, 0))
        sent_c, c_size = down_C(c, vfl.random.fold_in(sent_key, 1))
        down += len(cohort) * (x_size + c_size)
        dy = []
        for i in working(cohort):
            y = local_model(sent_x, cohort[i], eta, lambda g, y, i=i, sent_c=sent_c: g - c_i[i] + sent_c)
            new = c_i[i] - sent_c + (sent_x - y) / (len(cohort[i]) * eta)
            y_change, y_bits = C(y - sent_x, vfl.random.fold_in(key(run, t, i), 0))
            c_change, c_bits = C(new - c_i[i], vfl.random.fold_in(key(run, t, i), 1))
            dy, c_i[i], up = [*dy, y_change], c_i[i] + a * c_change, up + y_bits + c_bits
            seen.add(i)
        x = x + np.mean(dy, axis=0)
    return ends(seen, up, down, {"x": x, "c": np.mean(list(c_i.values()), axis=0), "t": ROUNDS}, [c_i])


REFERENCES: dict[str, Callable[[Any, Run], Numbers]] = {
    "dcgd": dcgd,
    "diana": lambda config, run: shifted(config, run, False),
    "cofig": lambda config, run: shifted(config, run, False),
    "frecon": lambda config, run: shifted(config, run, True),
    "ef21": ef21,
    "marina": marina,
    "ppmarina": lambda config, run: marina(config, run, everyone=True),
    "vrmarina": lambda config, run: marina(config, run, whole=True),
}
