"""A round whose cohort is empty still releases noise and is accounted for, else it would show that it was empty."""

import numpy as np
import pytest
import torch
from helpers import N, assert_same, federated, mlp, norm_and_dropout, state_numbers

import vfl
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from vfl import checkpoint
from vfl.privacy import Context, Privacy

FEW = {"clients_per_round": 1, "sampling": "poisson", "batch_size": 4}


def private_run(task: vfl.Task) -> vfl.Algorithm:
    options = Privacy(clip=0.2, noise_multiplier=3, delta=1e-3, accountant="rdp")
    return options.wrap(FedAvg().build(task, N), task, Context(N, 1, "poisson", 12))


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_every_round_has_a_step_and_an_epsilon(seed):
    state, history = vfl.simulate(private_run(mlp()), mlp(), federated(), 12, seed=seed, execution="vmap", **FEW)
    silent = [not (m["clients"] and m["train_loss"] == m["train_loss"]) for m in history]
    assert any(silent) and not all(silent)
    assert int(state.server.t) == 12
    spent = [m["epsilon"] for m in history]
    assert spent == sorted(set(spent)), "each round costs"
    assert all(np.isfinite(m["epsilon"]) for m in history)


def test_a_silent_round_moves_the_model_by_noise_alone_even_as_the_first_one():
    task = mlp()
    for seed in range(40):
        engine = vfl.Engine(private_run(task), task, federated(), clients_per_round=1, sampling="poisson")
        start = engine.init(seed)
        state, metrics = engine.play(start)
        if metrics["clients"] == 0:
            moved = (state.server.x - task.x).numpy()
            assert 0.2 * 3 * 0.5 < np.sqrt((moved**2).mean()) < 0.2 * 3 * 2
            return
    raise AssertionError("no first round was empty")


def test_a_resume_into_a_silent_round_is_an_uninterrupted_run(tmp_path):
    task, seen = mlp(), 0
    engine = vfl.Engine(private_run(task), task, federated(), execution="vmap", chunk=3,
                        **{k: v for k, v in FEW.items() if k != "batch_size"})  # fmt: skip
    state = engine.init(3)
    for t in range(12):
        checkpoint.save(tmp_path, state, {}, keep=1)
        after, metrics = engine.play(state)
        if metrics["clients"] == 0:
            seen += 1
            fresh = vfl.Engine(private_run(task), task, federated(), execution="vmap", chunk=3,
                               **{k: v for k, v in FEW.items() if k != "batch_size"})  # fmt: skip
            again, _ = fresh.play(checkpoint.load(checkpoint.of_round(tmp_path, t), fresh.init(3), {}))
            assert_same(state_numbers(again), state_numbers(after), 0)
        state = after
    assert seen > 1


def test_other_algorithms_have_no_step_in_a_silent_round_and_keep_their_buffers():
    task = norm_and_dropout()
    engine = vfl.Engine(Scaffold().build(task, N), task, federated(), clients_per_round=1, sampling="poisson")
    state, seen = engine.init(3), 0
    for _ in range(12):
        before = [state.server.x, *state.buffers]
        state, metrics = engine.play(state)
        if metrics["clients"] == 0:
            seen += 1
            assert all(torch.equal(a, b) for a, b in zip(before, [state.server.x, *state.buffers], strict=True))
    assert seen
