"""Layers by name: what patterns mean, and what frozen ones are."""

import pytest
import torch
from helpers import SIZES, N, federated, make_task, run
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from vfl.names import select

NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"]
BUFFERS = ["body.1.running_mean"]
NORMS = {"body.1.weight", "body.1.bias", "body.1.running_mean"}
OPTIONS = {"clients_per_round": 5, "batch_size": 4, "chunk": 100}


# Names


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ("head.*", NAMES[4:]),
        ("last", NAMES[4:]),
        ("norm", [*NAMES[2:4], *BUFFERS]),
        ("body.1.*", [*NAMES[2:4], *BUFFERS]),
        ("*.bias", [NAMES[1], NAMES[3], NAMES[5]]),
        ("*,!last", [*NAMES[:4], *BUFFERS]),
        ("*, !norm, body.1.bias", [*NAMES[:2], NAMES[3], *NAMES[4:]]),
        ("body.[0].w*", NAMES[:1]),
    ],
)
def test_patterns_mean_these_parameters_and_buffers(patterns, chosen):
    assert select(patterns, NAMES, BUFFERS, NORMS, "personal") == set(chosen)


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        ("tail.*", "no parameter of the model matches 'tail.*'; it has body.0.weight, body.0.bias"),
        ("last,tail.*", "no parameter of the model matches 'tail.*'"),
        ("", "no parameter of the model matches ''"),
        ("!last", "takes out all that it puts in"),
        ("last,!*", "takes out all that it puts in"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(patterns, sentence):
    with pytest.raises(vfl.UsageError) as error:
        select(patterns, NAMES, BUFFERS, NORMS, "frozen")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_normalization_layers_are_known_by_their_class():
    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.g * x

    class Normalized(nn.Linear):
        pass

    layers = [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), ScaleNorm(), Normalized(4, 4)]
    task = vfl.task(nn.Sequential(*layers))
    norms = {"0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias",
             "2.weight", "2.bias", "3.g"}  # fmt: skip
    assert {n for n in task.norms if n in (*task.names, *task.buffer_names)} == norms
    with pytest.raises(vfl.UsageError, match="the model has no normalization layer"):
        vfl.task(nn.Linear(3, 2), frozen="norm")


# Frozen


def test_frozen_parameters_are_constants_outside_x_and_are_not_sent():
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    whole, task = make_task(module), vfl.task(module, dtype=torch.float64, frozen="0.*")
    assert task.names == ("2.weight", "2.bias")
    assert torch.equal(task.x, whole.x[24:])
    found = run(FedAvg(), task, federated(), 2, **OPTIONS)
    floats = found["metric.bits_up"][0] / 64 / len([i for i in range(N) if SIZES[i]])
    assert floats <= 15
    assert found["metric.bits_down"][0] == 5 * 15 * 64
    state = task.state_dict(torch.from_numpy(found["server.x"]), ())
    for name, before in module.state_dict().items():
        assert torch.equal(state[name], before.double()) == name.startswith("0."), name
    assert all(p.requires_grad for p in module.parameters()), "the module itself is left alone"


def test_the_gradient_of_the_others_is_the_one_without_freezing():
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    whole, data = make_task(module), federated().clients
    task = vfl.task(module, dtype=torch.float64, frozen="*,!0.bias")
    batch = vfl.Batch(data.x, data.y, torch.ones(len(data.y), dtype=torch.bool), vfl.random.key(0))
    for f in (lambda t: t.grad_fn(t.x, batch, ())[0], lambda t: torch.func.vmap(t.grad_fn, (0, None, None))(
            t.x[None], batch, ())[0][0]):  # fmt: skip
        torch.testing.assert_close(f(task), whole.parameters(f(whole))["0.bias"], rtol=1e-12, atol=0)


def test_a_frozen_batch_norm_normalizes_by_its_statistics_and_leaves_them():
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    module[1].running_mean += 0.3
    for frozen, moves in (("1.*", False), ("norm", False), ("0.*", True)):
        task = vfl.task(module, dtype=torch.float64, frozen=frozen)
        state, _ = vfl.simulate(FedAvg(), task, federated(), 1, execution="vmap", **OPTIONS)
        assert (not torch.allclose(state.buffers[0], task.buffers[0], rtol=1e-12)) == moves, frozen
    task = vfl.task(module, dtype=torch.float64, frozen="norm")
    data = federated().clients
    batch = vfl.Batch(data.x, data.y, torch.ones(len(data.y), dtype=torch.bool), vfl.random.key(0))
    _, aux = task.grad_fn(task.x, batch, task.buffers)
    torch.testing.assert_close(aux.loss, task.evaluate(task.x, batch, task.buffers)["loss"].sum())


def test_a_module_that_is_frozen_whole_and_a_pattern_without_a_match_are_refused():
    with pytest.raises(vfl.UsageError, match="nothing to train"):
        vfl.task(nn.Linear(3, 2), frozen="*")
    with pytest.raises(vfl.UsageError, match=r"frozen 'head\.\*': no parameter"):
        vfl.task(nn.Linear(3, 2), frozen="head.*")
