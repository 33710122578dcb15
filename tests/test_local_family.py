"""What sets each method of the local-update family apart, on problems whose solution is known."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import N, federated, make_task, mlp, packed, run
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from algorithms.feddyn import FedDyn
from algorithms.fednova import FedNova
from algorithms.fedprox import FedProx


class LeastSquares(NamedTuple):
    """fᵢ(x) = ‖Aᵢ x − bᵢ‖² / 2nᵢ for n_i examples (Aᵢ, bᵢ) of client i."""

    data: vfl.data.FederatedData
    task: vfl.Task
    best: np.ndarray  # [D] the minimiser of (1/N) Σ fᵢ


def least_squares(A: list[np.ndarray], b: list[np.ndarray]) -> LeastSquares:
    """The problem of these clients' examples, Aᵢ [n_i, D] and bᵢ [n_i]."""
    H = sum(a.T @ a / len(a) for a in A)
    best = np.linalg.solve(H, sum(a.T @ y / len(a) for a, y in zip(A, b, strict=True)))
    data = packed(torch.from_numpy(np.concatenate(A)), torch.from_numpy(np.concatenate(b)), [len(a) for a in A])
    return LeastSquares(data, make_task(nn.Linear(A[0].shape[1], 1, bias=False), vfl.squared_error), best)


def model(algorithm: Any, problem: LeastSquares, rounds: int, **options: Any) -> np.ndarray:
    """The model [D] after so many rounds of everyone, on all of its data unless the options say otherwise."""
    options = {"clients_per_round": "all", "batch_size": None, "chunk": 100} | options
    return run(algorithm, problem.task, problem.data, rounds, **options)["server.x"]


def same_model(a: Any, b: Any, **options: Any) -> bool:
    """Whether two algorithms train the same model, up to rounding."""
    options = {"clients_per_round": 5, "batch_size": 4, "chunk": 100} | options
    found, wanted = (run(each, mlp(), federated(), 4, **options)["server.x"] for each in (a, b))
    return np.allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def heterogeneous() -> LeastSquares:
    """Ten clients with Hessians of eigenvalues 1 to 2 and solutions of their own."""
    draw = np.random.default_rng(0)
    A, b = [], []
    for _ in range(10):
        Q, _ = np.linalg.qr(draw.standard_normal((6, 6)))
        A.append((Q * np.sqrt(6 * np.linspace(1, 2, 6))) @ Q.T)
        b.append(A[-1] @ draw.standard_normal(6))
    return least_squares(A, b)


def distance(algorithm: Any, problem: LeastSquares, rounds: int, **options: Any) -> float:
    """‖x − x*‖ after so many rounds."""
    return float(np.linalg.norm(model(algorithm, problem, rounds, **options) - problem.best))


# FedNova


@pytest.fixture(scope="module")
def unequal() -> LeastSquares:
    """Scalar quadratics ½(x − cᵢ)² of clients that hold 1, 2, 4 and 8 copies of one example."""
    sizes, centres = (1, 2, 4, 8), (5.0, 3.0, -2.0, -4.0)
    return least_squares([np.ones((n, 1)) for n in sizes], [np.full(n, c) for n, c in zip(sizes, centres, strict=True)])


@pytest.mark.parametrize("options", [{}, {"local_optimizer": "sgd:momentum=0.5"}, {"mu": 0.5}, {"tau_eff": "steps"}])
def test_fednova_minimises_the_objective_that_fedavg_misses_under_unequal_steps(unequal, options):
    common = {"local_lr": 1e-3, "weighting": "uniform", "server_lr": 200.0}
    work = {"batch_size": 1, "rounds": 15}  # as many steps as examples
    assert unequal.best == pytest.approx(0.5)
    assert model(FedAvg(**common), unequal, **work) == pytest.approx(-29 / 15, abs=0.01)  # Σ nᵢ cᵢ / Σ nᵢ
    assert model(FedNova(**common, **options), unequal, **work) == pytest.approx(0.5, abs=0.01)


OPTIMIZERS = ("sgd", "sgd:momentum=0.9", "sgd:momentum=0.9,dampening=0.5", "sgd:momentum=0.8,nesterov=true")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fednova_with_equal_steps_is_fedavg(optimizer):
    local = {"local_optimizer": optimizer, "local_schedule": "step:2"}
    assert same_model(FedNova(**local), FedAvg(**local), local_steps=5)
    assert same_model(FedNova(mu=0.5, **local), FedProx(mu=0.5, **local), local_steps=5)
    assert not same_model(FedNova(**local), FedAvg(**local))


def test_fednova_at_rate_zero_stays_where_it_is():
    assert same_model(FedNova(local_lr=0), FedAvg(local_lr=0))


# FedDyn


@pytest.mark.parametrize(("cohort", "rounds"), [("all", 30), (5, 90)])
def test_feddyn_reaches_the_minimiser_where_fedavg_stalls(heterogeneous, cohort, rounds):
    options = {"rounds": rounds, "local_steps": 8, "clients_per_round": cohort}
    assert distance(FedAvg(), heterogeneous, **options) > 1e-2
    assert distance(FedDyn(alpha=1.5), heterogeneous, **options) < 1e-8


def test_feddyns_h_stays_the_mean_of_all_clients_own():
    rows = set()
    for state, _ in vfl.rounds(FedDyn(), mlp(), federated(), 12, clients_per_round=3, batch_size=4, local_epochs=2):
        _, (h_i,) = state.store.rows()
        rows.add(len(h_i))
        assert state.server.h.abs().max() > 1e-3
        np.testing.assert_allclose(state.server.h, h_i.sum(0) / N, rtol=1e-12, atol=1e-12)
    assert min(rows) < N - 1, "some clients should not have taken part yet"


# Options


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (FedDyn, {"alpha": 0.0}, "alpha must be a finite number > 0, not 0.0"),
        (FedDyn, {"weighting": "examples"}, "weighting cannot be 'examples'"),
        (FedNova, {"mu": -1.0}, "mu must be a finite number ≥ 0, not -1.0"),
        (FedNova, {"tau_eff": "mean"}, "tau-eff must be norm or steps, not 'mean'"),
        (FedNova, {"local_optimizer": "adam"}, "so local-optimizer cannot be 'adam'"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(config, options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        config(**options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
