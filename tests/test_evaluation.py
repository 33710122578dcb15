"""Evaluation against plain loops and numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.fedavg import FedAvg
from vfl import evaluation, random
from vfl.chunks import Memory
from vfl.data.container import Examples, FederatedData, Normalize, Packed, cast
from vfl.distributed import Ranks
from vfl.errors import UsageError
from vfl.evaluation import PerClient, check_metrics, evaluate, evaluate_clients, measure, objective
from vfl.problems import LinearProblem
from vfl.simulate import Evaluation, rounds, simulate
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


# The objective f = (1/N) Σ fᵢ


def clients_mean(module: nn.Module, packed: Packed) -> tuple[float, np.ndarray]:
    """f and ∇f [D], client by client through autograd; each client with examples counts once."""
    module.eval()
    parameters = list(module.parameters())
    means = []
    for i in range(packed.population):
        x, y = packed.client(i)
        if len(y):
            means.append(functional.cross_entropy(module(x), y))
    f = torch.stack(means).mean()
    return f.item(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, parameters)]).numpy()


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1, 0, 0, 12, 4], [0, 2], [9, 9]])
@pytest.mark.parametrize("batch", [4, 1000])
def test_the_objective_and_its_gradient_are_means_over_the_clients_with_data(
    sizes: list[int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BATCH", batch)
    module, problem, packed = packed_of(sizes)
    f, g = objective(problem, problem.x, (), packed, cast)
    wanted, gradient = clients_mean(module, packed)
    assert f == pytest.approx(wanted, **NEAR)
    np.testing.assert_allclose(g, gradient, rtol=1e-12, atol=1e-14)
    found = measure(["grad_norm", "objective"], problem, problem.x, (), packed, cast)
    assert list(found) == ["grad_norm", "objective"]
    assert tuple(found.values()) == pytest.approx((np.linalg.norm(gradient), wanted), **NEAR)


def test_the_objective_of_a_network_is_that_of_its_evaluation() -> None:
    """Batch norm by its running statistics, no dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).to(F64)
    with torch.no_grad():
        module[1].running_mean.fill_(0.3)
    problem = task(module, dtype=F64)
    _, _, packed = packed_of([3, 8])
    f, g = objective(problem, problem.x, problem.buffers, packed, cast)
    wanted, gradient = clients_mean(module, packed)
    assert f == pytest.approx(wanted, **NEAR)
    np.testing.assert_allclose(g, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_objectives_examples(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 7)
    module, problem, packed = packed_of([3, 0, 5, 1, 9])  # 3 batches: some ranks have none
    brought = shares(world, lambda ranks: objective(problem, problem.x, (), packed, cast, ranks))
    f, gradient = clients_mean(module, packed)
    np.testing.assert_allclose(sum(brought).numpy(), [f, *gradient], rtol=1e-12, atol=1e-14)


def least_squares(sizes: list[int], features: int = 3) -> tuple[LinearProblem, np.ndarray]:
    """A linear regression, and a point x."""
    x, y = random.normal(random.key(3), (sum(sizes), features), F64), random.normal(random.key(4), (sum(sizes),), F64)
    packed = Packed(x, y, np.concatenate([[0], np.cumsum(sizes)]))
    data = FederatedData("regression", packed, None, None, None, 0, cast)
    return LinearProblem(data), np.linspace(-1, 2, features)


def test_suboptimality_and_distance_are_measured_from_the_known_minimum() -> None:
    problem, point = least_squares([4, 2, 7])
    regression, (x, y, offsets) = problem.task(F64), problem.data.clients
    parts = [(np.split(x.numpy(), offsets[1:-1])[i], np.split(y.numpy(), offsets[1:-1])[i]) for i in range(3)]
    H = sum(A.T @ A / len(A) for A, _ in parts) / 3
    minimiser = np.linalg.solve(H, sum(A.T @ b / len(A) for A, b in parts) / 3)
    gap = (point - minimiser) @ H @ (point - minimiser) / 2
    names = ["distance", "suboptimality"]
    found = measure(names, regression, torch.from_numpy(point), (), problem.data.clients, cast)
    assert list(found) == names
    assert tuple(found.values()) == pytest.approx((np.linalg.norm(point - minimiser), gap), rel=1e-9)
    at = measure(names, regression, torch.from_numpy(minimiser), (), problem.data.clients, cast)
    assert tuple(at.values()) == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize(
    ("sizes", "metric", "sentence"),
    [
        ([4, 4], "gradnorm", "unknown metric 'gradnorm'; did you mean 'grad_norm'?"),
        ([1, 1], "distance", "metric distance: the objective has more than one minimiser; l2 would leave one"),
        ([1, 1], "suboptimality", None),
        ([4, 4], "distance", None),
    ],
)
def test_a_metric_that_cannot_be_measured_is_refused_with_the_reason(
    sizes: list[int], metric: str, sentence: str | None
) -> None:
    problem, _ = least_squares(sizes)
    if sentence is None:
        check_metrics([metric], problem.task(F64))
        return
    with pytest.raises(UsageError) as error:
        check_metrics([metric], problem.task(F64))
    assert str(error.value) == sentence


def test_what_is_unknown_of_other_models_is_refused_before_the_first_round() -> None:
    _, problem, packed = packed_of([3, 4])
    data = FederatedData("classes", packed, None, None, None, 3, cast)
    check_metrics(["objective", "grad_norm"], problem)
    for metric in ("suboptimality", "distance"):
        played = rounds(FedAvg(), problem, data, 1, clients_per_round=1, evaluation=Evaluation(metrics=(metric,)))
        with pytest.raises(UsageError, match=f"metric {metric}: the objective's minimum is known only for the model"):
            next(played)


def test_metrics_come_with_the_other_evaluations_and_cost_no_gradients() -> None:
    problem, _ = least_squares([4, 2, 7])
    histories = [
        simulate(FedAvg(local_lr=0.1), problem.task(F64), problem.data, 5, clients_per_round=2, evaluation=when).history
        for when in (Evaluation(2, metrics=("grad_norm", "distance")), Evaluation(0, metrics=("grad_norm",)))
    ]
    assert [[name in row for name in ("grad_norm", "distance")] for row in histories[0]] == [
        [False] * 2, [True] * 2, [False] * 2, [True] * 2, [True] * 2,
    ]  # fmt: skip
    assert not any("grad_norm" in row for row in histories[1])
    assert [row["gradients"] for row in histories[0]] == [row["gradients"] for row in histories[1]]
    assert [row["train_loss"] for row in histories[0]] == [row["train_loss"] for row in histories[1]]


def test_the_bits_of_a_round_add_up_to_the_bits_so_far_over_a_continued_run() -> None:
    problem, _ = least_squares([4, 2, 7])
    options = {"clients_per_round": 2, "batch_size": None}
    first = list(rounds(FedAvg(), problem.task(F64), problem.data, 2, **options))
    more = list(rounds(FedAvg(), problem.task(F64), problem.data, 5, state=first[-1][0], **options))
    rows = [metrics for _, metrics in first + more]
    for direction in ("up", "down"):
        each = [row[f"round_bits_{direction}"] for row in rows]
        assert each == [2 * 3 * 64] * 5 and np.cumsum(each).tolist() == [row[f"bits_{direction}"] for row in rows]


def test_memory_is_reported_with_the_evaluations() -> None:
    if Memory(torch.device("cpu")).peak() is None:
        pytest.skip("the system does not tell the memory in use")
    problem, _ = least_squares([4, 2, 7])
    rows = simulate(FedAvg(), problem.task(F64), problem.data, 3, clients_per_round=2, evaluation=Evaluation(2)).history
    assert [row.get("memory", 0) > 2**20 for row in rows] == [False, True, True]
    assert all(isinstance(row["memory"], int) for row in rows[1:])
