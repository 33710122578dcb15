"""The compressed-gradient methods against their papers, round by round, and what theory promises of them."""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import papers_compressed
import pytest
import torch
from helpers import EMPTY, N, assert_same, federated, make_task, mlp, packed, regression, round_keys, run
from papers import DATA, Array, Cohort, drawn, gradient, own_rows
from papers_compressed import ROUNDS, Run, averaging
from torch import nn

import vfl
from algorithms.cofig import Cofig
from algorithms.dcgd import DCGD
from algorithms.diana import Diana
from algorithms.ef21 import EF21
from algorithms.fedavg import FedAvg
from algorithms.fedprox import FedProx
from algorithms.frecon import Frecon
from algorithms.marina import Marina, PPMarina, VRMarina
from algorithms.scaffold import Scaffold

SEED = 7


# Against the papers


class Plan(NamedTuple):
    """Who visits what."""

    options: dict[str, Any]  # of the run
    work: vfl.Work
    clients: int  # a round


FULL = Plan({"clients_per_round": "all", "batch_size": None, "local_steps": 1}, vfl.Work(None, steps=1), N)
SAMPLE = Plan({"clients_per_round": 5, "batch_size": 4, "local_steps": 1}, vfl.Work(4, steps=1), 5)
LOCAL = Plan({"clients_per_round": 5, "batch_size": 4, "local_epochs": 2}, vfl.Work(4, 2), 5)
PLANS = {"full": FULL, "sample": SAMPLE, "local": LOCAL}


def visits(plan: Plan, t: int, everyone: bool) -> Cohort:
    """The engine's cohort of round t, and its minibatches."""
    ids = vfl.sampler("uniform", plan.clients, DATA.offsets).draw(round_keys(SEED, t)[0]).ids.tolist()
    return drawn(SEED, t, range(N) if everyone else ids, plan.work)


CASES = {
    "dcgd": (DCGD(), FULL),
    "dcgd-natural": (DCGD(compressor="natural", downlink="natural"), LOCAL),
    "diana": (Diana(), FULL),
    "diana-gradient": (Diana(shifts="gradient"), SAMPLE),
    "diana-corrected": (Diana(local_direction="corrected", compressor="qsgd:4"), LOCAL),
    "cofig": (Cofig(), SAMPLE),
    "frecon": (Frecon(), FULL),
    "frecon-gradient-corrected": (Frecon(shifts="gradient", local_direction="corrected"), LOCAL),
    "marina": (Marina(p=0.3), FULL),
    "marina-natural": (Marina(p=0.3, compressor="natural"), LOCAL),
    "ppmarina": (PPMarina(p=0.3), SAMPLE),
    "vrmarina": (VRMarina(), SAMPLE),
    "ef21": (EF21(), FULL, SAMPLE),
    "ef21-gradient-corrected": (EF21(shifts="gradient", local_direction="corrected", compressor="sign"), LOCAL),
    "fedavg": (FedAvg(compressor="top_k:0.5", downlink="natural"), LOCAL),
    "scaffold": (Scaffold(compressor="rand_k:0.5", downlink="natural"), LOCAL),
    "scaffold-top_k": (Scaffold(compressor="top_k:0.5"), LOCAL),
}
PAPERS = papers_compressed.REFERENCES | {"fedavg": averaging, "scaffold": papers_compressed.scaffold}
PLAYS = [(name, plan) for name, (_, *plans) in CASES.items() for plan in PLANS if PLANS[plan] in plans]


@pytest.mark.parametrize(("name", "plan"), PLAYS)
def test_a_method_equals_its_paper_in_numpy(name, plan):
    (config, *_), plan = CASES[name], PLANS[plan]
    task, options = regression(), {"chunk": 100, "evaluation": vfl.Evaluation(0), "seed": SEED, **plan.options}
    found = run(config, task, federated(), ROUNDS, **options)
    play = Run(SEED, lambda t, everyone: visits(plan, t, everyone), task.x.numpy())
    wanted = PAPERS[name.partition("-")[0]](config, play)
    state = {key: value for key, value in found.items() if key.partition(".")[0] in ("server", "client")}
    state |= {key: found[f"metric.{key}"][-1] for key in ("bits_up", "bits_down")}
    assert np.abs(wanted["server.x"] - task.x.numpy()).max() > 0.1, "the model has hardly moved"
    assert_same(state, wanted, 1e-10)


def test_every_method_is_compared_under_full_participation_or_a_sample():
    assert set(papers_compressed.REFERENCES) <= set(CASES)


@pytest.mark.parametrize("config", [Diana(), Diana(shifts="gradient"), Frecon(shifts="gradient"), EF21()], ids=repr)
def test_the_servers_shift_stays_the_mean_of_all_clients_own(config):
    sizes = set()
    for state, _ in vfl.rounds(config, mlp(), federated(), 12, clients_per_round=3, batch_size=4):
        _, (h_i, *started) = state.store.rows()
        h = state.server.g if isinstance(config, EF21) else state.server.h
        sizes.add(len(h_i))
        assert h.abs().max() > 1e-3
        np.testing.assert_allclose(h, h_i.sum(0) / N, rtol=1e-12, atol=1e-12)
        assert all(flags.all() for flags in started)
    assert min(sizes) < N - 1, "some clients should not have taken part yet"


@pytest.mark.parametrize("config", [Diana, Frecon, EF21])
def test_shifts_from_gradients_cost_one_uncompressed_gradient_a_client(config):
    options = {"clients_per_round": "all", "batch_size": None, "local_steps": 1, "chunk": 100}
    bits = {}
    for shifts in ("zero", "gradient"):
        state, history = vfl.simulate(config(shifts=shifts), regression(), federated(), 2, **options)
        bits[shifts] = np.diff([0, *(m["bits_up"] for m in history)])
        _, (h_i, *_) = state.store.rows()
        if shifts == "gradient":
            first, _ = vfl.simulate(config(shifts=shifts), regression(), federated(), 1, **options)
            _, (h_i, *_) = first.store.rows()
            own = [gradient(regression().x.numpy(), own_rows(i)) for i in range(N) if i != EMPTY]
            np.testing.assert_allclose(h_i, own, rtol=1e-12, atol=1e-12)
    compressed = bits["zero"][0] / 7 / (2 if config is Frecon else 1)  # FRECON sends a second vector beside
    np.testing.assert_array_equal(bits["gradient"] - bits["zero"], [7 * (18 * 64 - compressed), 0])


# MARINA


def test_marina_asks_everyone_exactly_to_synchronize_when_it_is_pp():
    options = {"clients_per_round": 3, "batch_size": None, "local_steps": 1, "seed": 3}
    asked: dict[str, list] = {"marina": [], "ppmarina": []}
    for name, config in (("marina", Marina(p=0.4)), ("ppmarina", PPMarina(p=0.4))):
        coming = True
        for state, metrics in vfl.rounds(config, regression(), federated(), 15, **options):
            asked[name].append((coming, metrics["clients"]))
            coming = bool(state.server.sync)
    assert {clients for _, clients in asked["marina"]} == {3}
    assert {(True, N), (False, 3)} == set(asked["ppmarina"])


def test_marina_without_compression_is_gradient_descent_whatever_the_coins():
    """The differences telescope only if the previous model is the previous one."""
    config, x = Marina(compressor="identity", p=0.1, server_lr=0.5), regression().x.numpy()
    work = {"clients_per_round": "all", "batch_size": None, "local_steps": 1, "chunk": 100}
    found = run(config, regression(), federated(), 30, **work)
    for _ in range(30):
        x = x - 0.5 * np.mean([gradient(x, own_rows(i)) for i in range(N) if i != EMPTY], axis=0)
    np.testing.assert_allclose(found["server.x"], x, rtol=1e-10, atol=1e-10)


def test_vrmarina_with_one_client_and_no_compression_is_page():
    """Li et al. 2008.10898: the whole gradient with probability p, else g + ∇_b f(x⁺) − ∇_b f(x) on one minibatch b."""
    config = VRMarina(compressor="identity", p=0.3, server_lr=0.3)
    options = {"sampling": "fixed:2", "batch_size": 4, "local_steps": 1, "seed": SEED, "chunk": 1}
    found = run(config, regression(), federated(), 30, **options)
    x, previous, g, whole, gradients = regression().x.numpy(), None, 0.0, True, 0
    for t in range(30):
        (batch,) = drawn(SEED, t, [2], vfl.Work(4, steps=1))[2]
        rows = own_rows(2) if whole else batch
        g = gradient(x, rows) if whole else g + gradient(x, rows) - gradient(previous, rows)
        gradients += 12 if whole else 2 * 4
        x, previous = x - 0.3 * g, x
        whole = bool(vfl.random.bernoulli(round_keys(SEED, t)[2], 0.3, ()))
    np.testing.assert_allclose(found["server.x"], x, rtol=1e-10, atol=1e-10)
    assert found["metric.gradients"][-1] == gradients


# Convergence


DIMENSION, CLIENTS = 50, 20


class Constants(NamedTuple):
    """Of the quadratic's smoothness."""

    L: float
    L_tilde: float
    L_max: float
    mu: float


class Quadratic(NamedTuple):
    """fᵢ(x) = sᵢ/2 (x − bᵢ)ᵀ H (x − bᵢ), eigenvalues of H from 1 to 20, sᵢ from ½ to 3/2 with mean 1, bᵢ far apart."""

    data: vfl.data.FederatedData
    task: vfl.Task
    H: Array  # [D, D]
    s: Array  # [N]
    b: Array  # [N, D]

    def gradient(self, x: Array) -> Array:
        """∇f(x) [D]."""
        return self.H @ (x - self.s @ self.b / CLIENTS)

    @property
    def constants(self) -> Constants:
        """L = 20 and μ = 1: κ = 20."""
        return Constants(20, 20 * math.sqrt((self.s**2).mean()), 20 * self.s.max(), 1)


@pytest.fixture(scope="module")
def quadratic() -> Quadratic:
    """As least squares: client i's examples are the D rows of √(D sᵢ H), their targets those rows times bᵢ."""
    draw = np.random.default_rng(0)
    Q, _ = np.linalg.qr(draw.standard_normal((DIMENSION, DIMENSION)))
    eigenvalues, s = np.linspace(1, 20, DIMENSION), np.linspace(0.5, 1.5, CLIENTS)
    b = draw.standard_normal((CLIENTS, DIMENSION))
    rows = [(Q * np.sqrt(DIMENSION * s_i * eigenvalues)) @ Q.T for s_i in s]
    targets = [A @ b_i for A, b_i in zip(rows, b, strict=True)]
    data = packed(
        torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(targets)), [DIMENSION] * CLIENTS
    )
    task = make_task(nn.Linear(DIMENSION, 1, bias=False), vfl.squared_error)
    return Quadratic(data, task, (Q * eigenvalues) @ Q.T, s, b)


def descent(config: Any, quadratic: Quadratic, rounds: int, **options: Any) -> tuple[Array, Array]:
    """‖∇f‖ and the bits sent up after each round."""
    work = {"batch_size": None, "local_steps": 1, "clients_per_round": "all"} | options
    norms, bits = [], []
    plays = {"evaluation": vfl.Evaluation(0), "execution": "vmap", "chunk": 100}
    for state, metrics in vfl.rounds(config, quadratic.task, quadratic.data, rounds, **plays, **work):
        norms.append(np.linalg.norm(quadratic.gradient(state.server.x.numpy())))
        bits.append(metrics["bits_up"])
    return np.array(norms), np.array(bits)


def first(norms: Array, tolerance: float) -> int:
    """The first round after which ‖∇f‖ stays at or below the tolerance."""
    return int(np.flatnonzero(norms > tolerance)[-1]) + 1


def test_the_quadratic_is_the_one_it_claims_to_be(quadratic):
    x, engine = quadratic.task.x, quadratic.data.clients
    batch = vfl.Batch(engine.x, engine.y, torch.ones(len(engine.y), dtype=torch.bool), vfl.random.key(0))
    g, _ = quadratic.task.grad_fn(x, batch, ())
    np.testing.assert_allclose(g.numpy(), quadratic.gradient(x.numpy()), rtol=1e-10, atol=1e-10)
    eigenvalues = np.linalg.eigvalsh(quadratic.H)
    assert (eigenvalues[0], eigenvalues[-1]) == pytest.approx((1, 20))


METHODS = {  # config, γ times L (None: the theorem's, which for the others takes more rounds), rounds, cohort
    "diana": (Diana(), 1.5, 350, "all"),
    "marina": (Marina(), None, 620, "all"),
    "ef21": (EF21(), 1.5, 250, "all"),
    "cofig": (Cofig(), 0.6, 620, 10),
    "frecon": (Frecon(), 1.2, 420, "all"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reaches_the_minimiser_at_a_linear_rate(name, quadratic):
    config, gamma, rounds, cohort = METHODS[name]
    step = config.step_size(quadratic.constants, quadratic.task, CLIENTS) if gamma is None else gamma / 20
    norms, _ = descent(dataclasses.replace(config, server_lr=step), quadratic, rounds, clients_per_round=cohort)
    reached = [first(norms, tolerance) for tolerance in (1e-2, 1e-5, 1e-8)]
    assert norms[-1] <= 1e-8
    early, late = np.diff(reached)  # the rounds of three decades each
    assert late < 2 * early


def test_dcgd_stalls_where_the_others_converge(quadratic):
    config = DCGD(server_lr=DCGD().step_size(quadratic.constants, quadratic.task, CLIENTS))
    norms, _ = descent(config, quadratic, 150)
    assert norms[50:].min() > 1


@pytest.mark.parametrize("config", [Diana, EF21])
def test_several_local_steps_reach_the_minimiser_only_when_corrected(config, quadratic):
    options = {"compressor": "natural", "server_lr": 1.5 / 20, "local_lr": 0.01}
    with_it, _ = descent(config(local_direction="corrected", **options), quadratic, 160, local_steps=3)
    without, _ = descent(config(**options), quadratic, 60, local_steps=3)
    assert with_it[-1] < 1e-3
    assert without[30:].min() > 0.5


def test_scaffold_with_compressed_messages_reaches_the_minimiser(quadratic):
    norms, _ = descent(Scaffold(compressor="rand_k:0.5", local_lr=0.02), quadratic, 190, local_steps=3)
    assert norms[-1] <= 1e-6


# Step sizes


def test_step_sizes_are_those_of_the_theorems():
    constants, task = Constants(2.0, 3.0, 5.0, 0.5), regression()
    w, p, n = 18 / 4 - 1, 4 / 18, 10  # rand_k:0.2 keeps 4 of 18

    def step(config: Any, clients: int | None = None, constants: Constants = constants) -> float:
        return config.step_size(constants, task, n, clients)

    assert step(DCGD()) == pytest.approx(1 / (2 * (1 + w / n)))
    assert step(DCGD(), 5) == pytest.approx(1 / (2 * (1 + w / 5)))
    assert step(Diana()) == pytest.approx(1 / (5 * (1 + 6 * w / n)))
    flat = constants._replace(mu=0.0)
    assert step(Diana(), None, flat) == pytest.approx(1 / (20 * math.sqrt(1 + w / n) * (2 + w)))
    assert step(Marina()) == pytest.approx(1 / (3 * (1 + math.sqrt((1 - p) * w / (p * n)))))
    assert step(Marina(p=0.5)) == pytest.approx(1 / (3 * (1 + math.sqrt(w / n))))
    assert step(PPMarina(), 5) == pytest.approx(1 / (3 * (1 + math.sqrt((1 - p) * (1 + w) / (p * 5)))))
    theta = 1 - math.sqrt(1 - 4 / 18)
    beta = (1 - 4 / 18) / theta
    assert step(EF21()) == pytest.approx(1 / (2 + 3 * math.sqrt(beta / theta)))
    assert step(EF21(compressor="identity")) == pytest.approx(1 / 2)
    rho = 0.5 * theta / (2 * 0.5)
    B = beta * 0.5 + (1 + 1 / rho) * 0.5
    assert step(EF21(), 5) == pytest.approx(1 / (2 + 3 * math.sqrt(B / (theta / 2 * 0.5))))
    candidates = (1 / 10, 5 / (25 * (1 + w) * 10 ** (2 / 3)), 5 / (25 * (1 + w) ** 1.5 * math.sqrt(10)))
    assert step(Cofig(), 5) == pytest.approx(min(candidates))
    assert step(Frecon(), 5) == pytest.approx(1 / (5 * (1 + math.sqrt(10 * (1 + w) ** 2 * n / 25))))


@pytest.mark.parametrize(
    ("config", "clients", "sentence"),
    [
        (Diana(), 5, "diana's theorems ask all 10 clients, not 5; cofig has one for samples"),
        (Marina(), 5, "marina's theorem asks all 10 clients, not 5; ppmarina has one for samples"),
        (VRMarina(), 10, "vrmarina's theorem needs the smoothness of single examples' losses"),
        (EF21(compressor="rand_k:0.2"), 10, "ef21 needs a contractive compressor"),
    ],
)
def test_a_step_size_that_no_theorem_gives_is_refused(config, clients, sentence):
    with pytest.raises(vfl.UsageError) as error:
        config.step_size(Constants(2.0, 3.0, 5.0, 0.5), regression(), 10, clients)
    assert sentence in str(error.value)


# Options


@pytest.mark.parametrize(
    ("config", "compressor"),
    [*itertools.product((DCGD, Diana, Cofig, Frecon, Marina, PPMarina, VRMarina), ("top_k:0.5", "sign", "quantize:4"))],
)
def test_a_biased_compressor_is_refused_where_theory_forbids_it(config, compressor):
    with pytest.raises(vfl.UsageError) as error:
        config(compressor=compressor).build(regression(), N)
    name = config.__name__.lower()
    assert str(error.value).startswith(
        f"{name} needs an unbiased compressor, which {compressor} is not: rand_k, natural"
    )


@pytest.mark.parametrize("compressor", ["rand_k:0.5", "quantize:4", "compose(natural,top_k:0.5)"])
def test_a_compressor_that_does_not_contract_is_refused_by_ef21(compressor):
    with pytest.raises(vfl.UsageError) as error:
        EF21(compressor=compressor).build(regression(), N)
    assert str(error.value).startswith(f"ef21 needs a contractive compressor, which {compressor} is not known to be")
    assert "compose(top_k:K,natural) would do" in str(error.value)


def test_a_count_of_entries_is_checked_against_the_model():
    with pytest.raises(vfl.UsageError, match="top_k:19 asks for more entries than the 18 there are"):
        EF21(compressor="top_k:19").build(regression(), N)


class Plain(vfl.LocalTraining):
    """An algorithm that knows nothing of compressors."""


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (Diana, {"weighting": "examples"}, "diana averages its clients uniformly, so weighting cannot be 'examples'"),
        (Marina, {"local_optimizer": "adam"}, "local-optimizer must be sgd, not 'adam'"),
        (Marina, {"p": 0.0}, "p must be above 0 and at most 1, not 0.0"),
        (Marina, {"downlink": "natural"}, "so clients must get these as they are: downlink must be identity"),
        (Frecon, {"downlink": "natural"}, "so clients must get these as they are: downlink must be identity"),
        (Frecon, {"lam": 1.5}, "lam must be above 0 and at most 1, not 1.5"),
        (Diana, {"shift_step": 0.0}, "shift-step must be above 0 and at most 1, not 0.0"),
        (EF21, {"shifts": "one"}, "shifts must be zero or gradient, not 'one'"),
        (Diana, {"local_direction": "h"}, "local-direction must be gradient or corrected, not 'h'"),
        (FedAvg, {"compressor": "topk:1"}, "unknown compressor 'topk'; did you mean 'top_k'?"),
        (FedProx, {"downlink": "rand_k:2.0"}, "compressor rand_k:2.0 is a fraction outside (0, 1]"),
        (Plain, {"compressor": "natural"}, "plain does not compress what it sends: compressor and downlink must be"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(config, options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        config(**options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broadcast_without_a_key_cannot_be_compressed():
    trainer = FedAvg(downlink="natural").trainer(regression())
    with pytest.raises(vfl.UsageError, match="does not compress what its server sends, so downlink must be identity"):
        trainer.broadcast(regression().x, torch.zeros(()))


def test_a_message_compresses_vectors_and_leaves_the_rest():
    trainer, x = FedAvg(compressor="top_k:2").trainer(regression()), regression().x
    (vector, scalar), weight, bits = trainer.message((x, x[0]), x.new_ones(()), vfl.random.key(0))
    assert vector.count_nonzero() == 2 and scalar == x[0] and weight == 1
    assert bits == 2 * (64 + 5) + 64
