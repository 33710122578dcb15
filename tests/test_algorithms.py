"""Each algorithm against its paper (tests/papers.py), and the behaviour that theory promises."""

import math
from typing import NamedTuple

import numpy as np
import papers
import papers_local
import papers_personal
import papers_robust
import papers_semi
import pytest
import torch
from helpers import (
    ALGORITHMS,
    SIZES,
    N,
    assert_same,
    federated,
    make_task,
    mlp,
    packed,
    regression,
    round_keys,
    run,
)
from papers import DATA, OFFSETS, ROUNDS, Array, Cohort, Cohorts, drawn, own_rows
from papers_compressed import REFERENCES as COMPRESSED
from torch import nn

import vfl
from algorithms.fedavg import FedAvg, FedAvgM
from algorithms.fedprox import FedProx
from algorithms.scaffold import Scaffold

REFERENCES = (
    papers.REFERENCES
    | papers_local.REFERENCES
    | papers_robust.REFERENCES
    | papers_personal.REFERENCES
    | papers_semi.REFERENCES
    | COMPRESSED
)


class Plan(NamedTuple):
    """Who visits what."""

    options: dict  # of the run
    cohort: Cohorts


def whole_batches(t: int) -> Cohort:
    """Everyone takes 3 steps on all of its data: nothing is drawn."""
    return {i: [own_rows(i)] * 3 if SIZES[i] else [] for i in range(N)}


def drawn_batches(t: int) -> Cohort:
    """The engine's own draws: 5 clients, 2 epochs in batches of 4."""
    ids = vfl.sampler("uniform", 5, DATA.offsets).draw(round_keys(7, t)[0]).ids.tolist()
    return drawn(7, t, ids, vfl.Work(4, 2))


PLANS = {
    "everyone-on-all-its-data": Plan(
        {"clients_per_round": "all", "batch_size": None, "local_steps": 3, "seed": 7}, whole_batches
    ),
    "five-in-minibatches": Plan({"clients_per_round": 5, "batch_size": 4, "local_epochs": 2, "seed": 7}, drawn_batches),
}


def test_the_drawn_minibatches_visit_every_example_of_a_client_once_an_epoch():
    for t in range(3):
        for i, batches in drawn_batches(t).items():
            visits = np.bincount(np.concatenate([np.array([], dtype=int), *batches]), minlength=OFFSETS[-1])
            assert (visits == np.isin(np.arange(OFFSETS[-1]), own_rows(i)) * 2).all()
            assert len(batches) == 2 * math.ceil(SIZES[i] / 4)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in COMPRESSED])
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
    assert final_gradient(FedAvg(local_lr=ETA), quadratic, 40) > 1e-3
    for option in (1, 2):
        assert final_gradient(Scaffold(local_lr=ETA, option=option), quadratic, 40) <= 1e-8


@pytest.mark.parametrize("option", [1, 2])
def test_scaffold_reaches_the_minimiser_with_half_of_the_clients_a_round(quadratic, option):
    assert final_gradient(Scaffold(local_lr=ETA, option=option), quadratic, 90, cohort=5) <= 1e-8


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
    options = {"clients_per_round": 5, "batch_size": 4, "local_epochs": 2, "execution": "vmap", "chunk": 100}
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
    options = {"clients_per_round": 5, "batch_size": 4, "execution": "vmap", "chunk": 100}
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
