"""Local work: which examples a client visits, and descent over them against torch.optim in float64."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from vfl import draws, random
from vfl.base import leaves, take
from vfl.data.container import cast
from vfl.errors import UsageError
from vfl.local import Batches, Minibatches, Work, descend, float_bits, full_gradient, keep_where, message, minibatches
from vfl.optimizers import optimizer
from vfl.task import Task, squared_error, task

F64 = torch.float64
NEAR = {"rtol": 1e-10, "atol": 1e-12}
B = 4
SIZES = np.array([0, 1, B - 1, B, B + 1, 3 * B])


def keys_of(count: int, seed: int = 0) -> Tensor:
    return random.split(random.key(seed), count)


def starts_of(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]])


def plan_of(work: Work, sizes: np.ndarray, seed: int = 0) -> Minibatches:
    return minibatches(work, keys_of(len(sizes), seed), starts_of(sizes), sizes)


def visits(plan: Minibatches, client: int) -> list[list[int]]:
    """The rows of each of the client's steps."""
    steps = [rows[mask].tolist() for rows, mask in zip(plan.rows[client], plan.mask[client], strict=True)]
    assert all(steps[: plan.steps[client]])
    assert not any(steps[plan.steps[client] :])
    return steps[: plan.steps[client]]


def joined(steps: list[list[int]]) -> list[int]:
    return [row for step in steps for row in step]


def own_rows(sizes: np.ndarray, client: int) -> list[int]:
    start = int(starts_of(sizes)[client])
    return list(range(start, start + int(sizes[client])))


# Work


@pytest.mark.parametrize("name", ["batch_size", "epochs", "steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_work_below_one_is_refused_by_name(name: str, value: int) -> None:
    shown = name.replace("_", "-")
    with pytest.raises(UsageError, match=f"{shown} must be at least 1, not {value}"):
        Work(**{name: value}).check()


def test_work_of_full_batches_and_of_ones_is_accepted() -> None:
    Work().check()
    Work(None, 1, None).check()
    Work(1, 1, 1).check()


def test_epochs_count_the_last_partial_batch_and_nothing_for_a_client_without_data() -> None:
    assert Work(B).per_epoch(SIZES).tolist() == [0, 1, 1, 1, 2, 3]
    assert Work(B, epochs=3).counts(SIZES).tolist() == [0, 3, 3, 3, 6, 9]
    assert Work(None).per_epoch(SIZES).tolist() == [0, 1, 1, 1, 1, 1]
    assert Work(None, epochs=2).counts(SIZES).tolist() == [0, 2, 2, 2, 2, 2]


def test_steps_replace_epochs_for_every_client_with_data() -> None:
    assert Work(B, epochs=3, steps=5).counts(SIZES).tolist() == [0, 5, 5, 5, 5, 5]
    assert Work(None, steps=5).counts(SIZES).tolist() == [0, 5, 5, 5, 5, 5]


# Minibatches


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_epoch_visits_each_example_once_in_full_batches_and_one_partial(epochs: int) -> None:
    work = Work(B, epochs)
    plan = plan_of(work, SIZES)
    assert plan.rows.shape == plan.mask.shape == (len(SIZES), 3 * epochs, B)
    assert plan.steps.tolist() == work.counts(SIZES).tolist()
    assert plan.shortest == 0
    for c, size in enumerate(SIZES.tolist()):
        steps, per_epoch = visits(plan, c), -(-size // B)
        assert len(steps) == epochs * per_epoch
        for e in range(epochs):
            passed = steps[e * per_epoch : (e + 1) * per_epoch]
            assert [len(s) for s in passed] == [B] * (size // B) + [size % B] * (size % B > 0)
            assert sorted(joined(passed)) == own_rows(SIZES, c)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_go_on_through_freshly_shuffled_epochs(steps: int) -> None:
    plan = plan_of(Work(B, steps=steps), SIZES)
    assert plan.rows.shape == (len(SIZES), steps, B)
    for c, size in enumerate(SIZES.tolist()):
        taken, per_epoch = visits(plan, c), -(-size // B)
        assert len(taken) == (steps if size else 0)
        for first in range(0, len(taken), max(per_epoch, 1)):
            passed = joined(taken[first : first + per_epoch])
            assert len(set(passed)) == len(passed)
            assert set(passed) <= set(own_rows(SIZES, c))
            if len(taken) >= first + per_epoch:
                assert sorted(passed) == own_rows(SIZES, c)
    assert plan_of(Work(B, steps=steps), SIZES[1:]).shortest == steps


def test_steps_and_epochs_of_the_same_length_visit_the_same() -> None:
    by_epochs, by_steps = plan_of(Work(B, epochs=2), SIZES[-1:]), plan_of(Work(B, steps=6), SIZES[-1:])
    assert torch.equal(by_epochs.rows, by_steps.rows)
    assert torch.equal(by_epochs.mask, by_steps.mask)


@pytest.mark.parametrize("work", [Work(None, epochs=2), Work(None, steps=2), Work(100, epochs=2)])
def test_a_full_batch_holds_all_of_a_clients_examples_in_every_step(work: Work) -> None:
    plan = plan_of(work, SIZES)
    for c, size in enumerate(SIZES.tolist()):
        assert [sorted(s) for s in visits(plan, c)] == [own_rows(SIZES, c)] * (2 if size else 0)


@pytest.mark.parametrize("work", [Work(B, epochs=2), Work(B, steps=7), Work(None, epochs=2), Work(1)])
def test_what_a_client_visits_does_not_depend_on_who_shares_its_chunk(work: Work) -> None:
    together = plan_of(work, SIZES)
    keys, starts = keys_of(len(SIZES)), starts_of(SIZES)
    for c in range(len(SIZES)):
        alone = minibatches(work, keys[c : c + 1], starts[c : c + 1], SIZES[c : c + 1])
        assert visits(alone, 0) == visits(together, c)
    backwards = minibatches(work, keys.flip(0), starts[::-1].copy(), SIZES[::-1].copy())
    for c in range(len(SIZES)):
        assert visits(backwards, len(SIZES) - 1 - c) == visits(together, c)


def test_the_order_is_a_function_of_the_key_alone() -> None:
    first, again, other = (plan_of(Work(B), SIZES, seed) for seed in (0, 0, 1))
    assert torch.equal(first.rows, again.rows)
    assert visits(first, 5) != visits(other, 5)
    sizes = np.array([12, 12])
    two = plan_of(Work(B), sizes)
    assert [[r - 12 for r in s] for s in visits(two, 1)] != visits(two, 0)


@pytest.mark.parametrize("n", [1, 7, 60])
def test_orders_of_clients_of_one_size_are_those_they_have_beside_others(n: int) -> None:
    keys, sizes = random.split(random.key(3), 50), torch.full((50, 1), n)
    assert torch.equal(draws.shuffled(keys, sizes, n, once=True), draws.shuffled(keys, sizes, 2 * n)[:, :n])


def test_epochs_are_shuffled_uniformly_and_independently() -> None:
    clients = 18_000
    plan = minibatches(Work(1, epochs=2), keys_of(clients), np.zeros(clients, np.int64), np.full(clients, 3))
    assert plan.mask.all()
    orders = (plan.rows.view(clients, 2, 3) * torch.tensor([9, 3, 1])).sum(-1)  # [C, 2 epochs] which permutation
    cells = (orders[:, 0] * 27 + orders[:, 1]).unique(return_counts=True)[1].double()
    assert len(cells) == 36
    chi2 = ((cells - clients / 36) ** 2 / (clients / 36)).sum().item()
    assert chi2 < 35 + 4 * (2 * 35) ** 0.5


@pytest.mark.parametrize("work", [Work(B, epochs=2), Work(B, steps=7), Work(None)])
def test_padding_never_points_outside_the_clients_own_rows(work: Work) -> None:
    sizes = np.array([5, 0, 3, 13, 1, 0])
    plan = plan_of(work, sizes)
    assert plan.rows.min() >= 0
    assert plan.rows.max() < sizes.sum()
    for c, size in enumerate(sizes.tolist()):
        if size:
            assert set(plan.rows[c].flatten().tolist()) <= set(own_rows(sizes, c))


def test_a_chunk_of_clients_without_data_is_all_padding() -> None:
    plan = minibatches(Work(B), keys_of(2), np.array([7, 7]), np.array([0, 0]))
    assert not plan.mask.any()
    assert plan.steps.tolist() == [0, 0]
    assert plan.shortest == 0


def test_drawing_minibatches_leaves_its_arguments_as_they_were() -> None:
    starts, sizes, keys = starts_of(SIZES), SIZES.copy(), keys_of(len(SIZES))
    before = keys.clone()
    minibatches(Work(B, 2), keys, starts, sizes)
    assert sizes.tolist() == SIZES.tolist()
    assert starts.tolist() == starts_of(SIZES).tolist()
    assert torch.equal(keys, before)


# Descent


def data_of(sizes: np.ndarray) -> tuple[Tensor, Tensor]:
    total = int(sizes.sum())
    return random.normal(random.key(1), (total, 3), F64), random.normal(random.key(2), (total, 2), F64)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(F64)


def with_batch_norm() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).to(F64)


def chunk_of(work: Work, sizes: np.ndarray, problem: Task, data: tuple[Tensor, Tensor]):
    """(plan, client → its Batches, run: maps a function of Batches over the chunk by vmap)."""
    plan, keys = plan_of(work, sizes), keys_of(len(sizes), seed=5)
    starts, counts = torch.from_numpy(starts_of(sizes)), torch.from_numpy(sizes)
    largest = int(sizes.max())

    def one(rows, mask, steps, start, examples, key, *buffers) -> Batches:
        return Batches(
            *data, rows, mask, steps, start, examples, key, buffers, plan.shortest, largest, cast, problem.x.dtype
        )

    stacked = [b.expand(len(sizes), *b.shape) for b in problem.buffers]
    arguments = (plan.rows, plan.mask, plan.steps, starts, counts, keys, *stacked)

    def client(c: int) -> Batches:
        return one(*(a[c] for a in arguments))

    def run(function):
        return vmap(lambda *a: function(one(*a)))(*arguments)

    return plan, client, run


def by_hand(module: nn.Module, steps: list[list[int]], data, make_optimizer, change=lambda module, before: None):
    """torch's own loop over these minibatches: parameters, sum of losses, examples seen."""
    opt, total, seen = make_optimizer(module.parameters()), 0.0, 0
    before = [p.detach().clone() for p in module.parameters()]
    for rows in steps:
        opt.zero_grad()
        losses = squared_error(module(data[0][rows]), data[1][rows])
        losses.mean().backward()
        change(module, before)
        opt.step()
        total, seen = total + losses.sum().item(), seen + len(rows)
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]), total, seen


@pytest.mark.parametrize("work", [Work(B, epochs=2), Work(B, steps=5), Work(None, epochs=3)])
@pytest.mark.parametrize(
    ("spec", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, 0.1)),
        ("sgd:momentum=0.9", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam(p, 0.1)),
    ],
)
def test_descent_of_a_vmapped_chunk_is_torchs_loop_for_every_client(work: Work, spec: str, make) -> None:
    problem, data = task(model(), squared_error, dtype=F64), data_of(SIZES)
    plan, _, run = chunk_of(work, SIZES, problem, data)
    ys, metrics = run(lambda b: descend(problem.grad_fn, problem.x, b, optimizer(spec), 0.1))
    for c in range(len(SIZES)):
        y, loss, seen = by_hand(model(), visits(plan, c), data, make)
        torch.testing.assert_close(ys[c], y, **NEAR)
        torch.testing.assert_close(metrics.loss[c].item(), loss, **NEAR)
        assert metrics.examples[c] == metrics.gradients[c] == seen
    assert torch.equal(ys[0], problem.x)  # no data, no step


@pytest.mark.parametrize("sizes", [SIZES, SIZES[2:], SIZES[3:4].repeat(3)])  # the shortest takes 0, 2 and all steps
def test_a_vmapped_chunk_equals_its_clients_one_by_one(sizes: np.ndarray) -> None:
    problem, data = task(with_batch_norm(), squared_error, dtype=F64), data_of(sizes)
    plan, client, run = chunk_of(Work(B, epochs=2), sizes, problem, data)

    def update(b: Batches):
        return descend(problem.grad_fn, problem.x, b, optimizer("sgd:momentum=0.9"), torch.tensor(0.1, dtype=F64))

    ys, metrics = run(update)
    for c in range(len(sizes)):
        y, alone = update(client(c)._replace(shortest=0))  # so that no step is taken for granted
        own = int(plan.steps[c])
        cut = client(c)._replace(rows=plan.rows[c, : max(own, 1)], mask=plan.mask[c, : max(own, 1)], shortest=own)
        torch.testing.assert_close(update(cut)[0], y, **NEAR)
        torch.testing.assert_close(ys[c], y, **NEAR)
        torch.testing.assert_close([m[c] for m in metrics.buffers], list(alone.buffers), **NEAR)
        assert alone.examples == metrics.examples[c]


@pytest.mark.parametrize("work", [Work(B, epochs=2), Work(B, steps=4)])
def test_module_buffers_follow_each_clients_own_batches_and_stop_with_it(work: Work) -> None:
    problem, data = task(with_batch_norm(), squared_error, dtype=F64), data_of(SIZES)
    plan, _, run = chunk_of(work, SIZES, problem, data)
    ys, metrics = run(lambda b: descend(problem.grad_fn, problem.x, b, optimizer("sgd"), 0.1))
    # torch refuses batch norm over a single value a channel, so these clients are those without such a step.
    for c in (0, 2, 3, 5):
        module = with_batch_norm()
        y, _, _ = by_hand(module, visits(plan, c), data, lambda p: torch.optim.SGD(p, 0.1))
        torch.testing.assert_close(ys[c], y, **NEAR)
        after = dict(zip(problem.buffer_names, (b[c] for b in metrics.buffers), strict=True))
        torch.testing.assert_close(after, dict(module.named_buffers()), **NEAR)


def test_the_direction_sees_the_gradient_and_the_local_model() -> None:
    problem, data, mu = task(model(), squared_error, dtype=F64), data_of(SIZES), 0.7
    plan, _, run = chunk_of(Work(B, epochs=2), SIZES, problem, data)
    ys, _ = run(
        lambda b: descend(
            problem.grad_fn, problem.x, b, optimizer("sgd"), 0.1, direction=lambda g, y: g + mu * (y - problem.x)
        )
    )

    def proximal(module: nn.Module, before: list[Tensor]) -> None:
        for p, x in zip(module.parameters(), before, strict=True):
            p.grad += mu * (p.detach() - x)

    for c in range(len(SIZES)):
        y, _, _ = by_hand(model(), visits(plan, c), data, lambda p: torch.optim.SGD(p, 0.1), proximal)
        torch.testing.assert_close(ys[c], y, **NEAR)


@pytest.mark.parametrize("max_norm", [0.05, 1.0, 1e6])
def test_gradients_are_clipped_to_the_norm_before_the_direction_is_taken(max_norm: float) -> None:
    problem, data = task(model(), squared_error, dtype=F64), data_of(SIZES)
    plan, _, run = chunk_of(Work(B, epochs=2), SIZES, problem, data)
    ys, _ = run(
        lambda b: descend(
            problem.grad_fn, problem.x, b, optimizer("sgd"), 0.1, direction=lambda g, y: 2 * g, max_norm=max_norm
        )
    )

    def clip(module: nn.Module, before: list[Tensor]) -> None:
        norm = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).norm()
        for p in module.parameters():
            p.grad *= 2 * min(1.0, max_norm / norm.item())

    for c in range(len(SIZES)):
        y, _, _ = by_hand(model(), visits(plan, c), data, lambda p: torch.optim.SGD(p, 0.1), clip)
        torch.testing.assert_close(ys[c], y, **NEAR)


def test_every_step_of_every_client_has_a_key_of_its_own() -> None:
    problem = task(model(), squared_error, dtype=F64)
    _, client, _ = chunk_of(Work(B, epochs=2), SIZES, problem, data_of(SIZES))
    keys = [int(client(c).at(k).key) for c in range(len(SIZES)) for k in range(6)]
    keys += [int(batch.key) for c in range(len(SIZES)) for batch in client(c).whole()]
    assert len(set(keys)) == len(keys)


def test_dropout_in_a_vmapped_chunk_equals_its_clients_one_by_one() -> None:
    problem = task(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2)), squared_error, dtype=F64)
    sizes = np.array([5, 9, 9])
    _, client, run = chunk_of(Work(B, epochs=2), sizes, problem, data_of(sizes))

    def update(b: Batches) -> Tensor:
        return descend(problem.grad_fn, problem.x, b, optimizer("sgd"), 0.01)[0]

    ys = run(update)
    for c in range(len(sizes)):
        torch.testing.assert_close(ys[c], update(client(c)), **NEAR)


# Full gradient


@pytest.mark.parametrize("batch_size", [1, B, 5, None])
def test_the_full_gradient_is_the_mean_over_all_of_a_clients_examples(batch_size: int | None) -> None:
    problem, data = task(model(), squared_error, dtype=F64), data_of(SIZES)
    _, client, run = chunk_of(Work(batch_size), SIZES, problem, data)
    gs, metrics = run(lambda b: full_gradient(problem.grad_fn, problem.x, b))
    for c, size in enumerate(SIZES.tolist()):
        rows, module = own_rows(SIZES, c), model()
        losses = squared_error(module(data[0][rows]), data[1][rows])
        expected = torch.zeros_like(problem.x)
        if size:
            parts = torch.autograd.grad(losses.mean(), list(module.parameters()))
            expected = torch.cat([p.reshape(-1) for p in parts])
        torch.testing.assert_close(gs[c], expected, **NEAR)
        torch.testing.assert_close(metrics.loss[c], losses.sum().detach(), **NEAR)
        assert metrics.examples[c] == metrics.gradients[c] == size
        torch.testing.assert_close(full_gradient(problem.grad_fn, problem.x, client(c))[0], expected, **NEAR)
    assert torch.equal(gs[0], torch.zeros_like(problem.x))


@pytest.mark.parametrize("batch_size", [1, B, 5, None])
def test_the_whole_of_a_clients_data_comes_once_and_in_order(batch_size: int | None) -> None:
    problem, data = task(model(), squared_error, dtype=F64), data_of(SIZES)
    _, client, _ = chunk_of(Work(batch_size), SIZES, problem, data)
    for c in range(len(SIZES)):
        seen = torch.cat([batch.x[batch.mask] for batch in client(c).whole()])
        assert torch.equal(seen, data[0][own_rows(SIZES, c)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_another_clients_broken_data_never_reaches_a_client(bad: float) -> None:
    problem, data, sizes = task(with_batch_norm(), squared_error, dtype=F64), data_of(SIZES), SIZES[1:]
    _, _, run = chunk_of(Work(B, epochs=2), sizes, problem, data)

    def update(b: Batches):
        y, metrics = descend(problem.grad_fn, problem.x, b, optimizer("sgd"), 0.1)
        g, cost = full_gradient(problem.grad_fn, problem.x, b)
        return y, metrics.loss, metrics.buffers, g, cost.loss

    clean = run(update)
    for c in range(len(sizes)):
        broken = [values.clone() for values in data]
        for values in broken:
            others = torch.ones(len(values), dtype=torch.bool)
            others[own_rows(sizes, c)] = False
            values[others] = bad
        _, _, run = chunk_of(Work(B, epochs=2), sizes, problem, tuple(broken))
        for a, b in zip(leaves(run(update)), leaves(clean), strict=True):
            assert torch.equal(a[c], b[c])


# Small parts


def test_the_transform_is_applied_to_stored_inputs_and_not_to_targets() -> None:
    stored, targets = torch.arange(6, dtype=torch.uint8)[:, None], torch.arange(6)
    plan = minibatches(Work(2), keys_of(1), np.array([2]), np.array([3]))
    zero = torch.zeros((), dtype=torch.int64)
    batches = Batches(
        stored, targets, plan.rows[0], plan.mask[0], plan.steps[0], zero + 2, zero + 3, zero, (), 2, 3,
        lambda x, dtype: x.to(dtype) / 10, torch.float32,
    )  # fmt: skip
    for batch in (batches.at(0), batches.at(1), *batches.whole()):
        assert batch.x.dtype == torch.float32
        assert batch.y.dtype == torch.int64
        torch.testing.assert_close(batch.x[:, 0], batch.y.float() / 10)


def test_keep_where_chooses_whole_trees() -> None:
    new, old = (torch.ones(3), (torch.ones(()),)), (torch.zeros(3), (torch.zeros(()),))
    yes, no = (keep_where(torch.tensor(condition), new, old) for condition in (True, False))
    assert all(torch.equal(a, b) for a, b in ((yes[0], new[0]), (yes[1][0], new[1][0])))
    assert all(torch.equal(a, b) for a, b in ((no[0], old[0]), (no[1][0], old[1][0])))


def test_an_uncompressed_message_costs_the_bits_of_its_entries() -> None:
    payload = (torch.zeros(10), torch.zeros(3, dtype=F64), torch.zeros((), dtype=torch.bfloat16))
    assert float_bits(payload) == 10 * 32 + 3 * 64 + 16
    sent = message(payload, torch.tensor(2.0))
    assert sent.bits == float_bits(payload)
    assert sent.weight == 2
    mapped = vmap(lambda x: float_bits(x) + 0 * x.sum())(torch.zeros(4, 10))
    assert mapped.tolist() == [320] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_rows_taken_are_those_of_indexing(dtype: torch.dtype) -> None:
    x, rows = torch.arange(7 * 2 * 3).view(7, 2, 3).to(dtype), torch.tensor([[6, 0], [3, 3]])
    for source in (x, x[:, 0, 0], x.transpose(1, 2), x[:0]):
        at = rows if len(source) else rows[:0]
        assert torch.equal(take(source, at), source[at])
        if len(source):
            assert torch.equal(vmap(functools.partial(take, source))(at), source[at])
