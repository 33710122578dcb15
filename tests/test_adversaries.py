"""Adversaries: who they are, what they do, and that all others are left alone."""

import cli_runs
import numpy as np
import pytest
import torch
from cli_runs import here as here
from helpers import EMPTY, SIZES, N, assert_same, federated, mlp, regression, run

import vfl
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from vfl.cli import experiment as cli

WORK = {"clients_per_round": "all", "batch_size": None, "local_steps": 2, "evaluation": vfl.Evaluation(0)}


@pytest.mark.parametrize(("fraction", "count"), [(0, 0), (0.05, 0), (0.2, 2), (0.5, 4), (1, 7)])
def test_adversaries_are_so_many_of_the_clients_with_data(fraction, count):
    ids = vfl.adversaries(federated(), fraction, seed=1)
    assert len(ids) == len(set(ids)) == count
    assert EMPTY not in ids and (np.diff(ids) > 0).all()


def test_a_larger_fraction_adds_to_the_adversaries_and_another_seed_draws_others():
    drawn = [set(vfl.adversaries(federated(), fraction)) for fraction in (0.2, 0.5, 0.8)]
    assert drawn[0] < drawn[1] < drawn[2]
    assert len({tuple(vfl.adversaries(federated(), 0.4, seed)) for seed in range(5)}) > 1


def test_only_adversaries_have_their_labels_shuffled():
    clean, data = federated(), vfl.corrupt_labels(federated(), 0.5)
    bad = set(vfl.adversaries(clean, 0.5))
    assert torch.equal(data.clients.x, clean.clients.x)
    moved = set()
    for i in range(N):
        found, was = data.clients.client(i).y, clean.clients.client(i).y
        assert torch.equal(found.sort().values, was.sort().values)
        if not torch.equal(found, was):
            moved.add(i)
    assert moved and moved <= bad
    assert torch.equal(vfl.corrupt_labels(clean, 0.5).clients.y, data.clients.y)
    assert torch.equal(vfl.corrupt_labels(clean, 0).clients.y, clean.clients.y)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_mean_is_that_of_honest_and_flipped_messages(scale):
    """One round of FedAvg with each client alone gives its message; the adversaries' count −scale times."""
    data, task = federated(), regression()
    bad = vfl.adversaries(data, 0.4)
    assert len(bad) == 3
    total = np.zeros(len(task.x))
    for i, size in enumerate(SIZES):
        if size:
            alone = run(FedAvg(), task, data, 1, **WORK | {"sampling": f"fixed:{i}"})["server.x"] - task.x.numpy()
            total += size * alone * (-scale if i in bad else 1)
    algorithm = vfl.sign_flipping(FedAvg().build(task, N), data, 0.4, scale=scale)
    found = run(algorithm, task, data, 1, **WORK)["server.x"]
    np.testing.assert_allclose(found, task.x.numpy() + total / sum(SIZES), rtol=1e-10)


def test_without_adversaries_nothing_changes_and_vmap_equals_loop():
    data, task = federated(), mlp()
    algorithm = Scaffold().build(task, N)
    assert_same(
        run(vfl.sign_flipping(algorithm, data, 0), task, data, 3, **WORK), run(algorithm, task, data, 3, **WORK), 0
    )
    hostile = vfl.sign_flipping(algorithm, data, 0.5)
    by_one = run(hostile, task, data, 3, execution="loop", **WORK)
    assert_same(run(hostile, task, data, 3, chunk=3, **WORK), by_one, 1e-9)


def test_norm_clipping_is_the_servers_and_meets_what_adversaries_send():
    """However large the scale, no message counts for more than the bound."""
    data, task = federated(), regression()
    algorithm = vfl.sign_flipping(FedAvg(aggregator="norm_clip:0.1").build(task, N), data, 0.4, scale=1e6)
    assert np.linalg.norm(run(algorithm, task, data, 1, **WORK)["server.x"] - task.x.numpy()) <= 0.1 + 1e-12


def test_a_fraction_outside_zero_to_one_is_refused():
    with pytest.raises(vfl.UsageError, match=r"must be from 0 to 1, not 1\.5"):
        vfl.adversaries(federated(), 1.5)


def test_the_command_line_trains_on_the_same_corrupted_labels(here, monkeypatch):
    seen, real = [], cli.make_task
    monkeypatch.setattr(cli, "make_task", lambda call, data, *rest: (seen.append(data), real(call, data, *rest))[1])
    options = ("--rounds", 1, "--corrupt-labels", 0.5, "--seed", 2, "--aggregator", "median", "--out", "run")
    assert cli_runs.vfl("fedavg", *cli_runs.SMALL, *options) == 0
    clean = vfl.data.federated("synthetic:features=6,classes=3,examples=10,test=30", clients=10, seed=2)
    assert torch.equal(seen[0].clients.y, vfl.corrupt_labels(clean, 0.5, seed=2).clients.y)
    assert not torch.equal(seen[0].clients.y, clean.clients.y)


def test_flipped_messages_break_the_mean_and_not_the_robust_aggregators():
    """Ten clients, two of which send −5 times their change; scripts/robust_aggregation.py is the whole experiment."""
    data = vfl.data.federated("digits", partition="iid", clients=10, seed=0)
    torch.manual_seed(0)
    task = vfl.task(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))

    def accuracy(spec, fraction):
        algorithm = vfl.sign_flipping(FedAvg(aggregator=spec).build(task, 10), data, fraction, scale=5)
        options = {"clients_per_round": "all", "execution": "vmap", "evaluation": vfl.Evaluation(25)}
        return vfl.simulate(algorithm, task, data, 25, **options).history[-1]["test_accuracy"]

    clean = accuracy("mean", 0)
    assert clean > 0.9
    assert accuracy("mean", 0.2) < 0.4
    for spec in ("median", "multi_krum:f=2,m=6", "norm_clip:0.3"):
        assert accuracy(spec, 0.2) > clean - 0.03, spec
