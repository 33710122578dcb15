"""Evaluation against plain loops and numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vfl import evaluation, random
from vfl.data.container import Examples, Normalize, Packed, cast
from vfl.distributed import Ranks
from vfl.evaluation import PerClient, evaluate, evaluate_clients
from vfl.task import Task, squared_error, task

F64 = torch.float64
NEAR = {"rel": 1e-12, "abs": 1e-12}


def problem_and_data(count: int, norm: bool = False) -> tuple[nn.Module, Task, Examples]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5) if norm else nn.Tanh(), nn.Linear(5, 3)).to(F64)
    x = random.normal(random.key(1), (count, 4), F64)
    return module, task(module, dtype=F64), Examples(x, random.randint(random.key(2), (count,), 3))


def by_hand(module: nn.Module, examples: Examples) -> tuple[list[float], list[float]]:
    """Loss and accuracy of each example, one at a time."""
    module.eval()
    losses, hits = [], []
    with torch.no_grad():
        for x, y in zip(*examples, strict=True):
            out = module(x[None])
            losses.append(functional.cross_entropy(out, y[None]).item())
            hits.append(float(out.argmax() == y))
    return losses, hits


@pytest.mark.parametrize("count", [1, 6, 7, 8, 20, 21])
def test_evaluation_equals_a_plain_loop_whatever_the_batches(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 7)
    module, problem, examples = problem_and_data(count)
    losses, hits = by_hand(module, examples)
    found = evaluate(problem, problem.x, problem.buffers, examples, cast)
    assert list(found) == ["loss", "accuracy"]
    assert found == pytest.approx({"loss": np.mean(losses), "accuracy": np.mean(hits)}, **NEAR)


def test_the_model_given_is_evaluated_with_the_buffers_given() -> None:
    module, problem, examples = problem_and_data(30, norm=True)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
        module[1].running_mean.fill_(0.3)
        module[1].running_var.fill_(2.0)
    x = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    losses, hits = by_hand(module, examples)
    found = evaluate(problem, x, tuple(module.buffers()), examples, cast)
    assert found == pytest.approx({"loss": np.mean(losses), "accuracy": np.mean(hits)}, **NEAR)
    start = evaluate(problem, problem.x, problem.buffers, examples, cast)
    assert abs(start["loss"] - found["loss"]) > 1e-3


def test_the_transform_turns_stored_inputs_into_the_models() -> None:
    module, problem, _ = problem_and_data(1)
    stored = Examples(torch.arange(40, dtype=torch.uint8).reshape(10, 4), torch.arange(10) % 3)
    found = evaluate(problem, problem.x, (), stored, Normalize(scale=255.0, mean=(0.5,), std=(0.2,)))
    losses, _ = by_hand(module, Examples((stored.x.to(F64) / 255 - 0.5) / 0.2, stored.y))
    assert found["loss"] == pytest.approx(np.mean(losses), **NEAR)


def test_sums_over_many_examples_do_not_lose_the_small_ones() -> None:
    module = nn.Linear(1, 1, bias=False)
    problem = task(module, lambda out, y: y, {})
    y = torch.cat([torch.full((1,), 2.0**25), torch.ones(4999)])  # float32 would drop every 1
    found = evaluate(problem, problem.x, (), Examples(torch.zeros(5000, 1), y), cast)
    assert found["loss"] == (2.0**25 + 4999) / 5000


def test_evaluating_nothing_is_not_a_number() -> None:
    _, problem, examples = problem_and_data(0)
    found = evaluate(problem, problem.x, (), examples, cast)
    assert list(found) == ["loss", "accuracy"]
    assert all(np.isnan(value) for value in found.values())


def test_custom_metrics_are_averaged_over_examples() -> None:
    problem = task(nn.Linear(4, 2), squared_error, {"mae": lambda out, y: (out - y).abs().mean(1)}, dtype=F64)
    x, y = random.normal(random.key(0), (9, 4), F64), random.normal(random.key(1), (9, 2), F64)
    out = x @ problem.x[:8].reshape(2, 4).T + problem.x[8:]
    found = evaluate(problem, problem.x, (), Examples(x, y), cast)
    wanted = {"loss": (out - y).square().sum().item() / 18, "mae": (out - y).abs().mean().item()}
    assert found == pytest.approx(wanted, **NEAR)


def shares(world: int, function) -> list[Tensor]:
    """What each rank would bring to the all-reduce."""
    brought: list[Tensor] = []

    class Alone(Ranks):
        def all_reduce(self, flat: Tensor) -> Tensor:
            brought.append(flat.clone())
            return flat

    for rank in range(world):
        function(Alone(rank, world))
    assert len(brought) == world
    return brought


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_batches_and_their_sums_are_the_whole(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 7)
    _, problem, examples = problem_and_data(25)  # 4 batches: the fifth rank has none
    seen: list[int] = []

    def counting(x: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(len(x))
        return cast(x, dtype)

    brought = shares(world, lambda ranks: evaluate(problem, problem.x, (), examples, counting, ranks))
    whole = evaluate(problem, problem.x, (), examples, cast)
    assert sum(brought).tolist() == pytest.approx([25 * whole["loss"], 25 * whole["accuracy"]], **NEAR)
    assert sum(seen) <= 25 + world  # one example a rank may serve to learn the names of the metrics


# Per client


def packed_of(sizes: list[int]) -> tuple[nn.Module, Task, Packed]:
    module, problem, examples = problem_and_data(sum(sizes))
    return module, problem, Packed(*examples, np.concatenate([[0], np.cumsum(sizes)]))


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1, 0, 0, 12, 4], [0, 0, 2], [2, 0], [1], [9, 9]])
def test_each_client_counts_once_and_empty_ones_not_at_all(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 4)
    module, problem, packed = packed_of(sizes)
    each = by_hand(module, Examples(packed.x, packed.y))
    found = evaluate_clients(problem, problem.x, (), packed, cast)
    assert list(found) == ["loss", "accuracy"]
    for name, values in zip(found, each, strict=True):
        parts = [np.mean(part) for part in np.split(values, packed.offsets[1:-1]) if len(part)]
        bad = np.negative(parts) if name == "loss" else np.array(parts)  # the bad end is low
        sign = -1 if name == "loss" else 1
        wanted = (np.mean(parts), np.std(parts), sign * np.percentile(bad, 10), sign * bad.min())
        assert tuple(found[name]) == pytest.approx(wanted, **NEAR)


def test_the_spread_of_ten_clients_is_the_one_worked_out_by_hand() -> None:
    problem = task(nn.Linear(1, 1), lambda out, y: y, {"score": lambda out, y: y}, dtype=F64)
    y = torch.tensor([v for v in range(11) for _ in range(v + 1)], dtype=F64)  # client v has v + 1 examples of value v
    packed = Packed(torch.zeros(66, 1), y, np.concatenate([[0], np.cumsum(range(1, 12))]))
    found = evaluate_clients(problem, problem.x, (), packed, cast)
    assert found["loss"] == pytest.approx(PerClient(5, 10**0.5, 9, 10), **NEAR)
    assert found["score"] == pytest.approx(PerClient(5, 10**0.5, 1, 0), **NEAR)


def test_the_spread_over_no_clients_is_not_a_number() -> None:
    _, problem, packed = packed_of([0, 0])
    for spread in evaluate_clients(problem, problem.x, (), packed, cast).values():
        assert all(np.isnan(value) for value in spread)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_clients_examples_and_their_sums_are_the_whole(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 4)
    module, problem, packed = packed_of([3, 0, 5, 1, 9])
    brought = shares(world, lambda ranks: evaluate_clients(problem, problem.x, (), packed, cast, ranks))
    each = by_hand(module, Examples(packed.x, packed.y))
    wanted = [[sum(part) for part in np.split(values, packed.offsets[1:-1])] for values in each]
    np.testing.assert_allclose(sum(brought).numpy(), wanted, rtol=1e-12, atol=1e-12)
