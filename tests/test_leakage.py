"""What updates give away of words: against numpy written from the definitions, and what becomes of clients that do."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, run
from torch import nn
from torch.func import vmap

import vfl
from algorithms.fedavg import FedAvg
from vfl.data.container import FederatedData, Packed, tokens
from vfl.leakage import Leakage, log_probabilities, practical_epsilon, words_recovered

V, E, T = 12, 3, 4
SIZES = (3, 5, 2, 4)
WHOLE: dict[str, Any] = {"batch_size": None, "local_steps": 1, "clients_per_round": "all", "chunk": 3, "seed": 1}
Array = np.ndarray


class Bag(nn.Module):
    """Scores of the next word from the mean of the embeddings before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, E)
        self.output = nn.Linear(E, V)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.embedding(x).mean(1))


def words() -> FederatedData:
    """Clients with words of their own: client i has 3i to 3i + 2 alone."""
    draw = np.random.default_rng(5)
    owner = np.repeat(np.arange(4), SIZES)
    x = torch.from_numpy(3 * owner[:, None] + draw.integers(0, 2, (sum(SIZES), T)))
    y = torch.from_numpy(3 * owner + draw.integers(0, 3, sum(SIZES)))
    return FederatedData("words", Packed(x, y, np.cumsum([0, *SIZES])), None, None, None, V, tokens)


def task() -> vfl.Task:
    torch.manual_seed(3)
    return vfl.task(Bag(), dtype=torch.float64)


def parts(x: Array) -> tuple[Array, Array, Array]:
    embedding, weight, bias = np.split(x, [V * E, 2 * V * E])
    return embedding.reshape(V, E), weight.reshape(V, E), bias


def log_softmax(x: Array, inputs: Array) -> Array:
    embedding, weight, bias = parts(x)
    scores = embedding[inputs].mean(1) @ weight.T + bias
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def gradient(x: Array, inputs: Array, y: Array) -> Array:
    """Of the mean cross-entropy, by hand."""
    embedding, weight, _ = parts(x)
    residual = np.exp(log_softmax(x, inputs))
    residual[np.arange(len(y)), y] -= 1
    residual /= len(y)
    of_embedding = np.zeros((V, E))
    for row, own in zip(residual @ weight / T, inputs, strict=True):
        np.add.at(of_embedding, own, row)
    of_weight = residual.T @ embedding[inputs].mean(1)
    return np.concatenate([of_embedding.ravel(), of_weight.ravel(), residual.sum(0)])


def expected(x: Array, inputs: Array, y: Array, lr: float, weighted: bool = False) -> tuple[float, float]:
    """(practical epsilon, share of words) of a client that takes one gradient step."""
    delta = -0.1 * gradient(x, inputs, y)
    at = np.arange(len(y)), y
    before = log_softmax(x, inputs)[at]
    after = log_softmax(x + lr * delta / (np.abs(delta) + 1e-8), inputs)[at]
    ratio = (1e-9 - before) / (1e-9 - after)
    if weighted:
        ratio = ratio * np.exp(np.maximum(before, after))
    norms = np.linalg.norm(parts(delta)[0], axis=1)
    largest = np.argsort(-norms)[: inputs.size]
    recovered = [w in largest[norms[largest] > 0] for w in inputs.ravel()]
    return max(0.0, math.log(ratio.max())), float(np.mean(recovered))


@pytest.mark.parametrize(("weighted", "lr"), [(False, 0.5), (True, 1.0)])
def test_the_metrics_are_the_largest_of_the_cohort(weighted: bool, lr: float) -> None:
    data, learning = words(), task()
    each = [expected(learning.x.numpy(), *(c.numpy() for c in data.clients.client(i)), lr, weighted) for i in range(4)]
    options = WHOLE | {"wrappers": [Leakage(leakage="measure", leakage_lr=lr, leakage_weighted=weighted)]}
    for execution in ("vmap", "loop"):
        found = run(FedAvg(), learning, data, 1, execution=execution, **options)
        assert found["metric.practical_epsilon"][0] == pytest.approx(max(e for e, _ in each), rel=1e-10)
        assert found["metric.words_recovered"][0] == max(share for _, share in each) == 1  # one step shows every word
        assert found["metric.leaking"][0] == 0
    assert max(e for e, _ in each) > 0.1


def test_measuring_changes_nothing() -> None:
    measured = run(FedAvg(), task(), words(), 3, wrappers=[Leakage(leakage="measure")], **WHOLE)
    plain = run(FedAvg(), task(), words(), 3, **WHOLE)
    assert_same({name: measured[name] for name in plain}, plain, 1e-14)
    algorithm = FedAvg().build(task(), 4)
    assert Leakage().wrap(algorithm, task(), 4) is algorithm


def one_step(x: Array, weights: Array) -> Array:
    """The model after a round in which the clients have these weights."""
    data = words().clients
    deltas = [-0.1 * gradient(x, *(c.numpy() for c in data.client(i))) for i in range(4)]
    return x + np.average(deltas, axis=0, weights=weights)


@pytest.mark.parametrize("action", ["drop", "reweight"])
def test_clients_above_the_bound_do_not_count_or_count_less(action: Any) -> None:
    data, learning = words(), task()
    x = learning.x.numpy()
    epsilons = np.array([expected(x, *(c.numpy() for c in data.clients.client(i)), 0.5)[0] for i in range(4)])
    bound = float(np.sort(epsilons)[1:3].mean())  # two clients are above
    around = Leakage(leakage=action, leakage_bound=bound, leakage_lr=0.5)
    found = run(FedAvg(), learning, data, 1, wrappers=[around], **WHOLE)
    over = epsilons > bound
    factor = ~over if action == "drop" else np.where(over, bound / epsilons, 1)
    np.testing.assert_allclose(found["server.x"], one_step(x, np.array(SIZES) * factor), rtol=1e-10, atol=1e-12)
    assert found["metric.leaking"][0] == over.sum() == 2
    sent = 2 if action == "drop" else 4
    assert found["metric.bits_up"][0] == sent * 64 * len(x)


def test_a_bound_on_words_drops_whoever_shows_more_of_them() -> None:
    around = Leakage(leakage="drop", leakage_words=0.99)
    found = run(FedAvg(), task(), words(), 1, wrappers=[around], **WHOLE)
    assert found["metric.leaking"][0] == 4
    np.testing.assert_array_equal(found["server.x"], task().x)  # a round without any weight
    kept = run(FedAvg(), task(), words(), 1, wrappers=[Leakage(leakage="drop", leakage_words=1.0)], **WHOLE)
    assert kept["metric.leaking"][0] == 0 and np.abs(kept["server.x"] - task().x.numpy()).max() > 1e-3


def test_words_are_recovered_from_rows_that_are_not_zero_the_largest_first() -> None:
    rows, counts = torch.zeros(6, 2), torch.tensor([2.0, 1, 0, 0, 1, 0])
    assert words_recovered(rows, counts) == 0
    rows[0], rows[4] = 1, -1
    assert words_recovered(rows, counts) == 0.75  # word 1 is hidden
    rows[2:4], rows[5] = 2, 2  # noise larger than what the words leave: 4 words, rows 2, 3, 5 and one of the two
    assert words_recovered(rows, counts) == 0.5
    assert words_recovered(rows, torch.zeros(6)) == 0
    batched = vmap(words_recovered)(torch.stack([rows, 0 * rows]), torch.stack([counts, counts]))
    assert batched.tolist() == [0.5, 0]


def test_practical_epsilon_is_the_log_of_the_largest_fall_in_surprise() -> None:
    before, after = torch.tensor([-3.0, -2, -1]).double(), torch.tensor([-1.5, -2.5, -0.01]).double()
    everyone = torch.ones(3, dtype=torch.bool)
    assert practical_epsilon(before, after, everyone).item() == pytest.approx(math.log(100), rel=1e-6)
    first = torch.tensor([True, True, False])
    assert practical_epsilon(before, after, first).item() == pytest.approx(math.log(2), rel=1e-6)
    weighted = practical_epsilon(before, after, everyone, weighted=True)
    assert weighted.item() == pytest.approx(math.log(100 * math.exp(-0.01)), rel=1e-6)
    assert practical_epsilon(after, before, first) == pytest.approx(math.log(2.5 / 2), rel=1e-6)
    assert practical_epsilon(before, before, everyone) == 0 and practical_epsilon(before, after, ~everyone) == 0
    certain = practical_epsilon(before, torch.zeros(3).double(), everyone)
    assert certain.item() == pytest.approx(math.log(3e9), rel=1e-6)  # the tolerance bounds it


def test_log_probabilities_are_of_each_target() -> None:
    outputs, targets = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 0, 4]] * 2)
    wanted = outputs.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(log_probabilities(outputs, targets), wanted)
    torch.testing.assert_close(log_probabilities(outputs[:, 0], targets[:, 0]), wanted[:, 0])


def test_a_character_lstm_is_measured_at_every_position() -> None:
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.integers(0, V, (8, 5)))
    y = torch.from_numpy(draw.integers(0, V, (8, 5)))
    data = FederatedData("text", Packed(x, y, np.array([0, 3, 8])), None, None, None, V, tokens)
    torch.manual_seed(0)
    module = vfl.models.MODELS["char_lstm"](3, 6, 1, input_shape=(5,), classes=V, target_shape=(5,))
    learning = vfl.task(module, dtype=torch.float64)
    options: dict[str, Any] = {
        "clients_per_round": 2,
        "batch_size": 2,
        "seed": 1,
        "wrappers": [Leakage(leakage="measure")],
    }
    found = run(FedAvg(), learning, data, 2, chunk=2, **options)
    assert_same(run(FedAvg(), learning, data, 2, execution="loop", **options), found, 1e-10)
    assert (found["metric.practical_epsilon"] > 0).all() and (found["metric.words_recovered"] == 1).all()


def test_models_and_data_that_cannot_be_measured_are_refused() -> None:
    options: dict[str, Any] = WHOLE | {"wrappers": [Leakage(leakage="measure")]}
    data = words()
    regression = vfl.task(Bag(), lambda outputs, y: outputs[:, 0] - y, dtype=torch.float64)
    floats = data._replace(clients=data.clients._replace(y=data.clients.y.double()))
    with pytest.raises(vfl.ClientError, match=r"leakage needs a score for every class .* targets \[5\] torch.float64"):
        run(FedAvg(), regression, floats, 1, **options)
    with pytest.raises(vfl.UsageError, match="unknown leakage-embedding 'embed'; "):
        around = Leakage(leakage="drop", leakage_words=0.5, leakage_embedding="embed")
        run(FedAvg(), task(), data, 1, **WHOLE | {"wrappers": [around]})
    without = run(FedAvg(), task(), data, 1, wrappers=[Leakage(leakage="measure", leakage_embedding="none")], **WHOLE)
    assert "metric.words_recovered" not in without and "metric.practical_epsilon" in without


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"leakage": "dropp"}, "unknown leakage 'dropp'; did you mean 'drop'?"),
        ({"leakage": "drop"}, "leakage drop needs a bound: leakage-bound or leakage-words"),
        ({"leakage": "reweight"}, "leakage reweight needs a bound"),
        ({"leakage_bound": 1.0}, "does nothing with leakage none; give measure, drop or reweight"),
        ({"leakage_words": 0.5}, "does nothing with leakage none"),
        ({"leakage_bound": -1.0}, "leakage-bound is a practical epsilon from 0, not -1.0"),
        ({"leakage_words": 1.5}, "leakage-words is a share from 0 to 1, not 1.5"),
        ({"leakage_lr": 0.0}, "leakage-lr must be a finite number > 0, not 0.0"),
    ],
)
def test_an_option_without_meaning_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(vfl.UsageError) as error:
        Leakage(**options)
    assert sentence in str(error.value)
