"""What a run does when clients, models or the memory fail: it stops, drops or goes on, and says which and where."""

import logging
import math

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    FEATURES,
    PARTIAL,
    SIZES,
    N,
    assert_same,
    every_algorithm,
    every_sampled_algorithm,
    federated,
    make_task,
    mlp,
    norm_and_dropout,
    numbers_of,
    packed,
    round_keys,
    run,
    state_numbers,
)
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from vfl.transforms import mapped

OFF = vfl.Evaluation(0)


# What is not finite


def spoilt(**values):
    """The data, with an input of some clients replaced in all of their examples: client 0's by infinity is `c0=inf`."""
    data = federated()
    for name, value in values.items():
        data.clients.client(int(name[1:])).x[:, 0] = value
    return data


@pytest.mark.parametrize("chunk", [1, 100])
@every_algorithm
def test_divergence_names_exactly_the_round_and_the_clients(algorithm, chunk):
    data = spoilt(c0=math.nan, c2=math.inf)  # client 0 owns the very first example
    with pytest.raises(vfl.DivergedError, match="round 1: NaN or infinity from clients 0, 2;") as error:
        vfl.simulate(algorithm, mlp(), data, 3, clients_per_round="all", batch_size=4, chunk=chunk)
    assert (error.value.round, error.value.clients) == (1, [0, 2])


def test_divergence_leaves_the_given_state_as_it_was():
    task, bad = mlp(), 3
    engine = vfl.Engine(Scaffold().build(task, N), task, spoilt(c3=math.nan), clients_per_round=3)
    state = engine.init(1)
    for _ in range(20):
        before = state_numbers(state), dict(state.store.owners), state.round, state.totals
        try:
            state, _ = engine.play(state)
        except vfl.DivergedError as error:
            assert (error.round, error.clients) == (state.round + 1, [bad])
            break
    else:
        pytest.fail("the spoilt client was never drawn")
    assert state.round > 0, "the client states would be empty"
    assert_same(state_numbers(state), before[0], 0)
    assert (dict(state.store.owners), state.round, state.totals) == before[1:]


def test_divergence_of_the_server_names_no_client():
    task = mlp()
    fedavg = FedAvg().build(task, N)

    def server_update(server, mean, key):
        after, reported = fedavg.server_update(server, mean, key)
        return after._replace(x=after.x / 0), reported

    with pytest.raises(vfl.DivergedError, match="round 1: NaN or infinity from the server step") as error:
        vfl.simulate(fedavg._replace(server_update=server_update), task, federated(), 1, clients_per_round=3)
    assert error.value.clients == []


@every_sampled_algorithm
def test_a_dropped_client_is_counted_and_counts_for_nothing(algorithm):
    data, bad = spoilt(c2=math.nan), 2
    rows = np.r_[0:7, 19 : sum(SIZES)]
    without = packed(data.clients.x[rows], data.clients.y[rows], [0 if i == bad else n for i, n in enumerate(SIZES)])
    options = {"rounds": 4, "evaluation": OFF, **PARTIAL}
    dropped = run(algorithm, norm_and_dropout(), data, on_nonfinite="drop", **options)
    wanted = run(algorithm, norm_and_dropout(), without, **options)
    draw = vfl.sampler("uniform", 6, data.clients.offsets).draw
    drawn = [bad in draw(round_keys(3, t)[0]).ids for t in range(4)]
    assert 0 < sum(drawn) < 4
    assert dropped.pop("metric.dropped").tolist() == drawn
    assert not wanted.pop("metric.dropped").any()
    for name in ("metric.bits_up", "metric.gradients"):  # it worked and sent
        assert dropped.pop(name)[-1] > wanted.pop(name)[-1]
    assert_same(dropped, wanted, 1e-12)


@every_sampled_algorithm
def test_a_cohort_whose_clients_are_all_dropped_leaves_the_server_as_it_was(algorithm):
    task = norm_and_dropout()
    options = {"sampling": "fixed:0,2", "on_nonfinite": "drop"}
    engine = vfl.Engine(algorithm.build(task, N), task, spoilt(c0=math.nan, c2=math.nan), **options)
    before = engine.init(0)
    after, metrics = engine.play(before)
    assert metrics["dropped"] == 2
    assert_same(state_numbers(after), state_numbers(before), 0)


# Errors and debugging


def spy(algorithm, look):
    """The algorithm, with `look` called on what each client gets."""

    def client_update(sent, client, batches, key):
        look(sent, client, batches)
        return algorithm.client_update(sent, client, batches, key)

    return algorithm._replace(client_update=client_update)


def test_loop_execution_names_the_client_and_the_round_of_an_exception():
    task, calls = mlp(), []

    def fail(sent, client, batches):
        calls.append(int(batches.examples))
        if len(calls) == 10:
            raise KeyError("broken")

    algorithm = spy(FedAvg().build(task, N), fail)
    with pytest.raises(vfl.ClientError, match="round 2: KeyError: 'broken'") as error:
        vfl.simulate(algorithm, task, federated(), 3, clients_per_round="all", execution="loop")
    assert (SIZES[error.value.client], error.value.round) == (calls[-1], 2)
    assert isinstance(error.value.__cause__, KeyError)


def test_loop_execution_shows_plain_unbatched_tensors():
    task, seen = mlp(), []

    def look(sent, client, batches):
        assert sent.x.tolist() and str(sent.x).startswith("tensor([")
        assert batches.rows.shape == (batches.steps.item(), min(4, batches.examples.item()))
        assert client.shape == task.x.shape
        seen.append(batches.examples.item())

    algorithm = spy(Scaffold().build(task, N), look)
    vfl.simulate(algorithm, task, federated(), 1, clients_per_round="all", batch_size=4, execution="loop")
    assert sorted(seen) == sorted(n for n in SIZES if n)


class Branching(nn.Module):
    """Control flow that depends on the data, which vmap cannot take."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        h = self.layer(x)
        return h if h.sum().item() > 0 else 2 * h


class OwnNoise(Branching):
    """Random numbers that no key decides, which vmap refuses."""

    def forward(self, x):
        return self.layer(x + torch.rand_like(x))


@pytest.mark.parametrize(("module", "why"), [(Branching, "item()"), (OwnNoise, "nn.Dropout, unlike F.dropout")])
def test_a_model_that_vmap_cannot_take_runs_in_a_loop_after_one_warning(module, why, caplog):
    options = {"task": make_task(module()), "data": federated(), "rounds": 3, "evaluation": OFF, **PARTIAL}
    wanted = run(Scaffold(), execution="loop", **options)
    with caplog.at_level(logging.WARNING, logger="vfl"):
        state, history = vfl.simulate(Scaffold(), chunk=4, **options)
    (warning,) = caplog.records
    assert warning.getMessage().startswith("this model or algorithm cannot run under vmap, so clients run one by one")
    assert why in warning.getMessage()
    assert {m["execution"] for m in history} == {"loop"}
    assert_same(numbers_of(state, history), wanted, 0)


def test_a_broken_model_raises_and_does_not_fall_back(caplog):
    broken = make_task(nn.Linear(FEATURES + 1, CLASSES))
    with pytest.raises(vfl.ClientError, match=r"client 2, round 1: RuntimeError: .*shape") as error:
        vfl.simulate(FedAvg(), broken, federated(), 1, sampling="fixed:2")
    assert isinstance(error.value.__cause__, RuntimeError)
    assert not caplog.records


# Memory


def failing_above(monkeypatch, most, fail):
    """Lets vmap run out of memory with more clients than `most`; the numbers of clients it was given."""
    given: list[int] = []

    def failing(function, stacked, count):
        given.append(count)
        if count > most:
            fail()
        return mapped(function, stacked, count)

    monkeypatch.setattr("vfl.execute.mapped", failing)
    return given


def out_of_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def out_of_host():
    torch.empty(2**60)


@pytest.mark.parametrize("fail", [out_of_gpu, out_of_host])
@pytest.mark.parametrize("chunk", [100, "auto"])
def test_running_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch, caplog, fail, chunk):
    options = {"task": mlp(), "data": federated(), "rounds": 2, "clients_per_round": "all", "local_steps": 2}
    wanted = run(Scaffold(), **options)
    given = failing_above(monkeypatch, 2, fail)
    state, history = vfl.simulate(Scaffold(), chunk=chunk, execution="vmap", **options)
    assert_same(numbers_of(state, history), wanted, 1e-12)
    assert {m["execution"] for m in history} == {"vmap"}
    assert max(m["chunk"] for m in history) <= 2
    assert [n for n in given if n > 2] == [7, 3], "a size that failed is not tried again"
    reports = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert reports == [f"out of memory with {n} clients at once; going on with {n // 2}" for n in (7, 3)]


def test_one_client_that_does_not_fit_is_an_error(monkeypatch):
    given = failing_above(monkeypatch, 0, out_of_gpu)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        vfl.simulate(FedAvg(), mlp(), federated(), 1, clients_per_round="all", local_steps=1)
    assert given == [7, 3, 1]
