"""DGA's statistics and weights against numpy, and what they are for."""

import numpy as np
import papers
import papers_robust
import pytest
import torch
from helpers import CLASSES, FEATURES, SIZES, N, assert_same, federated, make_task, mlp, packed, regression, run
from papers import own_rows
from torch import nn

import vfl
from algorithms.dga import DGA
from algorithms.fedavg import FedAvg

OFF = vfl.Evaluation(0)
WORK = {"clients_per_round": "all", "batch_size": None, "local_steps": 3, "evaluation": OFF}


def everyone(t):
    """All clients take 3 steps on all of their data."""
    return {i: [own_rows(i)] * 3 if SIZES[i] else [] for i in range(N)}


@pytest.mark.parametrize("gradient", ["steps", "pseudo"])
@pytest.mark.parametrize(("statistic", "beta"), [("loss", 2.0), ("variance", 50.0), ("mean", 400.0), ("rms", 15.0)])
def test_every_statistic_weighs_as_in_numpy(statistic, gradient, beta):
    """Softmax regression's gradients sum to zero, so something is added that gives them means of their own."""
    plain, config = regression(), DGA(statistic=statistic, gradient=gradient, beta=beta)

    def grad_fn(x, batch, buffers):
        g, aux = plain.grad_fn(x, batch, buffers)
        return g + 0.5 * x.sin(), aux

    task = plain._replace(grad_fn=grad_fn)
    slope = lambda y, rows: papers.gradient(y, rows) + 0.5 * np.sin(y)  # noqa: E731
    wanted = papers_robust.dga(config, everyone, task.x.numpy(), 10, slope)
    found = run(config, task, federated(), 10, chunk=3, **WORK)
    assert_same({name: found[name] for name in ("server.x", "server.s")},
                {name: wanted[name] for name in ("server.x", "server.s")}, 1e-10)  # fmt: skip
    unweighted = run(FedAvg(weighting="uniform"), task, federated(), 10, **WORK)["server.x"]
    assert np.abs(found["server.x"] - unweighted).max() > 1e-3, "the weights have hardly mattered"


def test_beta_zero_is_the_mean():
    wanted = run(FedAvg(weighting="examples"), mlp(), federated(), 4, **WORK)["server.x"]
    found = run(DGA(beta=0, weighting="examples"), mlp(), federated(), 4, **WORK)["server.x"]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_observed_as_they_are_descended():
    """Of gradients clipped to c, Σ g² over K steps is K c², so the rms over KD entries is c/√D."""
    task = regression()
    found = run(DGA(statistic="rms", clip_norm=1e-3), task, federated(), 1, **WORK)
    np.testing.assert_allclose(found["server.s"], 1e-3 / np.sqrt(len(task.x)), rtol=1e-9)


def test_losses_too_large_for_an_exponent_weigh_as_if_they_were_small():
    """exp(−5000) is 0 in any precision. The first such cohort weighs alike, and the next ones by the exact softmax."""

    def far(outputs, targets):
        return vfl.cross_entropy(outputs, targets) + 1000

    config = DGA(beta=5)
    found = [state.server.x for state, _ in vfl.rounds(config, make_task(nn.Linear(FEATURES, CLASSES), far),
                                                       federated(), 2, execution="vmap", **WORK)]  # fmt: skip
    first = vfl.simulate(FedAvg(weighting="uniform"), regression(), federated(), 1, execution="vmap", **WORK).x
    np.testing.assert_allclose(found[0], first, rtol=1e-12)
    second = vfl.simulate(config, regression()._replace(x=first), federated(), 1, execution="vmap", **WORK).x
    np.testing.assert_allclose(found[1], second, rtol=1e-10)


def test_a_client_with_shuffled_labels_is_nearly_left_out():
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.standard_normal((150, FEATURES)))
    y = (x[:, 0] > 0).long()
    shuffled = torch.cat([y[:120], y[torch.from_numpy(120 + draw.permutation(30))]])
    options = WORK | {"execution": "vmap"}
    clean = vfl.simulate(FedAvg(), regression(), packed(x[:120], y[:120], [30] * 4), 60, **options).x
    data = packed(x, shuffled, [30] * 5)
    apart = [(vfl.simulate(config, regression(), data, 60, **options).x - clean).norm()
             for config in (FedAvg(), DGA(beta=10))]  # fmt: skip
    assert apart[1] < apart[0] / 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": -1.0}, "beta must be a finite number ≥ 0, not -1.0"),
        ({"statistic": "median"}, "statistic must be loss, variance, mean or rms, not 'median'"),
        ({"gradient": "all"}, "gradient must be steps or pseudo, not 'all'"),
        ({"aggregator": "median"}, "dga needs the weighted mean of its messages"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        DGA(**options)
    assert sentence in str(error.value) and "\n" not in str(error.value)
