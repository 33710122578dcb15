"""What sets each method of the local-update family apart, on problems whose solution is known."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import SIZES, N, federated, make_task, mlp, packed, run
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from algorithms.feddyn import FedDyn
from algorithms.fedexp import FedExP
from algorithms.fednova import FedNova
from algorithms.fedprox import FedProx
from algorithms.gradskip import GradSkip
from algorithms.mime import Mime, MimeLite
from algorithms.qfedavg import QFedAvg
from algorithms.scaffnew import Scaffnew


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
    options = {"local_steps": 8, "clients_per_round": cohort}
    assert distance(FedAvg(), heterogeneous, 15, **options) > 1e-2
    assert distance(FedDyn(alpha=1.5), heterogeneous, rounds, **options) < 1e-8


def test_feddyns_h_stays_the_mean_of_all_clients_own():
    rows = set()
    for state, _ in vfl.rounds(FedDyn(), mlp(), federated(), 12, clients_per_round=3, batch_size=4, local_epochs=2):
        _, (h_i,) = state.store.rows()
        rows.add(len(h_i))
        assert state.server.h.abs().max() > 1e-3
        np.testing.assert_allclose(state.server.h, h_i.sum(0) / N, rtol=1e-12, atol=1e-12)
    assert min(rows) < N - 1, "some clients should not have taken part yet"


# Mime


def test_mime_reaches_the_minimiser_and_frozen_momentum_alone_comes_nearer_than_fedavg(heterogeneous):
    fedavg, lite = (distance(a, heterogeneous, rounds=30, local_steps=8) for a in (FedAvg(), MimeLite(b1=0.5)))
    assert distance(Mime(b1=0), heterogeneous, rounds=50, local_steps=8) < 1e-8
    assert 1e-3 < lite < fedavg / 3


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "adam"])
def test_one_local_step_of_mime_or_mimelite_is_a_step_of_the_centralised_optimizer(heterogeneous, base):
    options = {"base": base, "local_lr": 1e-3}
    data, x = heterogeneous.data.clients, heterogeneous.task.x.numpy()
    m, v = np.zeros_like(x), np.zeros_like(x)
    for _ in range(5):
        g = data.x.numpy().T @ (data.x.numpy() @ x - data.y.numpy()) / len(data.x)
        u = 0.1 * g + 0.9 * m if base != "rmsprop" else g
        x = x - 1e-3 * (u / (np.sqrt(v) + 1e-3) if base != "sgd" else u)
        m, v = 0.1 * g + 0.9 * m, 0.01 * g**2 + 0.99 * v
    for config, rounds in ((Mime(**options), 10), (MimeLite(**options), 5)):
        np.testing.assert_allclose(model(config, heterogeneous, rounds, local_steps=1), x, rtol=1e-10)


def test_a_round_of_mime_is_two_exchanges():
    options = {"clients_per_round": "all", "batch_size": 4, "local_epochs": 2}
    played = list(vfl.rounds(Mime(), mlp(), federated(), 4, **options))
    models, gradients = [s.server.x for s, _ in played], [m["gradients"] for _, m in played]
    assert torch.equal(models[0], mlp().x) and torch.equal(models[1], models[2])
    assert not torch.equal(models[0], models[1]) and not torch.equal(models[2], models[3])
    assert np.diff([0, *gradients]).tolist() == [sum(SIZES), 2 * 2 * sum(SIZES)] * 2  # at y and at x, 2 epochs


# FedExP


def local_changes(task: vfl.Task, data: vfl.data.FederatedData, **work: Any) -> list[np.ndarray]:
    """Each client's Δᵢ [D] in the first round, by a run in which it is alone."""
    options = {"rounds": 1, **work}
    ids = np.flatnonzero(data.clients.sizes())
    return [run(FedAvg(), task, data, sampling=f"fixed:{i}", **options)["server.x"] - task.x.numpy() for i in ids]


@pytest.mark.parametrize("steps", [1, 20])
def test_fedexps_extrapolation_is_the_formula_and_never_below_one(heterogeneous, steps):
    work = {"batch_size": None, "local_steps": steps}
    deltas = local_changes(heterogeneous.task, heterogeneous.data, **work)
    square, mean = np.mean([d @ d for d in deltas]), np.mean(deltas, axis=0)
    wanted = square / (2 * (mean @ mean + 0.01))
    found = run(FedExP(eps=0.01), heterogeneous.task, heterogeneous.data, 1, clients_per_round="all", **work)
    np.testing.assert_allclose(found["metric.extrapolation"], max(1, wanted))
    np.testing.assert_allclose(found["server.x"], heterogeneous.task.x.numpy() + max(1, wanted) * mean, rtol=1e-12)


def test_fedexp_extrapolates_where_clients_differ_and_is_fedavg_where_they_agree(heterogeneous):
    options = {"batch_size": None, "local_steps": 20, "clients_per_round": "all"}
    differ = run(FedExP(), heterogeneous.task, heterogeneous.data, 10, **options)
    assert (differ["metric.extrapolation"] >= 1).all() and differ["metric.extrapolation"].max() > 1.5
    A = [np.eye(4)] * 3
    alike = least_squares(A, [np.arange(4.0)] * 3)
    assert (run(FedExP(eps=0), alike.task, alike.data, 4, **options)["metric.extrapolation"] == 1).all()
    np.testing.assert_array_equal(*(model(a, alike, 4, local_steps=20) for a in (FedExP(eps=0), FedAvg())))


def test_fedexp_without_epsilon_stays_where_nobody_moves():
    assert same_model(FedExP(local_lr=0, eps=0), FedAvg(local_lr=0))


# q-FedAvg


@pytest.mark.parametrize("weighting", ["examples", "uniform", "steps"])
def test_qfedavg_with_q_zero_is_fedavg(weighting):
    assert same_model(QFedAvg(q=0, weighting=weighting), FedAvg(weighting=weighting))
    assert not same_model(QFedAvg(q=0.1, weighting=weighting), FedAvg(weighting=weighting))


def test_a_larger_q_gives_more_equal_losses(heterogeneous):
    def losses(q: float) -> np.ndarray:
        x = model(QFedAvg(q=q, local_lr=0.05), heterogeneous, 60, local_steps=1)
        pairs = [heterogeneous.data.clients.client(i) for i in range(10)]
        return np.array([np.mean((a.numpy() @ x - b.numpy()) ** 2) / 2 for a, b, *_ in pairs])

    spread = [losses(q).std() for q in (0, 1, 5)]
    assert spread[0] > spread[1] > spread[2]
    assert losses(5).max() < losses(0).max()


def test_qfedavg_at_rate_zero_or_loss_zero_stays_where_it_is():
    assert same_model(QFedAvg(local_lr=0), FedAvg(local_lr=0))
    solved = least_squares([np.eye(3)] * 2, [np.zeros(3)] * 2)
    solved = solved._replace(task=solved.task._replace(x=torch.zeros(3, dtype=torch.float64)))
    for q in (0, 0.5, 1, 30):
        assert not model(QFedAvg(q=q), solved, 2).any()


# Scaffnew and GradSkip


def test_scaffnew_needs_a_fraction_of_gradient_descents_communications():
    A, draw = np.diag(np.sqrt(3 * np.array([1.0, 5.0, 25.0]))), np.random.default_rng(0)
    problem, rounds = least_squares([A] * 4, [A @ draw.standard_normal(3) for _ in range(4)]), 250
    options = {"batch_size": None, "local_steps": 1, "clients_per_round": "all"}
    found = run(Scaffnew(local_lr=1 / 25, p=1 / 5), problem.task, problem.data, rounds, **options)
    communications = int(found["metric.communications"][-1])
    assert 30 < communications < 70
    ours = np.linalg.norm(found["server.x"] - problem.best)
    left = np.abs(1 - np.array([1.0, 5.0, 25.0]) / 25)  # of each coordinate's error after a step of gradient descent
    descent = [np.linalg.norm(left**n * (problem.task.x.numpy() - problem.best)) for n in (communications, rounds)]
    assert ours < descent[0] / 300  # for the same communications
    assert ours < 10 * descent[1]  # for five times as many


def test_scaffnew_that_always_communicates_is_gradient_descent(heterogeneous):
    models = [model(a, heterogeneous, 5, local_steps=1) for a in (Scaffnew(p=1), FedAvg())]
    np.testing.assert_allclose(*models, rtol=1e-12)


@pytest.mark.parametrize("algorithm", [Scaffnew(p=0.5, local_lr=0.3), GradSkip(p=0.5, q=0.7, local_lr=0.2)])
@pytest.mark.parametrize(("cohort", "rounds"), [("all", 80), (5, 250)])
def test_scaffnew_and_gradskip_reach_the_minimiser(heterogeneous, algorithm, cohort, rounds):
    assert distance(algorithm, heterogeneous, rounds, clients_per_round=cohort) < 1e-8


@pytest.mark.parametrize("algorithm", [Scaffnew(p=0.4), GradSkip(p=0.4, q=0.6)])
def test_the_shifts_of_all_clients_sum_to_zero_though_some_are_away(algorithm):
    sizes = set()
    options = {"clients_per_round": 3, "batch_size": 4, "execution": "vmap", "chunk": 100}
    for state, metrics in vfl.rounds(algorithm, mlp(), federated(), 20, **options):
        _, rows = state.store.rows()
        u = rows[list(state.store.template._fields).index("u")]
        sizes.add(len(u))
        shifts = u + algorithm.p / algorithm.local_lr * state.server.x
        np.testing.assert_allclose(shifts.sum(0), 0, atol=1e-12)
        assert (shifts.abs().max() > 1e-3) == (metrics["communications"] > 0)
    assert min(sizes) < N - 1 == max(sizes)


@pytest.mark.parametrize("algorithm", [Scaffnew(p=0.4), GradSkip(p=0.4)])
def test_only_rounds_that_communicate_cost_bits(algorithm):
    options = {"sampling": "fixed:0,2,3", "batch_size": 4}
    history = [metrics for _, metrics in vfl.rounds(algorithm, mlp(), federated(), 20, **options)]
    up, down, done = (np.diff([0, *(m[key] for m in history)]) for key in ("bits_up", "bits_down", "communications"))
    assert 0 < done.sum() < 20
    bits = 3 * mlp().x.numel() * 64
    np.testing.assert_array_equal(up, done * bits)
    np.testing.assert_array_equal(down, np.array([1, *done[:-1]]) * bits)  # the average goes out in the next round


def test_gradskip_with_q_one_is_scaffnew():
    assert same_model(GradSkip(p=0.5, q=1), Scaffnew(p=0.5), clients_per_round="all")
    assert not same_model(GradSkip(p=0.5, q=0.5), Scaffnew(p=0.5), clients_per_round="all")


def test_gradskip_computes_fewer_gradients(heterogeneous):
    def mean_steps(algorithm: Any) -> float:
        """Gradients that a client computes in a round, on average."""
        options = {"batch_size": None, "clients_per_round": "all", "chunk": 100, "rounds": 120}
        found = run(algorithm, heterogeneous.task, heterogeneous.data, **options)
        return found["metric.gradients"][-1] / (120 * len(heterogeneous.data.clients.x))

    p, q = 0.2, 0.7
    assert mean_steps(Scaffnew(p=p)) == 1
    expected = p / (1 - q * (1 - p))  # of the 1/p steps between communications, 1 / (1 − q (1 − p)) compute
    assert mean_steps(GradSkip(p=p, q=q)) == pytest.approx(expected, rel=0.1)


# Costs

EPOCHS, BATCH = 2, 4
WHOLE, FIRST = sum(SIZES), sum(min(n, BATCH) for n in SIZES)  # examples in all, in a round's first minibatches


@pytest.mark.parametrize(
    ("algorithm", "gradients"),
    [
        (FedNova(), EPOCHS * WHOLE),
        (FedDyn(), EPOCHS * WHOLE),
        (FedExP(), EPOCHS * WHOLE),
        (QFedAvg(), EPOCHS * WHOLE),
        (MimeLite(), (EPOCHS + 1) * WHOLE),
        (Scaffnew(), FIRST),
        (GradSkip(q=1), FIRST),
    ],
)
def test_gradients_equal_a_count_by_hand(algorithm, gradients):
    options = {"clients_per_round": "all", "batch_size": BATCH, "local_epochs": EPOCHS}
    _, history = vfl.simulate(algorithm, mlp(), federated(), 2, **options)
    assert [m["gradients"] for m in history] == [gradients, 2 * gradients]


# Options


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (Scaffnew, {"p": 0.0}, "p must be a probability above 0 and at most 1, not 0.0"),
        (Scaffnew, {"local_lr": 0.0}, "local-lr must be a finite number > 0, not 0.0"),
        (GradSkip, {"q": 1.5}, "q must be a probability from 0 to 1, not 1.5"),
        (FedExP, {"eps": -1.0}, "eps must be a finite number ≥ 0, not -1.0"),
        (QFedAvg, {"q": -1.0}, "q must be a finite number ≥ 0, not -1.0"),
        (QFedAvg, {"lipschitz": 0.0}, "lipschitz must be a finite number > 0, not 0.0"),
        (Mime, {"base": "yogi"}, "base must be sgd, rmsprop or adam, not 'yogi'"),
        (Mime, {"b1": 1.0}, "b1 must be at least 0 and below 1, not 1.0"),
        (MimeLite, {"eps": 0.0}, "eps must be a finite number > 0, not 0.0"),
        (MimeLite, {"server_optimizer": "adam"}, "so server-optimizer must stay sgd, not 'adam'"),
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
