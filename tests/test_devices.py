"""Simulated devices against closed forms: the clock, late clients by their speed, clients that never answer."""

import dataclasses
import math

import numpy as np
import papers
import pytest
import torch
from helpers import EMPTY, SIZES, N, assert_same, federated, mlp, norm_and_dropout, regression, round_keys, run
from papers import DATA, OFFSETS, client_key, drawn

import vfl
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from vfl import devices, random
from vfl.delays import Delays
from vfl.devices import SPEEDS, Devices
from vfl.plots import series
from vfl.spec import resolve

SEED, ROUNDS = 7, 8
OPTIONS = {"clients_per_round": 5, "batch_size": 4, "seed": SEED, "chunk": 3}
BITS = 18 * 64  # of softmax regression in float64
CLOCK = Devices(device_speeds="lognormal:1", step_seconds=2.0, uplink_rate=100.0, downlink_rate=400.0, device_seed=4)


def cohort(t: int) -> list[int]:
    ids = vfl.sampler("uniform", 5, DATA.offsets).draw(round_keys(SEED, t)[0]).ids.tolist()
    return [i for i in ids if SIZES[i]]


def slowness(i: int) -> float:
    """Of client i, by the seed and the row where its examples begin."""
    return math.exp(float(random.normal(random.fold_in(random.key(4), OFFSETS[i]), (), torch.float64)))


def seconds(i: int) -> float:
    """What a round takes client i, by hand."""
    return slowness(i) * (2.0 * math.ceil(SIZES[i] / 4) + BITS / 400 + BITS / 100)


def lost(t: int, i: int, p: float) -> bool:
    key = random.fold_in(client_key(SEED, t, i), 2)
    return bool(random.bernoulli(random.fold_in(key, devices._LOST), p, ()))


def play(*groups, config=None, task=None, rounds=ROUNDS, **options):
    task = regression() if task is None else task
    algorithm = (config or FedAvg()).build(task, N)
    for group in groups:
        algorithm = group.wrap(algorithm, task, N)
    return run(algorithm, task, federated(), rounds, **OPTIONS | options)


def test_without_devices_there_is_no_wrapper_at_all():
    plain = FedAvg().build(mlp(), N)
    assert Devices(step_seconds=3, device_seed=2).wrap(plain, mlp(), N) is plain


def test_the_clock_changes_nothing_but_the_metric():
    plain, timed = play(task=norm_and_dropout()), play(CLOCK, task=norm_and_dropout())
    assert (timed.pop("metric.simulated_seconds") > 0).all()
    assert_same(timed, plain, 0)


def test_a_round_lasts_as_long_as_its_slowest_client():
    found = play(CLOCK)["metric.simulated_seconds"]
    np.testing.assert_allclose(found, [max(seconds(i) for i in cohort(t)) for t in range(ROUNDS)], rtol=1e-12)
    assert len(set(found)) > 2


def test_the_server_does_not_wait_for_late_or_silent_clients():
    late = Delays(delay_probability=0.4, delay="uniform:2")
    found = play(CLOCK, late)
    for t, now in enumerate(found["metric.simulated_seconds"]):
        assert now in [0, *(pytest.approx(seconds(i), rel=1e-12) for i in cohort(t))]
    slowest = play(CLOCK)["metric.simulated_seconds"]
    assert (found["metric.simulated_seconds"] < slowest).any()
    silent = play(dataclasses.replace(CLOCK, client_dropout=0.4))
    wanted = [max([seconds(i) for i in cohort(t) if not lost(t, i, 0.4)], default=0) for t in range(ROUNDS)]
    np.testing.assert_allclose(silent["metric.simulated_seconds"], wanted, rtol=1e-12)
    assert (silent["metric.simulated_seconds"] < slowest).any()


def test_by_speed_a_client_is_as_late_as_its_device_needs_rounds():
    deadline = 11.0
    found = play(CLOCK, Delays(delay_probability=1, delay=f"speed:{deadline},3"))
    tau = {i: min(math.ceil(seconds(i) / deadline) - 1, 3) for i in range(N) if SIZES[i]}
    assert 0 in tau.values() and 3 in tau.values() and len(set(tau.values())) > 2
    arrivals = [(t, t + tau[i]) for t in range(ROUNDS) for i in cohort(t)]
    assert found["metric.simulated_seconds"].tolist() == [deadline] * ROUNDS
    assert found["metric.late"].tolist() == [sum(a == t < b for a, b in arrivals) for t in range(ROUNDS)]
    assert found["metric.arrived"].tolist() == [sum(b == t for _, b in arrivals) for t in range(ROUNDS)]


def test_speeds_are_the_devices_own_whatever_the_run_draws():
    task = regression()
    algorithm = CLOCK.wrap(FedAvg().build(task, N), task, N)
    for seed in (0, 1):
        _, history = vfl.simulate(algorithm, task, federated(), 2, sampling="fixed:3", batch_size=4, seed=seed)
        assert [m["simulated_seconds"] for m in history] == [pytest.approx(seconds(3), rel=1e-12)] * 2


def test_delays_by_speed_need_a_clock():
    with pytest.raises(vfl.ClientError, match="choose device-speeds, equal at least"):
        play(Delays(delay_probability=1, delay="speed:40"))


def test_simulated_time_is_an_axis_and_adds_up():
    rows = [{"round": t, "simulated_seconds": s, "test_loss": 1 / t} for t, s in ((1, 2.0), (2, 0.5), (3, 4.0))]
    assert series(rows, "test_loss", "simulated_seconds") == ([2.0, 2.5, 6.5], [1, 1 / 2, 1 / 3])
    assert series([{"round": 1, "test_loss": 1.0}], "test_loss", "simulated_seconds") == ([], [])


@pytest.mark.parametrize(
    ("spec", "mean", "above_two"),
    [
        ("equal", 1, 0),
        ("uniform:1,4", 2.5, 2 / 3),
        ("lognormal:0.5", math.exp(0.125), 0.5 * math.erfc(math.log(2) / 0.5 / math.sqrt(2))),
        ("pareto:3", 1.5, 1 / 8),
        ("classes:1,2.5,8", 11.5 / 3, 2 / 3),
    ],
)
def test_speeds_follow_their_law(spec, mean, above_two):
    keys = random.split(random.key(2), 20000)
    found = torch.func.vmap(resolve(spec, SPEEDS, "device-speeds"))(keys).numpy()
    assert abs(found.mean() - mean) <= 4 * found.std() / math.sqrt(20000) + 1e-12
    assert abs((found > 2).mean() - above_two) <= 4 * math.sqrt(above_two * (1 - above_two) / 20000)
    assert found.min() > 0


# Clients that never answer


P = 0.5
SILENT = Devices(client_dropout=P)


@pytest.mark.parametrize("aggregator", ["mean", "median"])
def test_drop_outs_equal_a_simulation_without_them(aggregator):
    """FedAvg over those that answer; a round in which nobody does leaves the model."""
    config, x, up = FedAvg(aggregator=aggregator), regression().x.numpy(), 0
    silent = []
    for t in range(ROUNDS):
        changes, weights = [], []
        for i, batches in drawn(SEED, t, cohort(t), vfl.Work(4, 1)).items():
            if not lost(t, i, P):
                changes.append(papers.local_model(x, batches, config.local_lr, lambda g, y: g) - x)
                weights.append(SIZES[i])
        up += BITS * len(changes)
        if changes:
            median = aggregator == "median"
            x = x + (np.median(changes, axis=0) if median else np.average(changes, axis=0, weights=weights))
        silent.append(sum(lost(t, i, P) for i in cohort(t)))
    found = play(SILENT, config=config)
    assert_same({"x": found["server.x"]}, {"x": x}, 1e-12)
    assert found["metric.unanswered"].tolist() == silent
    assert found["metric.bits_up"][-1] == up > 0


def test_a_client_that_never_answers_keeps_its_state_and_counts_for_nothing():
    """So SCAFFOLD's c stays the mean of all clients' own."""
    task = norm_and_dropout()
    algorithm = SILENT.wrap(Scaffold().build(task, N), task, N)
    for state, _ in vfl.rounds(algorithm, task, federated(), ROUNDS, **OPTIONS, execution="vmap"):
        ids, (c_i,) = state.store.rows()
        np.testing.assert_allclose(state.server.c, c_i.sum(0) / N, rtol=1e-12, atol=1e-12)
        assert EMPTY not in ids
    assert state.server.c.abs().max() > 1e-3


def test_a_round_without_any_answer_leaves_server_and_buffers():
    task = norm_and_dropout()
    algorithm = Devices(client_dropout=0.9).wrap(FedAvg().build(task, N), task, N)
    before, empty = vfl.Engine(algorithm, task, federated(), clients_per_round=5).init(SEED), 0
    for state, metrics in vfl.rounds(algorithm, task, federated(), ROUNDS, **OPTIONS, execution="vmap"):
        if metrics["unanswered"] == len(cohort(metrics["round"] - 1)):
            empty += 1
            assert torch.equal(state.server.x, before.server.x)
            assert all(map(torch.equal, state.buffers, before.buffers))
        before = state
    assert 0 < empty < ROUNDS


def test_one_replica_may_hear_nobody():
    task = norm_and_dropout()
    algorithm = Devices(client_dropout=0.7).wrap(FedAvg().build(task, N), task, N)
    data = federated([7, 4, 12, 3, 5, 1, 9, 4])
    options = {
        "clients_per_round": 2,
        "batch_size": 4,
        "chunk": 2,
        "execution": "vmap",
        "evaluation": vfl.Evaluation(0),
    }
    together, history = vfl.simulate(algorithm, task, data, 6, replicas=2, seed=5, **options)
    silent = np.array([[r["unanswered"] for r in m["replicas"]] for m in history])
    assert ((silent == 2).sum(1) == 1).any(), "one replica should hear nobody, the other somebody"
    for r in range(2):
        alone, _ = vfl.simulate(algorithm, task, data, 6, seed=5 + r, **options)
        for mine, theirs in zip((together.replica(r).server.x, *together.replica(r).buffers),
                                (alone.server.x, *alone.buffers), strict=True):  # fmt: skip
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device_speeds": "fast"}, "unknown device-speeds 'fast'"),
        ({"device_speeds": "lognormal:-1"}, "sigma must be a finite number ≥ 0, not -1.0"),
        ({"device_speeds": "uniform:3,1"}, "needs 0 < low ≤ high, not 3.0 and 1.0"),
        ({"device_speeds": "pareto:0"}, "alpha must be a number above 0, not 0.0"),
        ({"device_speeds": "classes"}, "needs numbers above 0, like classes:1,2.5,8, not none"),
        ({"step_seconds": -1.0}, "step-seconds must be a finite number ≥ 0, not -1.0"),
        ({"uplink_rate": 0.0}, "uplink-rate must be a finite number > 0, not 0.0"),
        ({"client_dropout": 1.0}, "client-dropout must be from 0 to below 1, not 1.0"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        Devices(**options)
    assert sentence in str(error.value) and "\n" not in str(error.value)
