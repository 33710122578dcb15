"""Replicas: runs that differ in their seeds alone, computed together, are those runs."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import ALGORITHMS, federated, norm_and_dropout, regression

import vfl
from algorithms.marina import Marina, PPMarina, VRMarina
from vfl.engine import Engine
from vfl.replicas import parse_grid
from vfl.simulate import make_engine

NEAR = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = {"clients_per_round": 4, "batch_size": 3, "chunk": 3}
OF_THE_RUN = ("chunk", "execution", "seconds", "memory", "round")  # not of one replica
SIZES = [3, 7, 5, 9, 2, 4, 8, 6]  # every client has examples


def together(algorithm, task, data, replicas, rounds, **options):
    """The states after each round and the metrics of R replicas."""
    return list(vfl.rounds(algorithm, task, data, rounds, seed=5, replicas=replicas, **OPTIONS, **options))


# What the server of these asks for depends on its state: an exchange in turn, or all clients when a coin says so.
ALTERNATING = [name for name in ALGORITHMS if name.startswith(("mime-", "ppmarina"))]
every_replicable = pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ALTERNATING])


@every_replicable
@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_each_replica_equals_the_run_of_its_seed_alone(name, execution):
    algorithm = ALGORITHMS[name]
    task, data = regression(), federated(SIZES)
    played = together(algorithm, task, data, 3, 3, execution=execution)
    for r in range(3):
        alone = list(vfl.rounds(algorithm, task, data, 3, seed=5 + r, execution="vmap", **OPTIONS))
        for (state, metrics), (wanted, expected) in zip(played, alone, strict=True):
            mine = state.replica(r)
            torch.testing.assert_close(list(vfl.base.leaves(mine.server)), list(vfl.base.leaves(wanted.server)), **NEAR)
            ids, rows = mine.store.rows()
            wanted_ids, wanted_rows = wanted.store.rows()
            assert ids.tolist() == wanted_ids.tolist()
            torch.testing.assert_close(rows, wanted_rows, **NEAR)
            for name in ("train_loss", "bits_up", "bits_down", "gradients", "test_loss", "test_accuracy"):
                np.testing.assert_allclose(metrics["replicas"][r][name], expected[name], rtol=1e-9, err_msg=name)
            assert metrics["replicas"][r].keys() - {"replica"} == set(expected) - set(OF_THE_RUN)


@pytest.mark.parametrize("kind", [Marina, PPMarina, VRMarina])
def test_replicas_whose_coins_differ_equal_their_runs_alone(kind):
    algorithm, task, data = kind(p=0.5), regression(), federated(SIZES)
    options = OPTIONS | {"clients_per_round": "all"}
    played = list(vfl.rounds(algorithm, task, data, 4, seed=5, replicas=2, execution="vmap", **options))
    coins = [state.server.sync.tolist() for state, _ in played]
    assert any(len(set(coin)) == 2 for coin in coins), "the replicas' coins never differ"
    for r in range(2):
        alone = list(vfl.rounds(algorithm, task, data, 4, seed=5 + r, execution="vmap", **options))
        for (state, metrics), (wanted, expected) in zip(played, alone, strict=True):
            mine = state.replica(r).server
            torch.testing.assert_close(list(vfl.base.leaves(mine)), list(vfl.base.leaves(wanted.server)), **NEAR)
            for name in ("train_loss", "bits_up", "bits_down", "gradients"):
                np.testing.assert_allclose(metrics["replicas"][r][name], expected[name], rtol=1e-9, err_msg=name)


def test_replicas_with_batch_norm_and_dropout_equal_their_runs_alone():
    task, data = norm_and_dropout(), federated(SIZES)
    state, _ = together(ALGORITHMS["fedavg"], task, data, 2, 3, execution="vmap")[-1]
    for r in range(2):
        wanted = vfl.simulate(ALGORITHMS["fedavg"], task, data, 3, seed=5 + r, execution="vmap", **OPTIONS).state
        torch.testing.assert_close(state.server.x[r], wanted.server.x, **NEAR)
        torch.testing.assert_close([b[r] for b in state.buffers], list(wanted.buffers), **NEAR)


def test_a_round_reports_the_mean_and_the_standard_deviation_over_replicas():
    _, metrics = together(ALGORITHMS["fedavg"], regression(), federated(SIZES), 4, 2, execution="vmap")[-1]
    values = [row["train_loss"] for row in metrics["replicas"]]
    assert len(set(values)) == 4
    assert metrics["train_loss"] == pytest.approx(np.mean(values))
    assert metrics["train_loss_std"] == pytest.approx(np.std(values, ddof=1))
    assert metrics["round"] == 2


def test_a_traced_program_of_replicas_gives_the_results_of_vmap(monkeypatch):
    monkeypatch.setattr(vfl.programs, "compile_graph", lambda graph, inputs: graph)
    task, data = regression(), federated(SIZES)
    wanted, _ = together(ALGORITHMS["scaffold-option=2"], task, data, 3, 4, execution="vmap")[-1]
    found, metrics = together(ALGORITHMS["scaffold-option=2"], task, data, 3, 4, execution="compile")[-1]
    assert metrics["execution"] == "compile"
    torch.testing.assert_close(found.server.x, wanted.server.x, **NEAR)


def test_a_traced_program_of_marinas_replicas_tells_its_two_models_apart(monkeypatch):
    monkeypatch.setattr(vfl.programs, "compile_graph", lambda graph, inputs: graph)
    options = {"clients_per_round": "all", "batch_size": None, "chunk": 3, "replicas": 2, "seed": 5}
    # Of the first round, when the two are equal, the second chunk is traced.
    work = Marina(p=0.5), regression(), federated([4] * 6), 3
    wanted = vfl.simulate(*work, execution="vmap", **options)
    found = vfl.simulate(*work, execution="compile", **options)
    assert found.history[-1]["execution"] == "compile"
    torch.testing.assert_close(found.x, wanted.x, **NEAR)


def test_replicas_may_start_from_models_of_their_own():
    task, data = regression(), federated(SIZES)
    player = make_engine(ALGORITHMS["fedavg"], task, data, replicas=2, execution="vmap", **OPTIONS)
    start = torch.stack([task.x, task.x + 1])
    state, _ = player.play(player.init(5, start))
    one = make_engine(ALGORITHMS["fedavg"], task, data, execution="vmap", **OPTIONS)
    wanted, _ = one.play(one.init(6, start[1]))
    torch.testing.assert_close(state.server.x[1], wanted.server.x, **NEAR)


@pytest.mark.parametrize("name", ALTERNATING)
def test_replicas_of_an_algorithm_that_looks_at_its_state_are_refused(name):
    with pytest.raises(vfl.UsageError, match="replicas cannot be played together"):
        together(ALGORITHMS[name], regression(), federated(SIZES), 2, 1)


def test_a_grid_of_an_option_that_the_algorithm_lacks_is_refused():
    with pytest.raises(vfl.UsageError, match="Scaffnew has no option server-lr for a grid to vary"):
        grid = vfl.Replication(1, {"server_lr": (0.1,)})
        together(ALGORITHMS["scaffnew-p=0.5"], regression(), federated(SIZES), grid, 1)


@every_replicable
def test_each_replica_of_a_grid_equals_the_run_with_its_step_sizes(name):
    algorithm, task, data = ALGORITHMS[name], regression(), federated(SIZES)
    values = {"server_lr": (0.5, 0.1), "local_lr": (0.02, 0.05)}
    grid = vfl.Replication(2, {name: v for name, v in values.items() if hasattr(algorithm, name)})
    state, metrics = together(algorithm, task, data, grid, 3, execution="vmap")[-1]
    assert len(grid.settings()) == len(metrics["replicas"]) == 2 * 2 ** len(grid.grid)
    for r, setting in enumerate(grid.settings()):
        values = {name: setting[name] for name in grid.grid}
        alone = dataclasses.replace(algorithm, **values)
        seed = 5 + setting["replica"]
        wanted = vfl.simulate(alone, task, data, 3, seed=seed, execution="vmap", **OPTIONS).state
        torch.testing.assert_close(state.server.x[r], wanted.server.x, **NEAR)
        assert values.items() <= metrics["replicas"][r].items()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mu=0.1", "a grid varies local-lr or server-lr, not mu"),
        ("server-lr=0.1,-1", "a grid of server-lr needs finite numbers ≥ 0"),
        ("server-lr", "is not like server-lr=0.1,0.2,0.5"),
        ("server-lr=a", "is not like server-lr=0.1,0.2,0.5"),
        ("server-lr=0.1;", "is not like server-lr=0.1,0.2,0.5"),
    ],
)
def test_a_grid_that_is_none_is_refused(text, says):
    with pytest.raises(vfl.UsageError, match=says):
        vfl.Replication(1, parse_grid(text)).check()


def test_a_grid_is_read_from_text():
    assert parse_grid("server-lr=0.1,0.2; local-lr=1") == {"server_lr": (0.1, 0.2), "local_lr": (1.0,)}
    assert parse_grid(None) == {}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"replicas": 0}, "replicas must be at least 1, not 0"),
        ({"replicas": 2, "sampling": "poisson"}, "replicas need cohorts of one size"),
        ({"replicas": 2, "ranks": vfl.Ranks(0, 2)}, "replicas run on one rank"),
    ],
)
def test_what_replicas_cannot_do_is_refused(changed, says):
    task = regression()
    algorithm = ALGORITHMS["fedavg"].build(task, 8)
    with pytest.raises(vfl.UsageError, match=says):
        Engine(algorithm, task, federated(SIZES), clients_per_round=4, **changed)


def test_replicas_need_every_client_to_have_examples():
    with pytest.raises(vfl.UsageError, match="every client to have examples"):
        together(ALGORITHMS["fedavg"], regression(), federated([3, 0, 5, 6]), 2, 1)
