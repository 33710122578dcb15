"""Local gradient estimators against their definitions: mean, variance, and which examples are drawn when."""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

import vfl
import vfl.queue
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from tests.helpers import SIZES, N, assert_same, every_algorithm, federated, make_task, mlp, regression, run
from vfl import draws, local, programs, random
from vfl.local import Minibatches, Work, minibatches

Array = np.ndarray
OFFSETS = np.array([0, 4, 11, 14])  # the client that is drawn from is the one in the middle
START, n, D = 4, 7, 3
CLIENTS = 20_000  # draws
SCALE = np.array([1, 0.1, 5, 1, 2, 0.3, 1, 0.2, 9, 1, 0.5, 1, 1, 1])
A = np.random.default_rng(0).standard_normal((14, D)) * SCALE[:, None]
T = A @ np.ones(D) + np.random.default_rng(1).standard_normal(14)
G = A * -T[:, None]  # [14, D] the gradients of ½ (aⱼᵀx − tⱼ)² at 0
MINE = G[START : START + n]
FULL = MINE.mean(0)
L = (A**2).sum(1)
MARKS = draws.marks(L, OFFSETS)

FRESH = [Work(3, draw=draw) for draw in ("nice", "multi", "importance")]
EVERY = [Work(3), Work("34%"), Work(None), Work(1, draw="multi"), Work("34%", draw="nice"), *FRESH]
named = {"ids": lambda work: f"{work.draw}-{work.batch_size}"}


def drawn(work: Work, clients: int = CLIENTS, seed: int = 0) -> Minibatches:
    """The minibatches of so many clients that all hold the same examples."""
    keys = random.split(random.key(seed), clients)
    return minibatches(work, keys, np.full(clients, START), np.full(clients, n), MARKS)


def estimates(plan: Minibatches, k: int = 0) -> Array:
    """The gradient estimates of step k [C, D]."""
    mask = plan.mask[:, k].double()
    weight = plan.weight[:, k] * mask if isinstance(plan.weight, Tensor) else mask
    return ((weight[..., None] * torch.from_numpy(G)[plan.rows[:, k]]).sum(1) / mask.sum(1, keepdim=True)).numpy()


def near(samples: Array, wanted: Array) -> None:
    """The mean is what is wanted within 4 standard errors, which must be small enough to say something."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - wanted) <= 4 * error).all(), (samples.mean(0), wanted, error)
    assert (error > 0).all()
    assert error.max() < 0.05 * np.abs(wanted).max()


# Mean and variance


@pytest.mark.parametrize("work", [work for work in EVERY if work.batch_size is not None], **named)
def test_every_estimator_is_unbiased_in_every_step(work: Work) -> None:
    plan = drawn(work._replace(steps=3))
    for k in range(3):
        near(estimates(plan, k), FULL)


@pytest.mark.parametrize(
    "work", [Work(None), Work(n), Work("all"), Work(1.0, draw="nice"), Work(99, draw="nice")], **named
)
def test_all_examples_are_the_full_gradient(work: Work) -> None:
    plan = drawn(work, 50)
    assert plan.rows.shape == (50, 1, n)
    np.testing.assert_allclose(estimates(plan), np.tile(FULL, (50, 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [1, 2, 3, 6])
@pytest.mark.parametrize("draw", ["nice", "multi", "importance"])
def test_the_variance_is_the_closed_form(draw: Any, tau: int) -> None:
    spread = ((MINE - FULL) ** 2).sum() / n
    p = L[START : START + n] / L[START : START + n].sum()
    wanted = {
        "nice": (n - tau) / (tau * (n - 1)) * spread,
        "multi": spread / tau,
        "importance": (((MINE**2).sum(1) / (n**2 * p)).sum() - (FULL**2).sum()) / tau,
    }[draw]
    near(((estimates(drawn(Work(tau, draw=draw))) - FULL) ** 2).sum(1, keepdims=True), np.array([wanted]))


def test_importance_has_less_variance_than_uniform_draws_where_examples_are_unequal() -> None:
    importance, uniform = (estimates(drawn(Work(3, draw=draw))).var(0).sum() for draw in ("importance", "multi"))
    assert importance < uniform / 2


# Which examples


def frequencies(plan: Minibatches) -> tuple[Array, float]:
    """How often each of the client's examples was drawn [n], and by how many draws."""
    assert plan.mask.all()
    return np.bincount(plan.rows.flatten().numpy() - START, minlength=n), plan.rows.numel()


def fits(counts: Array, wanted: Array) -> None:
    """A χ² test: the counts have these means."""
    freedom = len(wanted) - 1
    assert counts.sum() == pytest.approx(wanted.sum())
    assert ((counts - wanted) ** 2 / wanted).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_draws_with_replacement_are_independent_and_have_their_probabilities() -> None:
    p = L[START : START + n] / L[START : START + n].sum()
    for draw, wanted in (("multi", np.full(n, 1 / n)), ("importance", p)):
        plan = drawn(Work(2, draw=draw, steps=2))
        counts, total = frequencies(plan)
        fits(counts, total * wanted)
        rows = (plan.rows - START).numpy()
        for first, second in ((rows[:, 0, 0], rows[:, 0, 1]), (rows[:, 0, 1], rows[:, 1, 0])):
            both = np.bincount(first * n + second, minlength=n * n)
            likely = CLIENTS * np.outer(wanted, wanted).ravel()
            fits(both[likely > 5], likely[likely > 5] * both[likely > 5].sum() / likely[likely > 5].sum())


def test_nice_draws_every_subset_alike_and_afresh_in_each_step() -> None:
    plan = drawn(Work(2, draw="nice", steps=2))
    assert (plan.rows[..., 0] != plan.rows[..., 1]).all()
    rows = (plan.rows - START).sort(-1).values
    subset = (rows[..., 0] * n + rows[..., 1]).numpy()  # [C, 2 steps]
    names = np.unique(subset)
    assert len(names) == n * (n - 1) // 2
    pairs = np.searchsorted(names, subset)
    wanted = np.full(len(names) ** 2, CLIENTS / len(names) ** 2)
    fits(np.bincount(pairs[:, 0] * len(names) + pairs[:, 1], minlength=len(names) ** 2), wanted)


MIXED = np.array([0, 1, 2, 3, 5, 13])
MIXED_OFFSETS = np.concatenate([[0], np.cumsum(MIXED)])
MIXED_MARKS = draws.marks(np.arange(1.0, MIXED.sum() + 1), MIXED_OFFSETS)


def visits(plan: Minibatches, c: int) -> list[list[tuple[int, float]]]:
    """The rows and weights of each of the client's steps; none of them is empty."""
    weight = plan.weight if isinstance(plan.weight, Tensor) else torch.ones(plan.mask.shape)
    steps = [
        list(zip(plan.rows[c, k][mask].tolist(), weight[c, k][mask].tolist(), strict=True))
        for k, mask in enumerate(plan.mask[c])
    ]
    assert all(steps[: plan.steps[c]])
    assert not any(steps[plan.steps[c] :])
    return steps[: plan.steps[c]]


def mixed(work: Work, order: list[int], seed: int = 0) -> Minibatches:
    """The minibatches of these clients, in this order."""
    keys = random.split(random.key(seed), len(MIXED))
    return minibatches(work, keys[order], MIXED_OFFSETS[:-1][order], MIXED[order], MIXED_MARKS)


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("work", [*EVERY, Work(3, reshuffle="round"), Work(20, draw="multi")])
def test_what_a_client_draws_depends_on_its_key_and_not_on_its_chunk(work: Work, steps: int | None) -> None:
    work = work._replace(steps=steps)
    everyone = list(range(len(MIXED)))
    together, again, other = mixed(work, everyone), mixed(work, everyone), mixed(work, everyone, seed=1)
    backwards = mixed(work, everyone[::-1])
    for c, size in enumerate(MIXED.tolist()):
        mine = visits(together, c)
        assert len(mine) == work.counts(MIXED)[c]
        assert visits(mixed(work, [c]), 0) == visits(backwards, len(MIXED) - 1 - c) == visits(again, c) == mine
        assert {row for step in mine for row, _ in step} <= set(range(MIXED_OFFSETS[c], MIXED_OFFSETS[c + 1]))
        if work.draw != "epochs":
            assert [len(step) for step in mine] == [work.batch(MIXED)[c]] * len(mine)
        if work.draw == "nice":
            assert all(len({row for row, _ in step}) == len(step) for step in mine)
        if size == 0:
            assert not together.mask[c].any()
    all_of_it = work.draw != "multi" and work.batch(MIXED)[5] == MIXED[5]  # in the order in which they lie
    assert (visits(together, 5) == visits(other, 5)) == all_of_it
    padding = together.rows[~together.mask]
    assert set(padding.tolist()) <= {0, *MIXED_OFFSETS[:-1].tolist()}


def test_nice_is_the_same_when_its_hashes_are_drawn_in_blocks(monkeypatch) -> None:
    work = Work(2, draw="nice", steps=5)
    whole = mixed(work, [5, 3, 0])
    monkeypatch.setattr(draws, "BLOCK", 80)
    assert torch.equal(mixed(work, [5, 3, 0]).rows, whole.rows)


@pytest.mark.parametrize(
    ("amount", "draw", "wanted"),
    [
        ("10%", "epochs", [0, 1, 1, 1, 2, 3, 10]),
        (0.1, "nice", [0, 1, 1, 1, 2, 3, 10]),
        ("0.34", "multi", [0, 1, 4, 4, 4, 11, 34]),
        (1.0, "importance", [0, 1, 9, 10, 11, 30, 100]),
        ("all", "multi", [0, 1, 9, 10, 11, 30, 100]),
        (1, "multi", [0, 1, 1, 1, 1, 1, 1]),
        (20, "nice", [0, 1, 9, 10, 11, 20, 20]),
        (20, "importance", [0, 20, 20, 20, 20, 20, 20]),
        ("0.0001%", "epochs", [0, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_fraction_is_of_the_clients_own_examples_rounded_up(amount: Any, draw: Any, wanted: list[int]) -> None:
    sizes = np.array([0, 1, 9, 10, 11, 30, 100])
    work = Work(amount, draw=draw)
    work.check()
    assert work.batch(sizes).tolist() == wanted
    if amount == "10%":
        assert work.per_epoch(sizes).tolist() == [0, 1, 9, 10, 6, 10, 10]


def test_epochs_in_fractions_visit_every_example_once() -> None:
    work = Work("34%", epochs=2)
    plan = mixed(work, list(range(len(MIXED))))
    for c, size in enumerate(MIXED.tolist()):
        steps, spe = visits(plan, c), work.per_epoch(MIXED)[c]
        for epoch in (steps[:spe], steps[spe:]):
            assert sorted(row for step in epoch for row, _ in step) == list(range(*MIXED_OFFSETS[c : c + 2]))
        if size == 13:  # 34 % of 13 are 5 examples
            assert [len(step) for step in steps] == [5, 5, 3] * 2


# Probabilities


def test_probabilities_are_proportional_to_the_weights_whatever_their_magnitude() -> None:
    draw = np.random.default_rng(2)
    sizes = np.array([0, 3, 50, 0, 1, 2000, 0])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    weights = draw.uniform(0.5, 2, offsets[-1]) * np.repeat(np.array([1, 1e-300, 1, 1, 1, 1e300, 1]), sizes)
    units = np.diff(draws.marks(weights, offsets).numpy())
    assert (units >= 1).all()
    for first, last in pairwise(offsets):
        if first < last:
            assert units[first:last].sum() == draws.UNIT
            relative = weights[first:last] / weights[first:last].max()
            np.testing.assert_allclose(units[first:last] / draws.UNIT, relative / relative.sum(), rtol=1e-6)


def test_an_example_of_tiny_weight_can_still_be_drawn() -> None:
    units = np.diff(draws.marks(np.array([1e-200, 1.0, 1e-30]), np.array([0, 3])).numpy())
    assert units.tolist() == [1, draws.UNIT - 2, 1]


def test_coarse_probabilities_are_drawn_as_they_were_rounded_and_stay_with_their_client(monkeypatch) -> None:
    monkeypatch.setattr(draws, "UNIT", 16)  # so that a draw often falls on the mark between two examples
    marks = draws.marks(L, OFFSETS)
    p = np.diff(marks.numpy())[START : START + n] / 16
    keys = random.split(random.key(0), CLIENTS)
    starts, sizes = np.full(CLIENTS, START), np.full(CLIENTS, n)
    plan = minibatches(Work(2, draw="importance"), keys, starts, sizes, marks)
    counts, total = frequencies(plan)
    fits(counts, total * p)
    assert isinstance(plan.weight, Tensor)
    np.testing.assert_allclose(plan.weight, 1 / (n * p[plan.rows.numpy() - START]), rtol=1e-12)


def test_importance_of_no_examples_at_all_is_no_importance() -> None:
    assert draws.marks(np.zeros(0), np.array([0, 0, 0])).tolist() == [0]


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_that_is_no_positive_number_is_refused(bad: float) -> None:
    with pytest.raises(vfl.UsageError, match=r"finite number above 0 for every example, but example 2 has"):
        draws.marks(np.array([1, 1, bad]), np.array([0, 3]))


def test_squared_norms_are_of_what_the_model_sees(monkeypatch) -> None:
    x = torch.randint(1, 200, (9, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = (x.double().numpy() / 255) ** 2
    for block in (draws.BLOCK, 13):
        monkeypatch.setattr(draws, "BLOCK", block)
        found = draws.squared_norms(x, lambda x, dtype: x.to(dtype) / 255)
        np.testing.assert_allclose(found, wanted.sum((1, 2)), rtol=1e-14)
    with pytest.raises(vfl.UsageError, match="example 4 is all zeros"):
        draws.squared_norms(x * (torch.arange(9) != 4)[:, None, None], lambda x, dtype: x.to(dtype))


# Weights in the gradient


def test_a_weighted_gradient_is_the_weighted_sum_over_the_count() -> None:
    r = lambda x: 0.3 * x.square().sum() / 2  # noqa: E731
    task = make_task(nn.Linear(D, 1, bias=False), vfl.squared_error)
    ridge = vfl.task(nn.Linear(D, 1, bias=False), vfl.squared_error, regularizer=r, dtype=torch.float64)
    x = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    rows, mask = np.array([[1, 3, 3], [6, 0, 0]]), torch.tensor([[True] * 3, [True, False, False]])
    weight = torch.tensor([[0.5, 2.0, 1.5], [3.0, np.nan, np.inf]], dtype=torch.float64).where(mask, 7.0)
    batch = vfl.Batch(
        torch.from_numpy(A[rows]), torch.from_numpy(T[rows]), mask, random.split(random.key(0), 2), weight
    )
    residual = A @ x.numpy() - T
    count = mask.sum(1).numpy()
    w = np.where(mask, weight, 0)
    wanted = np.einsum("cb,cbd->cd", w, (A * residual[:, None])[rows]) / count[:, None]
    loss = (w * residual[rows] ** 2 / 2).sum(1)
    g, aux = vmap(lambda *b: task.grad_fn(x, vfl.Batch(*b), ()))(*batch)
    np.testing.assert_allclose(g, wanted, rtol=1e-12)
    np.testing.assert_allclose(aux.loss, loss, rtol=1e-12)
    assert aux.examples.tolist() == count.tolist()
    penalized, _ = vmap(lambda *b: ridge.grad_fn(x, vfl.Batch(*b), ()))(*batch)
    np.testing.assert_allclose(penalized, wanted + 0.3 * x.numpy(), rtol=1e-12)  # the regularizer knows no weights
    for c in range(2):
        alone, _ = task.grad_fn(x, vfl.Batch(*(leaf[c] for leaf in batch)), ())
        np.testing.assert_allclose(alone, wanted[c], rtol=1e-12)


def test_weights_of_one_change_nothing() -> None:
    task = make_task(nn.Linear(D, 1), vfl.squared_error)
    batch = vfl.Batch(torch.from_numpy(A), torch.from_numpy(T), torch.arange(14) < 9, random.key(0))
    ones = batch._replace(weight=torch.ones(14, dtype=torch.float64))
    assert torch.equal(task.grad_fn(task.x, batch, ())[0], task.grad_fn(task.x, ones, ())[0])


# In the engine


ROOM = 64  # numbers of a record
DATA = federated()
OWN = DATA.clients.offsets


class Server(NamedTuple):
    """The recorder's."""

    x: Tensor


def recorder() -> vfl.Algorithm:
    """An algorithm whose clients remember which rows they visited last, in order (from 1; 0: padding)."""

    def client_update(sent: Tensor, client: Tensor, batches: vfl.Batches, key: Tensor):
        rows = ((batches.rows + 1) * batches.mask).flatten()
        record = functional.pad(rows, (0, ROOM - rows.shape[0])).double()
        zero = record.sum() * 0
        return vfl.message(zero[None], zero + 1), record, vfl.Metrics(zero, zero, zero, batches.buffers)

    return vfl.Algorithm(
        Server,
        lambda x: x.new_zeros(ROOM),
        lambda server, key: vfl.Broadcast(server.x, vfl.float_bits(server.x)),
        client_update,
        lambda server, mean, key: (server, {}),
    )


def records(state: vfl.State) -> dict[int, list[int]]:
    """What each client visited last, padding left out."""
    ids, (rows,) = state.store.rows()
    return {i: [int(row) - 1 for row in record if row] for i, record in zip(ids.tolist(), rows.tolist(), strict=True)}


def recorded(rounds: int, **options: Any) -> list[dict[int, list[int]]]:
    """What each client visited last, after each round; clients without data and those still to come visited nothing."""
    options = {"clients_per_round": "all", "batch_size": 4, "execution": "vmap", "chunk": 100, "seed": 5} | options
    played = vfl.rounds(recorder(), regression(), DATA, rounds, **options)
    return [{i: rows for i, rows in records(state).items() if rows} for state, _ in played]


def halves(rows: list[int]) -> tuple[list[int], list[int]]:
    """The two epochs of a client, each of which visits all of its examples."""
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert sorted(first) == sorted(second) == sorted(set(first))
    return first, second


def test_reshuffled_each_epoch_no_two_orders_are_alike() -> None:
    orders = [tuple(half) for seen in recorded(3, local_epochs=2) for half in halves(seen[2])]
    assert len(set(orders)) == 6


def test_reshuffled_each_round_the_epochs_of_a_round_are_alike() -> None:
    orders = []
    for seen in recorded(3, local_epochs=2, reshuffle="round"):
        for i, rows in seen.items():
            first, second = halves(rows)
            assert first == second
            assert sorted(first) == list(range(OWN[i], OWN[i + 1]))
        orders.append(tuple(halves(seen[2])[0]))
    assert len(set(orders)) == 3


def test_reshuffled_each_round_the_steps_of_a_round_go_round_in_one_order() -> None:
    for seen in recorded(2, local_steps=5, reshuffle="round"):
        first, again = seen[2][:12], seen[2][12:]
        assert sorted(first) == list(range(OWN[2], OWN[3]))
        assert again == first[:8]


def test_shuffled_once_a_client_keeps_its_order_whoever_else_takes_part() -> None:
    first, *later = recorded(3, local_epochs=2, reshuffle="once")
    for i, rows in first.items():
        assert halves(rows)[0] == halves(rows)[1]
        assert sorted(halves(rows)[0]) == list(range(OWN[i], OWN[i + 1]))
    assert later == [first, first]
    for seen in recorded(4, local_epochs=2, reshuffle="once", clients_per_round=3, chunk=2):
        assert seen.items() <= first.items()
    (other,) = recorded(1, local_epochs=2, reshuffle="once", seed=6)
    assert other[2] != first[2]
    assert [row - OWN[6] for row in first[6]] != [row - OWN[2] for row in first[2] if row < OWN[2] + 9]


def test_shuffled_once_and_resumed_a_client_keeps_its_order() -> None:
    options = {"clients_per_round": "all", "batch_size": 4, "reshuffle": "once", "chunk": 100}
    state, _ = vfl.simulate(recorder(), regression(), DATA, 1, seed=5, **options)
    before = records(state)
    state, _ = vfl.simulate(recorder(), regression(), DATA, 2, seed=99, state=state, **options)
    assert records(state) == before


@pytest.mark.parametrize("slots", [1, 6, 13, 128, 129, 400, 1000])
def test_orders_by_machine_code_are_those_by_torch(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if draws.NATIVE.found("shuffled") is None:
        pytest.skip("needs a C++ compiler")
    keys = random.split(random.key(3), 40)
    for sizes in (np.full(40, slots), 1 + np.arange(40) % slots, np.full(40, slots + 3)):
        n, once = torch.from_numpy(sizes)[:, None], bool((sizes == slots).all())
        monkeypatch.setattr(draws, "MANY", 1)
        fast = draws.shuffled(keys, n, slots, once=once)
        monkeypatch.setattr(draws, "MANY", 2**40)
        assert fast.equal(draws.shuffled(keys, n, slots, once=once))


@pytest.mark.parametrize(
    "work",
    [Work(3), Work(3, epochs=2), Work(2, steps=7), Work("50%"), Work(3, reshuffle="once"),
     Work(3, steps=2, reshuffle="round")],
)  # fmt: skip
def test_minibatches_without_padding_are_drawn_as_those_with(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = work, random.split(random.key(1), 30), np.arange(30) * 9, np.full(30, 6)
    assert local._full(*arguments) is not None
    found = minibatches(*arguments)
    monkeypatch.setattr(local, "_full", lambda *_: None)
    for a, b in zip(found, minibatches(*arguments), strict=True):
        assert (a.equal(b) and a.dtype == b.dtype) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(
    "work", [Work(4), Work(6), Work(None), Work(3, epochs=2, reshuffle="round"), Work(3, draw="nice")]
)
def test_other_minibatches_take_the_general_way(work: Work) -> None:
    assert local._full(work, random.split(random.key(1), 3), np.arange(3) * 9, np.full(3, 6)) is None
    assert local._full(Work(3), random.split(random.key(1), 3), np.arange(3) * 9, np.array([6, 6, 3])) is None
    assert local._full(Work(3), random.split(random.key(1), 3), np.arange(3) * 9, np.zeros(3, int)) is None


ESTIMATORS: dict[str, dict[str, Any]] = {
    "nice": {"draw": "nice", "local_steps": 3, "batch_size": "40%"},
    "multi": {"draw": "multi", "batch_size": 3},
    "importance": {"draw": "importance", "local_steps": 3, "batch_size": "40%"},
    "fraction": {"batch_size": "40%", "local_epochs": 2},
    "once": {"batch_size": 4, "local_epochs": 2, "reshuffle": "once"},
}
every_estimator = pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS.keys())


@every_estimator
def test_a_run_does_not_depend_on_its_chunks_and_groups_nor_on_how_it_is_executed(options, monkeypatch) -> None:
    options = options | {"clients_per_round": 6, "seed": 3}
    wanted = run(Scaffold(), mlp(), DATA, 3, chunk=100, **options)
    assert np.abs(wanted["server.x"] - mlp().x.numpy()).max() > 1e-3
    assert_same(run(Scaffold(), mlp(), DATA, 3, chunk=2, **options), wanted, 1e-10)
    assert_same(run(Scaffold(), mlp(), DATA, 3, execution="loop", **options), wanted, 1e-10)
    monkeypatch.setattr(vfl.queue, "GROUP", 1)
    assert_same(run(Scaffold(), mlp(), DATA, 3, chunk=3, **options), wanted, 1e-10)


@every_estimator
def test_a_program_of_a_chunk_holds_the_estimator(options, monkeypatch) -> None:
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)  # compiling takes seconds
    options = options | {"clients_per_round": 6, "seed": 3, "chunk": 100}
    wanted = run(FedAvg(), mlp(), DATA, 3, **options)
    assert_same(run(FedAvg(), mlp(), DATA, 3, execution="compile", **options), wanted, 1e-10)


@every_estimator
def test_a_replica_is_the_run_of_its_seed_alone(options) -> None:
    data = federated([size for size in SIZES if size])
    options = options | {"clients_per_round": 4, "chunk": 3, "execution": "vmap"}
    state, _ = vfl.simulate(Scaffold(), mlp(), data, 2, seed=7, replicas=2, **options)
    for r in range(2):
        alone, _ = vfl.simulate(Scaffold(), mlp(), data, 2, seed=7 + r, **options)
        torch.testing.assert_close(state.server.x[r], alone.server.x, rtol=1e-10, atol=1e-12)


@every_algorithm
def test_every_algorithm_takes_an_importance_estimator(algorithm) -> None:
    options = {"draw": "importance", "batch_size": 2, "local_steps": 2, "clients_per_round": 6, "chunk": 100}
    found = run(algorithm, mlp(), DATA, 2, **options)
    assert np.isfinite(found["server.x"]).all()


def test_a_round_of_importance_is_its_definition_in_numpy() -> None:
    weights = np.random.default_rng(3).uniform(0.1, 3, OWN[-1])
    task, rate = make_task(nn.Linear(5, 1, bias=False), vfl.squared_error), 0.01
    y = DATA.clients.x.sum(1)
    data = DATA._replace(clients=DATA.clients._replace(y=y))
    work = Work(3, steps=2, draw="importance")
    options = {"batch_size": 3, "local_steps": 2, "draw": "importance", "importance": weights}
    state, _ = vfl.simulate(FedAvg(local_lr=rate), task, data, 1, clients_per_round="all", seed=4, **options)
    client_key = random.split(random.fold_in(random.key(4), 0), 4)[1]
    total, x0 = np.zeros(5), task.x.numpy()
    for i, size in enumerate(SIZES):
        key = random.fold_in(random.fold_in(client_key, i), 0)[None]
        plan = minibatches(work, key, OWN[[i]], np.array([size]), draws.marks(weights, OWN))
        p, x = weights[OWN[i] : OWN[i + 1]] / weights[OWN[i] : OWN[i + 1]].sum(), x0.copy()
        for rows in plan.rows[0, : plan.steps[0]].numpy():
            a = data.clients.x.numpy()[rows]
            w = 1 / (size * p[rows - OWN[i]])
            x = x - rate * (w * (a @ x - y.numpy()[rows])) @ a / 3
        total += size * (x - x0)
    np.testing.assert_allclose(state.server.x, x0 + total / OWN[-1], rtol=1e-8)


def test_importance_is_by_squared_norm_unless_given() -> None:
    options = {"draw": "importance", "batch_size": 3, "clients_per_round": 6, "chunk": 100}
    norms = (DATA.clients.x.numpy() ** 2).sum(1)
    by_norm = run(FedAvg(), mlp(), DATA, 2, **options)
    assert_same(run(FedAvg(), mlp(), DATA, 2, importance=norms, **options), by_norm, 0)
    other = run(FedAvg(), mlp(), DATA, 2, importance=norms**2, **options)
    assert np.abs(other["server.x"] - by_norm["server.x"]).max() > 1e-6


def test_sampling_in_every_step_costs_as_many_gradients_as_examples() -> None:
    _, history = vfl.simulate(
        FedAvg(), mlp(), DATA, 1, draw="nice", batch_size="50%", local_steps=2, clients_per_round=N
    )
    assert history[0]["gradients"] == sum(2 * -(-size // 2) for size in SIZES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"draw": "nise"}, "unknown draw 'nise'; did you mean 'nice'?"),
        ({"reshuffle": "never"}, "unknown reshuffle 'never'; known: epoch, once, round"),
        ({"draw": "nice", "local_epochs": 2}, "draw nice takes steps and knows no epochs, so epochs cannot be 2"),
        ({"draw": "multi", "reshuffle": "once"}, "draw multi draws afresh in each step, so reshuffle cannot be once"),
        ({"reshuffle": "once", "local_steps": 2}, "reshuffle once visits the same minibatches in every round"),
        ({"batch_size": 1.5}, "batch-size '1.5' is a fraction outside (0, 1]; write a whole number for a count"),
        ({"batch_size": "0%"}, "batch-size '0%' is a fraction outside (0, 1]"),
        ({"batch_size": "ten"}, "batch-size must be all, a whole number from 1 or a fraction (0.1 or 10%), not 'ten'"),
        ({"batch_size": 2**31}, "batch-size must be below 2147483648, not 2147483648"),
        ({"importance": np.ones(OWN[-1])}, "importance is for draw importance, not for draw epochs; leave it out"),
        ({"draw": "importance", "importance": np.ones(3)}, f"importance must be one number an example, [{OWN[-1]}]"),
    ],
)
def test_a_choice_without_meaning_is_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(vfl.UsageError) as error:
        vfl.simulate(FedAvg(), mlp(), DATA, 1, clients_per_round=N, **options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
