"""Each algorithm against its paper, written once more in numpy as plain loops over clients, and its known behaviour.

A reference shares with the engine the data order alone: the cohorts, and which rows a client's minibatches hold.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import (
    ALGORITHMS,
    CLASSES,
    FEATURES,
    SIZES,
    Numbers,
    assert_same,
    federated,
    make_task,
    mlp,
    packed,
    regression,
    round_keys,
    run,
)
from torch import nn

import vfl
from algorithms.fedavg import FedAvg, FedAvgM
from algorithms.fedprox import FedProx
from algorithms.scaffold import Scaffold
from vfl.local import minibatches

N, ROUNDS = len(SIZES), 22
DATA = federated().clients
OFFSETS = DATA.offsets.tolist()
Array = np.ndarray


def gradient(x: Array, rows: Array) -> Array:
    """∇ [D] of the mean cross-entropy of softmax regression x [D] = (W [classes, features], b [classes]) on some rows."""
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


class Plan(NamedTuple):
    """Who visits what."""

    options: dict  # of the run
    cohort: Callable[[int], Cohort]  # round t from 0 → cohort


def whole_batches(t: int) -> Cohort:
    """Everyone takes 3 steps on all of its data: nothing is drawn."""
    return {i: [own_rows(i)] * 3 if SIZES[i] else [] for i in range(N)}


def drawn_batches(t: int) -> Cohort:
    """The engine's own draws: 5 clients, 2 epochs in batches of 4."""
    cohort_key, client_key, _, _ = round_keys(7, t)
    found: Cohort = {}
    for i in vfl.sampler("uniform", 5, DATA.offsets).draw(cohort_key).ids.tolist():
        key = vfl.random.fold_in(vfl.random.fold_in(client_key, i), 0)
        start, size = DATA.offsets[[i]], DATA.sizes()[[i]]
        plan = minibatches(vfl.Work(4, 2), key[None], start, size)
        pairs = zip(plan.rows[0], plan.mask[0], strict=True)
        found[i] = [rows[mask].numpy() for rows, mask in pairs] if SIZES[i] else []
    return found


PLANS = {
    "everyone-on-all-its-data": Plan(
        {"clients_per_round": "all", "batch_size": None, "local_steps": 3, "seed": 7}, whole_batches
    ),
    "five-in-minibatches": Plan(
        {"clients_per_round": 5, "batch_size": 4, "local_epochs": 2, "seed": 7}, drawn_batches
    ),
}


def test_the_drawn_minibatches_visit_every_example_of_a_client_once_an_epoch():
    for t in range(3):
        for i, batches in drawn_batches(t).items():
            visits = np.bincount(np.concatenate([np.array([], dtype=int), *batches]), minlength=OFFSETS[-1])
            assert (visits == np.isin(np.arange(OFFSETS[-1]), own_rows(i)) * 2).all()
            assert len(batches) == 2 * math.ceil(SIZES[i] / 4)


# The papers


def local_model(x: Array, batches: list[Array], lr: float, corrected: Callable[[Array, Array], Array]) -> Array:
    """The model after gradient steps on these minibatches, each along `corrected(gradient, model)`."""
    y = x
    for rows in batches:
        y = y - lr * corrected(gradient(y, rows), y)
    return y


Step = Callable[[int, Array, Array], tuple[Array, dict[str, Array]]]
"""(round from 0, mean change Δ [D], x [D]) → new x, and the optimizer's memory by name."""


def averaging(config, cohort: Callable[[int], Cohort], x: Array, step: Step, mu: float = 0.0) -> Numbers:
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
        x, memory = step(t, total / weight, x)
    server = {f"server.{name}": value for name, value in memory.items()}
    return {"server.x": x, "server.t": ROUNDS, "client.ids": [], "bits_up": up, "bits_down": down} | server


def fedavg(config, cohort, x):
    """McMahan et al. 1602.05629, Algorithm 1."""
    return averaging(config, cohort, x, lambda t, delta, x: (x + delta, {}))


def fedprox(config, cohort, x):
    """Li et al. 1812.06127, Algorithm 2."""
    return averaging(config, cohort, x, lambda t, delta, x: (x + delta, {}), mu=0.5)


def fedavgm(config, cohort, x):
    """Hsu et al. 1909.06335, section 4.3: v ← βv + Δ, x ← x − v with Δ = x − mean of the models, β = 0.9."""
    v = np.zeros_like(x)

    def step(t, delta, x):
        nonlocal v
        v = 0.9 * v - delta
        return x - v, {"opt.m": v}

    return averaging(config, cohort, x, step)


def adaptive(config, cohort, x, b1: float, second: Callable[[Array, Array], Array]) -> Numbers:
    """Reddi et al. 2003.00295, Algorithm 2: m ← β₁m + (1−β₁)Δ, x ← x + η m / (√v + τ), with τ = 1e-3 and v₋₁ = τ²."""
    m, v, tau = np.zeros_like(x), np.full_like(x, 1e-3**2), 1e-3

    def step(t, delta, x):
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * delta, second(v, delta)
        memory = {"opt.m": -m, "opt.v": v} if b1 else {"opt.v": v}  # ours is the mean of the gradient −Δ
        return x + config.server_lr * m / (np.sqrt(v) + tau), memory

    return averaging(config, cohort, x, step)


def fedadagrad(config, cohort, x):
    """v ← v + Δ², with β₁ = 0 as in the paper's experiments."""
    return adaptive(config, cohort, x, 0, lambda v, delta: v + delta**2)


def fedyogi(config, cohort, x):
    """v ← v − (1−β₂) Δ² sign(v − Δ²), β₂ = 0.99."""
    return adaptive(config, cohort, x, 0.9, lambda v, delta: v - 0.01 * delta**2 * np.sign(v - delta**2))


def fedadam(config, cohort, x):
    """v ← β₂v + (1−β₂) Δ², β₂ = 0.99."""
    return adaptive(config, cohort, x, 0.9, lambda v, delta: 0.99 * v + 0.01 * delta**2)


def scaffold(config, cohort, x, option: int) -> Numbers:
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


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_equals_its_paper_in_numpy(name, plan):
    task = regression()
    found = run(ALGORITHMS[name], task, federated(), ROUNDS, chunk=100, evaluation=vfl.Evaluation(0), **plan.options)
    wanted = REFERENCES[name](ALGORITHMS[name], plan.cohort, task.x.numpy())
    state = {key: value for key, value in found.items() if key.partition(".")[0] in ("server", "client")}
    state |= {key: found[f"metric.{key}"][-1] for key in ("bits_up", "bits_down")}
    assert np.abs(wanted["server.x"] - task.x.numpy()).max() > 0.1, "the model has hardly moved"
    assert_same(state, wanted, 1e-10)


# Behaviour known in closed form or from theory


DIMENSION, CLIENTS = 12, 10
ETA, K = 0.1, 10


class Quadratic(NamedTuple):
    """fᵢ(x) = ½ (x − bᵢ)ᵀ Hᵢ (x − bᵢ), the eigenvalues of Hᵢ from 1 to 2; every client has its own minimiser bᵢ."""

    data: vfl.data.FederatedData
    task: vfl.Task
    H: Array  # [N, D, D]
    b: Array  # [N, D]

    def gradient(self, x: Array) -> Array:
        """∇f(x) [D] of f = (1/N) Σ fᵢ."""
        return np.einsum("nij,nj->i", self.H, x - self.b) / CLIENTS


@pytest.fixture(scope="module")
def quadratic() -> Quadratic:
    """As least squares: client i's examples are the D rows of √(D Hᵢ), their targets those rows times bᵢ."""
    draw = np.random.default_rng(0)
    H, rows, b = [], [], draw.standard_normal((CLIENTS, DIMENSION))
    for _ in range(CLIENTS):
        Q, _ = np.linalg.qr(draw.standard_normal((DIMENSION, DIMENSION)))
        eigenvalues = np.linspace(1, 2, DIMENSION)
        H.append((Q * eigenvalues) @ Q.T)
        rows.append((Q * np.sqrt(DIMENSION * eigenvalues)) @ Q.T)
    x, y = np.concatenate(rows), np.concatenate([a @ b_i for a, b_i in zip(rows, b, strict=True)])
    data = packed(torch.from_numpy(x), torch.from_numpy(y), [DIMENSION] * CLIENTS)
    task = make_task(nn.Linear(DIMENSION, 1, bias=False), vfl.squared_error)
    return Quadratic(data, task, np.stack(H), b)


def final_gradient(algorithm, quadratic: Quadratic, rounds: int, cohort: int | str = "all") -> float:
    """‖∇f‖ after so many rounds."""
    work = {"batch_size": None, "local_steps": K, "clients_per_round": cohort, "chunk": 100}
    x = run(algorithm, quadratic.task, quadratic.data, rounds, **work)["server.x"]
    return float(np.linalg.norm(quadratic.gradient(x)))


def test_the_quadratic_has_the_gradient_it_claims(quadratic):
    x, engine = quadratic.task.x, quadratic.data.clients
    batch = vfl.Batch(engine.x, engine.y, torch.ones(len(engine.y), dtype=torch.bool), vfl.random.key(0))
    g, _ = quadratic.task.grad_fn(x, batch, ())
    np.testing.assert_allclose(g.numpy(), quadratic.gradient(x.numpy()), rtol=1e-12, atol=1e-12)


def test_fedavg_stalls_where_scaffold_reaches_the_minimiser_of_a_heterogeneous_quadratic(quadratic):
    assert final_gradient(FedAvg(local_lr=ETA), quadratic, 60) > 1e-3
    for option in (1, 2):
        assert final_gradient(Scaffold(local_lr=ETA, option=option), quadratic, 60) <= 1e-8


@pytest.mark.parametrize("option", [1, 2])
def test_scaffold_reaches_the_minimiser_with_a_third_of_the_clients_too(quadratic, option):
    fedavg = final_gradient(FedAvg(local_lr=ETA), quadratic, 150, cohort=3)
    assert fedavg > 1e-3
    assert final_gradient(Scaffold(local_lr=ETA, option=option), quadratic, 150, cohort=3) <= 1e-8


@pytest.mark.parametrize("option", [1, 2])
def test_scaffolds_c_stays_the_mean_of_all_clients_own(option):
    options = {"clients_per_round": 3, "batch_size": 4, "local_epochs": 2}
    sizes = set()
    for state, _ in vfl.rounds(Scaffold(option=option), mlp(), federated(), 12, **options):
        _, (c_i,) = state.store.rows()
        sizes.add(len(c_i))
        assert state.server.c.abs().max() > 1e-3
        np.testing.assert_allclose(state.server.c, c_i.sum(0) / N, rtol=1e-12, atol=1e-12)
    assert min(sizes) < N - 1, "some clients should not have taken part yet"


def test_fedprox_without_its_term_is_fedavg():
    options = {"clients_per_round": 5, "batch_size": 4, "local_epochs": 2, "chunk": 100}
    models = [vfl.simulate(config, mlp(), federated(), 3, **options).x for config in (FedProx(mu=0), FedAvg())]
    assert torch.equal(*models)


def test_fedprox_holds_clients_near_the_model_they_were_sent(quadratic):
    def moved(mu):
        options = {"batch_size": None, "local_steps": 50, "sampling": "fixed:0"}
        x = run(FedProx(local_lr=0.01, mu=mu), quadratic.task, quadratic.data, 1, **options)["server.x"]
        return np.linalg.norm(x - quadratic.task.x.numpy())

    distances = [moved(mu) for mu in (0, 1, 10, 50)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0] / 10


def test_fedavgm_with_momentum_zero_is_fedavg():
    options = {"clients_per_round": 5, "batch_size": 4, "chunk": 100}
    configs = (FedAvgM(server_optimizer="sgd:momentum=0"), FedAvg())
    assert torch.equal(*(vfl.simulate(config, mlp(), federated(), 3, **options).x for config in configs))


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (FedAvg, {"local_lr": -1.0}, "local-lr must be a finite number ≥ 0, not -1.0"),
        (FedAvg, {"server_lr": math.nan}, "server-lr must be a finite number ≥ 0, not nan"),
        (FedAvg, {"weighting": "size"}, "weighting must be examples, uniform or steps, not 'size'"),
        (FedAvg, {"local_optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        (FedProx, {"mu": -0.1}, "mu must be a finite number ≥ 0, not -0.1"),
        (Scaffold, {"weighting": "examples"}, "weighting cannot be 'examples'"),
        (Scaffold, {"local_optimizer": "adam"}, "use option 1 otherwise"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(config, options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        config(**options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
