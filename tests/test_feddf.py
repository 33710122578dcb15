"""FedDF beside its reference in papers_personal.py: what is sent, and what the server learns from it."""

import pytest
import torch
from helpers import CLASSES, N, federated, mlp, norm_and_dropout, regression
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from algorithms.feddf import FedDF, Public, feddf, public_inputs
from vfl.data.container import cast

PUBLIC = "synthetic:features=5"
ALL = {"clients_per_round": 6, "batch_size": 4, "execution": "vmap", "chunk": 100}


@pytest.mark.parametrize(("sends", "floats"), [("model+logits", 39 + 40 * CLASSES), ("logits", 40 * CLASSES)])
def test_the_bits_are_those_of_what_is_sent(sends, floats):
    config = FedDF(public=PUBLIC, public_examples=40, sends=sends)
    metrics = vfl.simulate(config, mlp(), federated(), 1, **ALL).history[0]
    assert len(mlp().x) == 39
    assert metrics["bits_up"] in [clients * floats * 64 for clients in (5, 6)]
    assert metrics["bits_down"] == 6 * 39 * 64


def test_the_model_is_compressed_and_the_logits_are_not():
    config = FedDF(public=PUBLIC, public_examples=40, compressor="top_k:3")
    metrics = vfl.simulate(config, mlp(), federated(), 1, **ALL).history[0]
    one = 3 * (64 + 6) + 40 * CLASSES * 64  # 39 entries have positions of 6 bits
    assert metrics["bits_up"] in [clients * one for clients in (5, 6)]


def test_without_steps_it_is_fedavg():
    for task in (mlp(), norm_and_dropout()):
        found = vfl.simulate(FedDF(public=PUBLIC, distill_steps=0), task, federated(), 3, **ALL)
        assert torch.allclose(found.x, vfl.simulate(FedAvg(), task, federated(), 3, **ALL).x, rtol=1e-12, atol=1e-12)
        assert "distill_loss" not in found.history[0]


def test_many_steps_reach_the_ensemble_that_a_linear_model_can_be():
    """The mean of linear models' logits is a linear model's: distillation ends at their plain mean, KL 0."""
    task, x = regression(), torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"distill_optimizer": "sgd", "distill_lr": 2.0, "distill_steps": 400}
    result = {}
    for weighting in ("examples", "uniform"):
        config = FedDF(sends="logits", weighting=weighting, **options)
        run = vfl.simulate(feddf(config, task, Public(x, cast)), task, federated(), 1, **ALL)
        result[weighting] = task.outputs(run.x, vfl.Batch(x, x, x[:, 0] > -9, vfl.random.key(0)), ())
    plain = vfl.simulate(FedAvg(weighting="uniform"), task, federated(), 1, **ALL).x
    wanted = task.outputs(plain, vfl.Batch(x, x, x[:, 0] > -9, vfl.random.key(0)), ())
    for found in result.values():  # clients count alike in the ensemble, whatever their weight
        torch.testing.assert_close(found.softmax(1), wanted.softmax(1), rtol=0, atol=1e-4)


def test_the_rate_follows_its_schedule_within_a_round():
    task = regression()
    one = FedDF(public=PUBLIC, public_examples=30, distill_optimizer="sgd", distill_lr=0.5, distill_steps=1)
    stopped = FedDF(public=PUBLIC, public_examples=30, distill_optimizer="sgd", distill_lr=0.5, distill_steps=5,
                    distill_schedule="cosine:1")  # fmt: skip
    found, wanted = (vfl.simulate(config, task, federated(), 2, **ALL).x for config in (stopped, one))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_server_that_is_sent_logits_alone_learns_from_them():
    data = vfl.data.federated("digits", partition="dirichlet:0.3", clients=20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = vfl.task(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
    options = {"clients_per_round": 5, "batch_size": 10, "local_epochs": 3, "execution": "vmap"}
    config = FedDF(sends="logits", distill_lr=1e-2)
    history = vfl.simulate(config, task, data, 12, evaluation=vfl.Evaluation(100), **options).history
    print(f"test accuracy {history[-1]['test_accuracy']:.3f} from logits alone")
    assert history[-1]["test_accuracy"] > 0.75
    assert history[-1]["distill_loss"] > 0


def test_the_public_inputs_are_the_same_in_every_build_and_different_from_each_other():
    first, _ = public_inputs("digits", 50)
    public_inputs.cache_clear()
    again, _ = public_inputs("digits", 50)
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.flatten(1).tolist()}) == 50
    assert len(public_inputs("digits", 10**6)[0]) == len(vfl.data.load("digits").train.y)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"public_examples": 0}, "public-examples must be at least 1, not 0"),
        ({"distill_batch_size": 0}, "distill-batch-size must be at least 1, not 0"),
        ({"distill_steps": -1}, "distill-steps must be at least 0, not -1"),
        ({"distill_lr": -1.0}, "distill-lr must be a finite number ≥ 0, not -1.0"),
        ({"sends": "models"}, "sends must be model+logits or logits, not 'models'"),
        ({"sends": "logits", "compressor": "natural"}, "compressor must be identity, not 'natural'"),
        ({"distill_schedule": "cosin:10"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        FedDF(**options)
    assert sentence in str(error.value)


def test_public_inputs_that_the_model_cannot_take_are_refused():
    with pytest.raises(vfl.UsageError, match=r"the model cannot take the public inputs \(1×8×8\)"):
        FedDF().build(mlp(), N)
    with pytest.raises(vfl.UsageError, match="unknown data set 'digit'"):
        FedDF(public="digit").build(mlp(), N)
