"""The engine's promises, each for every algorithm where it concerns algorithms: float64, unequal clients, one empty."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    EMPTY,
    FEATURES,
    PARTIAL,
    SIZES,
    N,
    assert_same,
    every_algorithm,
    every_sampled_algorithm,
    federated,
    mlp,
    norm_and_dropout,
    numbers_of,
    packed,
    regression,
    round_keys,
    run,
    state_numbers,
)
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import vfl
from algorithms.fedavg import FedAvg, FedAvgM
from algorithms.scaffold import Scaffold
from vfl.executor import Executor

WORK = {"epochs": {"local_epochs": 2}, "steps": {"local_steps": 5}}
every_work = pytest.mark.parametrize("work", WORK.values(), ids=WORK.keys())


# Layouts


def test_the_cohorts_of_these_tests_hold_the_client_without_data_and_leave_others_out():
    cohorts = [vfl.sampler("uniform", 6, federated().clients.offsets).draw(round_keys(3, t)[0]).ids for t in range(3)]
    assert any(EMPTY in ids for ids in cohorts)
    assert len({tuple(ids) for ids in cohorts}) > 1


def layouts_agree(algorithm, task, data, rounds, **options):
    wanted = run(algorithm, task, data, rounds, execution="loop", **options)
    for chunk in (1, 3, 100, "auto"):
        assert_same(run(algorithm, task, data, rounds, chunk=chunk, **options), wanted, 1e-9, f"chunk {chunk}")


@every_work
@every_algorithm
def test_vmap_equals_loop_in_chunks_of_any_size(algorithm, work):
    layouts_agree(algorithm, mlp(), federated(), 3, **PARTIAL, **work)


@every_algorithm
def test_vmap_equals_loop_with_batch_norm_and_dropout(algorithm):
    layouts_agree(algorithm, norm_and_dropout(), federated(), 2, **PARTIAL)


def test_vmap_equals_loop_when_a_client_takes_all_its_data_at_once():
    layouts_agree(Scaffold(option=1), norm_and_dropout(), federated(), 2, **PARTIAL | {"batch_size": None})


@pytest.mark.parametrize(("chunk", "largest"), [(1, 1), (3, 3), (100, 7)])
def test_a_chunk_holds_at_most_so_many_clients(chunk, largest):
    options = {"clients_per_round": "all", "local_steps": 1, "chunk": chunk}
    _, history = vfl.simulate(FedAvg(), regression(), federated(), 1, **options)
    assert history[0]["chunk"] == largest


@every_algorithm
def test_resumed_equals_uninterrupted_bit_by_bit(algorithm):
    options = {
        "algorithm": algorithm,
        "task": norm_and_dropout(),
        "data": federated(),
        "execution": "vmap",
        "chunk": 4,
        **PARTIAL,
    }
    state, history = vfl.simulate(rounds=5, **options)
    half, first = vfl.simulate(rounds=2, **options)
    resumed, second = vfl.simulate(rounds=5, state=half, **options | {"seed": 99})
    assert [m["round"] for m in second] == [3, 4, 5]
    assert_same(numbers_of(resumed, first + second), numbers_of(state, history), 0)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_client_state_on_the_host_equals_client_state_on_the_device(device):
    options = {"rounds": 3, "execution": "vmap", "chunk": 4, **PARTIAL}
    places = {}
    for place in ("device", "host"):
        state, history = vfl.simulate(Scaffold(), mlp(device), federated(), client_state=place, **options)
        places[place] = state.store.place.type
        numbers = numbers_of(state, history)
        if place == "device":
            wanted = numbers
    assert places == {"device": device, "host": "cpu"}
    assert_same(numbers, wanted, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algorithm", [FedAvg(), Scaffold()])
def test_a_gpu_is_not_waited_for_while_the_chunks_of_a_round_are_computed(algorithm, monkeypatch):
    original = Executor.run

    def strict(self, queue, shared, round):
        torch.cuda.set_sync_debug_mode("error" if round.number > 1 else "default")
        try:
            original(self, queue, shared, round)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Executor, "run", strict)
    run(algorithm, mlp("cuda"), federated(), 3, chunk=2, **PARTIAL)


# Weights and cohorts


@every_sampled_algorithm
def test_a_client_without_data_changes_nothing(algorithm):
    options = {"task": norm_and_dropout(), "data": federated(), "rounds": 2, "chunk": 100, "batch_size": 4}
    without = run(algorithm, sampling="fixed:0,2,3", **options)
    with_it = run(algorithm, sampling=f"fixed:0,{EMPTY},2,3", **options)
    for name in ("metric.clients", "metric.bits_down"):  # it does receive the model
        np.testing.assert_allclose(with_it.pop(name), without.pop(name) * 4 / 3)
    assert_same(with_it, without, 0)


@every_sampled_algorithm
def test_a_cohort_without_data_leaves_the_server_as_it_was(algorithm):
    task = norm_and_dropout()
    engine = vfl.Engine(algorithm.build(task, N), task, federated(), sampling=f"fixed:{EMPTY}")
    before = engine.init(0)
    after, metrics = engine.play(before)
    assert_same(state_numbers(after), state_numbers(before), 0)
    assert after.round == 1
    assert metrics["bits_up"] == metrics["gradients"] == metrics["dropped"] == 0
    assert math.isnan(metrics["train_loss"])


@every_algorithm
def test_a_round_of_empty_poisson_cohorts_leaves_the_server_as_it_was(algorithm):
    task = mlp()
    engine = vfl.Engine(algorithm.build(task, N), task, federated(), sampling="poisson", clients_per_round=1)
    state, empty = engine.init(0), 0
    for _ in range(8):
        before = state_numbers(state)
        state, metrics = engine.play(state)
        if metrics["clients"] == 0:
            empty += 1
            assert_same(state_numbers(state), before, 0)
    assert 0 < empty < 8


def local_models(task, data, **options):
    """The model that each client arrives at in the first round, by a run in which it is alone."""
    return {i: run(FedAvg(), task, data, 1, sampling=f"fixed:{i}", **options)["server.x"] for i in range(N) if SIZES[i]}


WEIGHTS = {
    "uniform": lambda n: 1,
    "examples": lambda n: n,
    "steps": lambda n: 2 * math.ceil(n / 4),  # 2 epochs in batches of 4
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("sampling", ["uniform", "replacement", "weighted"])
def test_the_new_model_is_the_mean_of_the_local_ones_by_weight_and_sampling_factor(weighting, sampling):
    task, data, work = mlp(), federated(), {"batch_size": 4, "local_epochs": 2, "seed": 5}
    y = local_models(task, data, **work)
    ids = vfl.sampler(sampling, 7, data.clients.offsets).draw(round_keys(5, 0)[0]).ids.tolist()
    assert (len(set(ids)) < len(ids)) == (sampling != "uniform"), "the case of a client drawn twice is meant"
    factor = {i: sum(SIZES) / (N * SIZES[i]) if sampling == "weighted" else 1 for i in y}
    w = [WEIGHTS[weighting](SIZES[i]) * factor[i] if SIZES[i] else 0 for i in ids]
    wanted = sum(weight * y[i] for weight, i in zip(w, ids, strict=True) if weight) / sum(w)
    found = run(FedAvg(weighting=weighting), task, data, 1, clients_per_round=7, sampling=sampling, **work)
    np.testing.assert_allclose(found["server.x"], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampling", ["replacement", "weighted"])
def test_clients_with_state_are_never_drawn_twice(sampling):
    with pytest.raises(vfl.UsageError, match="use --sampling uniform"):
        vfl.simulate(Scaffold(), mlp(), federated(), 1, sampling=sampling, clients_per_round=3)


def test_more_clients_a_round_than_there_are_is_refused():
    with pytest.raises(vfl.UsageError, match=f"is {N + 1}, above the population of {N} clients"):
        vfl.simulate(FedAvg(), mlp(), federated(), 1, clients_per_round=N + 1)


# Memory


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that operators return."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += sum(t.numel() * t.element_size() for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def round_memory(population, sampling):
    """What a round of 5 clients takes: (bytes of all its tensors, most bytes that python and numpy hold at once)."""
    x = torch.zeros(population, FEATURES, dtype=torch.uint8)
    task, data = mlp(), packed(x, torch.zeros(population, dtype=torch.int64), [1] * population)
    options = {"clients_per_round": 5, "sampling": sampling, "chunk": 5}
    engine = vfl.Engine(Scaffold().build(task, population), task, data, **options)
    state, _ = engine.play(engine.init(0))  # the first round makes what later ones reuse
    tracemalloc.start()
    try:
        with Allocated() as allocated:
            _, metrics = engine.play(state)
        return allocated.total / metrics["clients"], tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sampling", ["uniform", "fixed"])
def test_the_memory_of_a_round_does_not_depend_on_the_population(sampling):
    (few, few_host), (many, many_host) = (round_memory(n, sampling) for n in (1000, 1_000_000))
    assert 0 < many <= few
    assert many_host < few_host + 50_000  # bytes; one bit a client would be 125,000


# Metrics


def visited(n, batch, steps):
    """Examples in so many minibatches of a client with n."""
    sizes = [min(batch, n - start) for start in range(0, n, batch)]
    return sum(sizes[k % len(sizes)] for k in range(steps)) if n else 0


D = CLASSES * (FEATURES + 1)
COSTS = [  # algorithm, vectors of D up, vectors of D down, passes over the data beside the steps
    (FedAvg(), 1, 1, 0),
    (FedAvgM(), 1, 1, 0),
    (Scaffold(option=1), 2, 2, 1),
    (Scaffold(option=2), 2, 2, 0),
]


@pytest.mark.parametrize(("algorithm", "up", "down", "passes"), COSTS)
@every_work
def test_bits_and_gradients_equal_a_count_by_hand(algorithm, up, down, passes, work):
    options = {"clients_per_round": "all", "batch_size": 4, **work}
    _, history = vfl.simulate(algorithm, regression(), federated(), 3, **options)
    steps = [work["local_steps"] if "local_steps" in work else 2 * math.ceil(n / 4) for n in SIZES]
    gradients = sum(visited(n, 4, k) + passes * n for n, k in zip(SIZES, steps, strict=True))
    assert [m["bits_up"] for m in history] == [t * 7 * up * D * 64 for t in (1, 2, 3)]  # one client has nothing to send
    assert [m["bits_down"] for m in history] == [t * 8 * down * D * 64 for t in (1, 2, 3)]
    assert [m["gradients"] for m in history] == [t * gradients for t in (1, 2, 3)]


def test_bits_are_counted_exactly_in_single_precision():
    task = vfl.task(nn.Linear(FEATURES, CLASSES))
    fedavg, bits = FedAvg().build(task, N), 2**40 + 1

    def client_update(sent, client, batches, key):
        message, client, metrics = fedavg.client_update(sent, client, batches, key)
        return message._replace(bits=torch.tensor(bits, dtype=torch.float64)), client, metrics

    algorithm = fedavg._replace(client_update=client_update)
    _, history = vfl.simulate(algorithm, task, federated(), 2, clients_per_round="all")
    assert history[-1]["bits_up"] == 2 * 7 * bits


def test_every_round_reports_its_metrics():
    _, history = vfl.simulate(FedAvg(), mlp(), federated(), 2, **PARTIAL)
    names = {"round", "train_loss", "test_loss", "test_accuracy", "bits_up", "bits_down", "gradients"}
    names |= {"clients", "dropped", "chunk", "execution", "seconds", "round_bits_up", "round_bits_down"}
    names |= {"client_bits_up", "client_bits_down"}
    for t, metrics in enumerate(history, 1):
        assert metrics.keys() - {"memory"} == names  # memory: where the system tells
        assert metrics["seconds"] > 0
        assert (metrics["round"], metrics["clients"], metrics["dropped"]) == (t, 6, 0)


def test_the_train_loss_is_the_mean_over_the_examples_visited():
    _, history = vfl.simulate(FedAvg(local_lr=0), mlp(), federated(), 1, clients_per_round="all", batch_size=4)
    data, task = federated(), mlp()
    losses = vfl.evaluate(task, task.x, task.buffers, vfl.data.Examples(data.clients.x, data.clients.y), data.transform)
    assert history[0]["train_loss"] == pytest.approx(losses["loss"], rel=1e-12)


def test_going_on_from_a_state_whose_clients_have_moved_on_is_refused():
    task, data = regression(), federated()
    engine = vfl.Engine(Scaffold().build(task, N), task, data, clients_per_round=3)
    first, _ = engine.play(engine.init(0))
    engine.play(first)
    with pytest.raises(vfl.UsageError, match=r"state after round 1, .* moved on to round 2"):
        engine.play(first)
