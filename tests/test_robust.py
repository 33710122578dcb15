"""Aggregators against their definitions in numpy, alone and in the engine's rounds, and what they are for."""

import numpy as np
import pytest
import torch
from helpers import (
    ALGORITHMS,
    FEATURES,
    PARTIAL,
    SIZES,
    N,
    assert_same,
    federated,
    make_task,
    mlp,
    numbers_of,
    packed,
    regression,
    run,
)
from papers import own_rows
from papers_robust import RULES, aggregated, nearest_the_optimum
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from algorithms.fednova import FedNova
from algorithms.fedprox import FedProx
from algorithms.scaffold import Scaffold
from vfl import gather, programs, robust
from vfl.reduce import layout

OFF = vfl.Evaluation(0)
GATHERED = [spec for spec in RULES if vfl.aggregator(spec).combine]
every_rule = pytest.mark.parametrize("spec", RULES)
every_gathered_rule = pytest.mark.parametrize("spec", GATHERED)


def alone(part):
    """The sum over one rank."""
    return part


def messages(S=9, D=40):
    """Rows [S, D] and weights [S] float64, the last two rows far away."""
    draw = np.random.default_rng(S)
    rows = draw.standard_normal((S, D))
    rows[-2:] *= 50
    return rows, draw.uniform(0.5, 3, S)


@every_gathered_rule
@pytest.mark.parametrize("S", [7, 8, 31])
def test_a_rule_equals_its_definition_in_numpy(spec, S):
    rows, weight = messages(S)
    found = vfl.aggregator(spec).combine(torch.from_numpy(rows), torch.from_numpy(weight), alone)
    np.testing.assert_allclose(found, RULES[spec](rows, weight), rtol=1e-10, atol=1e-12)


def test_a_share_cuts_as_many_as_it_says_whatever_its_float():
    rows = torch.arange(100, dtype=torch.float64)[:, None] ** 3  # 0.29 · 100 is 28.999999999999996
    found = vfl.aggregator("trimmed_mean:0.29").combine(rows, torch.ones(100), alone)
    np.testing.assert_allclose(found, rows[29:71].mean(0), rtol=1e-12)


@every_gathered_rule
def test_a_rule_on_slices_of_the_coordinates_is_the_rule_on_all(spec):
    rows, weight = (torch.from_numpy(part) for part in messages())
    parts = rows.split([17, 0, 23], dim=1)  # as on three ranks, one of them without any

    def total(known):
        """What the sums over the ranks were when all coordinates lay on one; each rank asks for them in one order."""
        return lambda part: known.pop(0).reshape(part.shape)

    sums: list[torch.Tensor] = []
    whole = vfl.aggregator(spec).combine(rows, weight, lambda part: sums.append(part.clone()) or part)
    slices = [vfl.aggregator(spec).combine(part, weight, total(list(sums))) for part in parts]
    np.testing.assert_allclose(torch.cat(slices), whole, rtol=1e-10, atol=1e-12)


def test_rows_are_sorted_in_blocks_as_at_once(monkeypatch):
    rows, weight = (torch.from_numpy(part) for part in messages())
    for spec in GATHERED:
        combine = vfl.aggregator(spec).combine
        wanted = combine(rows, weight, alone)
        with monkeypatch.context() as patched:
            patched.setattr(robust, "_BLOCK", 7 * len(rows))
            np.testing.assert_allclose(combine(rows, weight, alone), wanted, rtol=1e-12, atol=1e-12)


def test_distances_of_messages_close_to_each_other_keep_their_digits():
    rows = 1e4 + np.random.default_rng(0).standard_normal((5, 30)).astype(np.float32)
    found = robust.squared_distances(torch.from_numpy(rows), alone)
    wide = rows.astype(np.float64)
    wanted = ((wide[:, None] - wide[None]) ** 2).sum(-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_weiszfeld_steps_end_in_the_geometric_median():
    rows, weight = messages(D=6)
    combine = vfl.aggregator("geometric_median:iterations=300,eps=1e-9").combine
    z = combine(torch.from_numpy(rows), torch.from_numpy(weight), alone).numpy()
    assert nearest_the_optimum(rows, weight, z)
    assert not nearest_the_optimum(rows, weight, np.average(rows, axis=0, weights=weight))


@pytest.mark.parametrize("spec", ["median", "trimmed_mean:0.3", "krum:f=2", "geometric_median:iterations=20"])
def test_two_of_nine_messages_move_a_robust_rule_only_so_far(spec):
    rows, weight = (torch.from_numpy(part) for part in messages())
    weight = torch.ones_like(weight)
    honest = rows[:-2]
    combine = vfl.aggregator(spec).combine
    radius = (honest - honest.mean(0)).norm(dim=1).max()
    for size in (1e3, 1e6):
        rows[-2:] = size
        assert (combine(rows, weight, alone) - honest.mean(0)).norm() < 2 * radius


# In the engine's rounds


def everyone(t):
    """All clients take 3 steps on all of their data."""
    return {i: [own_rows(i)] * 3 if SIZES[i] else [] for i in range(N)}


ALL = {"clients_per_round": "all", "batch_size": None, "local_steps": 3, "evaluation": OFF}


@every_rule
def test_a_run_equals_numpy_in_chunks_and_one_by_one(spec):
    task, config = regression(), FedAvg(aggregator=spec)
    wanted = aggregated(config, everyone, task.x.numpy(), RULES[spec], 6)
    for options in ({"chunk": 100}, {"chunk": 3}, {"execution": "loop"}, {"client_state": "host", "chunk": 2}):
        found = run(config, task, federated(), 6, **ALL, **options)
        assert np.abs(found["server.x"] - task.x.numpy()).max() > 0.05
        assert_same({"server.x": found["server.x"]}, {"server.x": wanted["server.x"]}, 1e-10, options)
        assert found["metric.bits_up"][-1] == wanted["bits_up"]


@pytest.mark.parametrize("spec", ["multi_krum:f=1,m=3", "norm_clip:0.2"])
def test_compiled_equals_vmap(spec, monkeypatch):
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)  # what is compiled, uncompiled
    config, options = FedAvg(aggregator=spec), ALL | {"chunk": 100, "local_steps": 1}
    wanted = run(config, mlp(), federated(), 2, **options)
    assert_same(run(config, mlp(), federated(), 2, execution="compile", **options), wanted, 1e-9)


def test_scaffolds_message_is_one_vector():
    """In its first round c and cᵢ are 0, so Δcᵢ = −Δyᵢ/(Kη), and Krum must take both of one client."""
    task = regression()
    found = run(Scaffold(aggregator="krum:f=2"), task, federated(), 1, **ALL)
    change = found["server.x"] - task.x.numpy()
    np.testing.assert_allclose(found["server.c"], -change / 0.3 * 7 / N, rtol=1e-10)
    assert any(np.allclose(found["client.0"][i], -change / 0.3, rtol=1e-10) for i in range(7))


def test_the_median_of_scaffolds_parts_is_that_of_each():
    task = regression()
    found = run(Scaffold(aggregator="median"), task, federated(), 1, **ALL)
    np.testing.assert_allclose(found["server.c"], 7 / N * np.median(found["client.0"], axis=0), rtol=1e-10)


def spoilt():
    data = federated()
    data.clients.client(2).x[0, 0] = np.nan
    return data


@pytest.mark.parametrize("spec", [spec for spec in GATHERED if spec != "krum:f=2"])  # which needs 7 messages
def test_a_client_dropped_for_nan_is_not_among_the_messages(spec):
    config, options = FedAvg(aggregator=spec), ALL | {"seed": 5}
    found = run(config, regression(), spoilt(), 3, on_nonfinite="drop", **options)
    others = [i for i in range(N) if i != 2]
    sizes = [SIZES[i] for i in others]
    rows = np.concatenate([own_rows(i) for i in others])
    clean = federated()
    without = packed(clean.clients.x[rows], clean.clients.y[rows], sizes)
    wanted = run(config, regression(), without, 3, **options)
    assert_same({"server.x": found["server.x"]}, {"server.x": wanted["server.x"]}, 1e-12)
    assert found["metric.dropped"].tolist() == [1, 1, 1]


def test_a_client_with_nan_stops_the_run_under_a_robust_rule_too():
    with pytest.raises(vfl.DivergedError) as error:
        run(FedAvg(aggregator="median"), regression(), spoilt(), 3, **ALL)
    assert (error.value.round, error.value.clients) == (1, [2])


def test_replicas_equal_their_runs_alone():
    data = packed(*federated().clients[:2], [size for size in SIZES if size])
    config, options = FedAvg(aggregator="multi_krum:f=1,m=2"), {"clients_per_round": 5, "batch_size": 4}
    options |= {"execution": "vmap", "chunk": 2, "evaluation": OFF}
    together = vfl.simulate(config, regression(), data, 4, seed=3, replicas=3, **options)
    for r in range(3):
        single = vfl.simulate(config, regression(), data, 4, seed=3 + r, **options)
        np.testing.assert_allclose(together.state.replica(r).server.x, single.x, rtol=1e-10, atol=1e-12)


def test_a_grid_of_rates_keeps_the_aggregator():
    data = packed(*federated().clients[:2], [size for size in SIZES if size])
    options = {"clients_per_round": 5, "batch_size": 4, "execution": "vmap", "evaluation": OFF}
    replicas = vfl.Replication(1, {"server_lr": (0.5, 1.0)})
    for spec in ("median", "norm_clip:0.1"):
        together = vfl.simulate(FedAvg(aggregator=spec), regression(), data, 3, replicas=replicas, **options)
        for r, rate in enumerate((0.5, 1.0)):
            single = vfl.simulate(FedAvg(aggregator=spec, server_lr=rate), regression(), data, 3, **options)
            np.testing.assert_allclose(together.state.replica(r).server.x, single.x, rtol=1e-10, atol=1e-12)


def test_resumed_equals_uninterrupted_bit_by_bit():
    for name, algorithm in ALGORITHMS.items():
        if "aggregator" not in name:
            continue
        options = PARTIAL | {"execution": "vmap", "chunk": 3, "evaluation": OFF}
        whole = [numbers_of(state, []) for state, _ in vfl.rounds(algorithm, mlp(), federated(), 4, **options)]
        half = vfl.simulate(algorithm, mlp(), federated(), 2, **options).state
        rest = vfl.simulate(algorithm, mlp(), federated(), 4, state=half, **options).state
        assert_same(numbers_of(rest, []), whole[-1], 0)


def test_no_rank_is_sent_more_than_its_slice(monkeypatch):
    """On one rank of three, played by hand: 4 of 5 clients are its own, and it sends two thirds of them away."""
    sent = {}

    class Ranks(vfl.Ranks):
        def all_reduce(self, flat):
            if flat.shape == (2, 5):
                flat[:, 4] = torch.tensor([1.0, 1.0])  # the fifth client is on rank 1
            return flat

        def exchange(self, parts, sizes):
            sent.update(parts=[len(part) for part in parts], sizes=sizes)
            return [parts[0], torch.full((sizes[1],), 9.0, dtype=parts[0].dtype), parts[0].new_empty(0)]

    like = execute_layout(7)
    rows = torch.arange(28.0, dtype=torch.float64).reshape(4, 7)
    chunks = [(np.array([3, 1]), (rows[[3, 1]], torch.ones(2))), (np.array([0, 2]), (rows[[0, 2]], torch.ones(2)))]
    found = gather.combined(lambda rows, weight, total: rows.sum(0), like, chunks, np.ones(5, bool), Ranks(0, 3),
                            torch.device("cpu"))  # fmt: skip
    assert sent == {"parts": [12, 8, 8], "sizes": [12, 3, 0]}
    np.testing.assert_array_equal(found, [*(rows[:, :3].sum(0) + 9), 0, 0, 0, 0])


def execute_layout(D):
    results = (vfl.Message(torch.zeros(1, D, dtype=torch.float64), torch.ones(1), torch.zeros(1)), (),
               vfl.Metrics(torch.zeros(1), torch.zeros(1), torch.zeros(1)))  # fmt: skip
    return layout(results)


# What is refused


@pytest.mark.parametrize(
    ("config", "spec", "sentence"),
    [
        (FedAvg, "medain", "unknown aggregator 'medain'; did you mean 'median'?"),
        (FedAvg, "trimmed_mean:0.5", "trimmed_mean cuts a share in [0, 0.5) off both ends, not 0.5"),
        (FedAvg, "krum", "expected krum:F"),
        (FedAvg, "krum:f=-1", "f ≥ 0"),
        (FedAvg, "multi_krum:f=1,m=0", "m ≥ 1"),
        (FedAvg, "geometric_median:eps=0", "eps > 0"),
        (FedAvg, "norm_clip:0", "norm_clip needs a finite norm > 0, not 0"),
        (FedNova, "median", "fednova needs the weighted mean of its messages: aggregator must be mean, not 'median'"),
    ],
)
def test_an_aggregator_without_meaning_is_refused_in_one_sentence(config, spec, sentence):
    with pytest.raises(vfl.UsageError) as error:
        config(aggregator=spec)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_krum_refuses_a_round_of_too_few_messages():
    with pytest.raises(vfl.UsageError, match="krum with f=3, m=1 needs at least 9 messages in a round and got 7"):
        run(FedProx(aggregator="krum:f=3"), make_task(nn.Linear(FEATURES, 3)), federated(), 1, **ALL)
