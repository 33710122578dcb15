"""Personalized methods: what is personal never leaves its client, and serves it better than the global model."""

import pytest
import torch
from helpers import SIZES, N, federated, make_task, mlp, norm_and_dropout
from torch import nn

import vfl
from algorithms.apfl import APFL
from algorithms.ditto import Ditto
from algorithms.fedavg import FedAvg
from algorithms.fedbn import FedBN
from algorithms.fedper import FedPer
from algorithms.fedrep import FedRep
from algorithms.lgfedavg import LGFedAvg
from vfl.names import select
from vfl.partial import personal_part

OPTIONS = {"clients_per_round": 5, "batch_size": 4, "chunk": 100}


# The part that is personal


@pytest.mark.parametrize("patterns", ["*bias", "1.*", "last", "0.weight,norm", "*,!0.*"])
def test_a_model_taken_apart_and_put_together_is_the_same(patterns):
    task = norm_and_dropout()
    part = personal_part(task, patterns)
    x = torch.arange(len(task.x), dtype=torch.float64)
    inside, outside = part.split(x)
    assert len(inside) + len(outside) == len(x)
    assert torch.equal(part.join(inside, outside), x)
    assert torch.equal(torch.func.vmap(lambda v: part.join(*part.split(v)))(x.expand(3, -1)), x.expand(3, -1))
    names = select(patterns, task.names, task.buffer_names, task.norms, "personal")
    wanted = [task.parameters(x)[n].flatten() for n in task.names if n in names]
    assert torch.equal(inside, torch.cat(wanted))
    other = tuple(b + 1 for b in task.buffers)
    joined = part.join_buffers(part.own_buffers(other), task.buffers)
    for name, b, found in zip(task.buffer_names, task.buffers, joined, strict=True):
        assert torch.equal(found, b + 1 if name in names else b)


def test_statistics_alone_may_be_personal():
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    task = make_task(module)
    result = vfl.simulate(FedBN(), task, federated(), 2, execution="vmap", **OPTIONS)
    _, (own, mean, *_) = result.state.store.rows()
    assert own.shape[1] == 0
    assert mean.std(0).min() > 0.01, "every client has statistics of its own"


def test_all_parameters_cannot_be_personal():
    with pytest.raises(vfl.UsageError, match="at least one must be shared"):
        FedPer().build(vfl.task(nn.Linear(3, 2)), N)


@pytest.mark.parametrize("config", [FedPer(), FedRep(), FedBN(), LGFedAvg()])
def test_only_shared_entries_are_sent_and_personal_ones_never_reach_the_server(config):
    task = norm_and_dropout()
    part = personal_part(task, config.personal)
    result = vfl.simulate(config, task, federated(), 3, execution="vmap", evaluation=vfl.Evaluation(0, 1), **OPTIONS)
    initial, shared = part.split(task.x)
    own, moved = part.split(result.x)
    assert torch.equal(own, initial)
    assert (moved - shared).abs().max() > 0.01
    metrics = result.history[0]
    assert metrics["bits_down"] == 5 * len(shared) * 64
    assert metrics["bits_up"] in [clients * len(shared) * 64 for clients in (4, 5)]
    for name, b, before in zip(task.buffer_names, result.state.buffers, task.buffers, strict=True):
        personal = name in select(config.personal, task.names, task.buffer_names, task.norms, "personal")
        assert torch.allclose(b.double(), before.double(), rtol=1e-12) == personal, name
    _, (rows, *_) = result.state.store.rows()
    assert rows.shape[1] == len(initial)
    assert (rows.std(0) > 1e-4).any(), "personal entries differ from client to client"


def test_what_is_shared_is_compressed_by_itself():
    task = mlp()
    config = FedPer(compressor="top_k:3")
    result = vfl.simulate(config, task, federated(), 1, execution="vmap", **OPTIONS)
    clients = result.history[0]["bits_up"] / (3 * (64 + 5))  # 24 shared entries have positions of 5 bits
    assert clients in (4, 5)
    assert (result.x != task.x).sum() <= 3 * clients


def test_fedrep_trains_the_head_before_the_body_and_counts_both():
    task, passes = mlp(), 3
    options = {"clients_per_round": "all", "batch_size": None, "execution": "vmap"}
    result = vfl.simulate(FedRep(head_passes=passes), task, federated(), 1, **options)
    assert result.history[0]["gradients"] == (passes + 1) * sum(SIZES)
    with pytest.raises(vfl.UsageError, match="head-passes must be at least 1, not 0"):
        FedRep(head_passes=0)


# Ditto and APFL


def test_dittos_global_model_is_fedavgs_and_its_personal_ones_come_nearer_as_lambda_grows():
    task, distances = mlp(), []
    plain = vfl.simulate(FedAvg(), task, federated(), 4, execution="vmap", **OPTIONS)
    for lam in (0.0, 1.0, 9.0):  # η λ < 1
        state, _ = vfl.simulate(Ditto(lam=lam), task, federated(), 4, execution="vmap", **OPTIONS)
        assert torch.equal(state.server.x, plain.x)
        _, (v,) = state.store.rows()
        distances.append(float((v - state.server.x).norm(dim=1).mean()))
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < distances[0] / 2


def test_apfls_global_model_is_fedavgs_and_its_share_is_learned_within_its_bounds():
    task = mlp()
    plain = vfl.simulate(FedAvg(), task, federated(), 6, execution="vmap", **OPTIONS)
    for alpha_lr in (0.0, 0.1, 50.0):
        state, _ = vfl.simulate(APFL(alpha_lr=alpha_lr), task, federated(), 6, execution="vmap", **OPTIONS)
        torch.testing.assert_close(state.server.x, plain.x, rtol=1e-12, atol=1e-12)
        _, (_, alpha, *_) = state.store.rows()
        assert (alpha == 0.5).all() == (alpha_lr == 0)
        assert ((alpha >= 0) & (alpha <= 1)).all()
        assert ((alpha == 0) | (alpha == 1)).any() == (alpha_lr == 50)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_apfl_with_a_fixed_share_is_fedavg_or_training_alone(alpha):
    task, data = mlp(), federated()
    options = {"evaluation": vfl.Evaluation(0, 1), "execution": "vmap", **OPTIONS | {"clients_per_round": "all"}}
    found = vfl.simulate(APFL(alpha=alpha, alpha_lr=0), task, data, 3, **options).history[-1]
    wanted = vfl.simulate(Ditto(lam=0), task, data, 3, **options).history[-1]
    name = "client_train_loss_mean" if alpha == 0 else "personal_train_loss_mean"
    assert found["personal_train_loss_mean"] == pytest.approx(wanted[name], rel=1e-12)


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (Ditto, {"lam": -1.0}, "lam must be a finite number ≥ 0, not -1.0"),
        (APFL, {"alpha": 1.5}, "alpha must be from 0 to 1, not 1.5"),
        (APFL, {"alpha_lr": float("inf")}, "alpha-lr must be a finite number ≥ 0, not inf"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(config, options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        config(**options)
    assert sentence in str(error.value)


# What personal models are for


SKEWED = {"clients_per_round": 10, "batch_size": 10, "execution": "vmap", "evaluation": vfl.Evaluation(0, 15)}


@pytest.fixture(scope="module")
def skewed():
    """Digits, two of the ten to a client, whose own test examples have the same two; FedAvg's accuracy on them."""
    data = vfl.data.federated("digits", partition="labels:2", clients=20, held_out=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = vfl.task(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
    return data, task, vfl.simulate(FedAvg(), task, data, 15, **SKEWED).history[-1]["client_test_accuracy_mean"]


@pytest.mark.parametrize(
    "config", [Ditto(), APFL(), FedPer(), FedRep(), LGFedAvg()], ids=lambda config: type(config).__name__
)
def test_personal_models_beat_the_global_one_on_a_label_skewed_split(config, skewed):
    data, task, shared = skewed
    found = vfl.simulate(config, task, data, 15, **SKEWED).history[-1]["personal_test_accuracy_mean"]
    print(f"{type(config).__name__} {found:.3f}, FedAvg {shared:.3f}")
    assert found > shared + 0.02


def test_fine_tuning_the_global_model_beats_it_on_a_label_skewed_split(skewed):
    data, task, shared = skewed
    tuned = vfl.FineTuning(fine_tune_steps=10).wrap(FedAvg().build(task, 20), task, 20)
    found = vfl.simulate(tuned, task, data, 15, **SKEWED).history[-1]
    print(f"fine-tuned {found['personal_test_accuracy_mean']:.3f}, FedAvg {shared:.3f}")
    assert found["client_test_accuracy_mean"] == shared
    assert found["personal_test_accuracy_mean"] > shared + 0.02
