"""Clients' own models: evaluated one client at a time by hand, and fine-tuned before."""

import numpy as np
import pytest
import torch
from helpers import EMPTY, SIZES, N, federated, mlp, norm_and_dropout, regression
from torch import nn

import vfl
from algorithms.ditto import Ditto
from algorithms.fedavg import FedAvg
from vfl import evaluation, personal
from vfl.data.container import Packed
from vfl.personal import FineTuning, evaluate_personal

NEAR = {"rtol": 1e-10, "atol": 1e-12}
DATA = federated()
HELD = DATA._replace(held_out=Packed(*DATA.clients.take(np.arange(41)[::-1], DATA.clients.offsets)))


def played(algorithm, task, data, rounds=2, **options):
    """An engine and its state after some rounds with a client's state of its own."""
    options = {"clients_per_round": 4, "execution": "vmap", "chunk": 3} | options
    engine = vfl.Engine(algorithm, task, data, work=vfl.Work(4), **options)
    state = engine.init(1)
    for _ in range(rounds):
        state, _ = engine.play(state)
    return engine, state


def remembering(task):
    """FedAvg whose clients remember the last model they were sent, which serves as their own model."""
    plain = FedAvg().build(task, N)

    def client_update(sent, client, batches, key):
        message, _, metrics = plain.client_update(sent, (), batches, key)
        return message, vfl.Model(sent.x + 1, metrics.buffers), metrics

    def model(server, client, batches):
        return client

    start = vfl.Model(task.x.clone(), tuple(b.clone() for b in task.buffers))
    return plain._replace(init_client=lambda x: start, client_update=client_update, personal=vfl.Personal(model))


def values_by_hand(task, x, buffers, examples):
    batch = vfl.Batch(examples.x, examples.y, torch.ones(len(examples.y), dtype=torch.bool), vfl.random.key(0))
    return {name: float(v.mean()) for name, v in task.evaluate(x, batch, buffers).items()}


@pytest.mark.parametrize("data", [DATA, HELD], ids=["train", "held-out"])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_each_clients_own_model_is_evaluated_on_its_own_examples(data, at_once, monkeypatch):
    task = norm_and_dropout()
    monkeypatch.setattr(personal, "AT_ONCE", at_once * len(task.x))
    monkeypatch.setattr(personal, "BATCH", 7)
    engine, state = played(remembering(task), task, data)
    ids, (x, *buffers) = state.store.rows()
    assert 1 < len(ids) < N - 1, "some clients should not have taken part yet"
    rows = {i: (x[r], tuple(b[r] for b in buffers)) for r, i in enumerate(ids.tolist())}
    own = data.clients if data is DATA else HELD.held_out
    each = [values_by_hand(task, *rows.get(i, (task.x, task.buffers)), own.client(i)) for i in range(N) if SIZES[i]]
    found = evaluate_personal(engine, state)
    assert list(found) == ["loss", "accuracy"]
    for name, spread in found.items():
        wanted = evaluation.spread(name, np.array([one[name] for one in each]))
        np.testing.assert_allclose(spread, wanted, **NEAR)
    assert found["loss"].std > 0.01


def fine_tuned_by_hand(task, x, i, data, batches, lr):
    for rows in batches:
        batch = vfl.Batch(data.clients.x[rows], data.clients.y[rows], torch.ones(len(rows), dtype=torch.bool),
                          vfl.random.key(0))  # fmt: skip
        g, _ = task.grad_fn(x, batch, ())
        x = x - lr * g
    return x


def test_fine_tuning_takes_that_many_steps_from_the_global_model_on_the_clients_training_examples():
    task = mlp()
    tuned = FineTuning(fine_tune_steps=3, fine_tune_lr=0.3).wrap(FedAvg().build(task, N), task, N)
    options = {"rounds": 2, "clients_per_round": "all", "batch_size": None, "execution": "vmap"}
    state, history = vfl.simulate(tuned, task, HELD, evaluation=vfl.Evaluation(0, 1), **options)
    each = []
    for i in range(N):
        if SIZES[i]:
            rows = np.arange(HELD.clients.offsets[i], HELD.clients.offsets[i + 1])
            x = fine_tuned_by_hand(task, state.server.x, i, HELD, [rows] * 3, 0.3)
            each.append(values_by_hand(task, x, (), HELD.held_out.client(i)))
    for name in ("loss", "accuracy"):
        wanted = evaluation.spread(name, np.array([one[name] for one in each]))
        found = [history[-1][f"personal_test_{name}_{part}"] for part in wanted._fields]
        np.testing.assert_allclose(found, wanted, **NEAR)
    # What is measured leaves the training as it is.
    plain = vfl.simulate(FedAvg(), task, HELD, **options)
    assert torch.equal(plain.x, state.server.x)
    assert not any(name.startswith("personal_") for name in plain.history[-1])


def test_fine_tuning_draws_minibatches_of_the_clients_own_examples_and_the_same_ones_again():
    task = norm_and_dropout()
    tuned = FineTuning(fine_tune_steps=4, fine_tune_optimizer="adam", fine_tune_lr=0.01)
    engine, state = played(tuned.wrap(FedAvg().build(task, N), task, N), task, DATA)
    found, again = evaluate_personal(engine, state), evaluate_personal(engine, state)
    assert found == again
    before = vfl.evaluate_clients(task, state.server.x, state.buffers, DATA.clients, DATA.transform)
    assert found["loss"].mean < before["loss"].mean - 0.05


def test_no_steps_of_fine_tuning_change_nothing():
    algorithm = FedAvg().build(mlp(), N)
    assert FineTuning().wrap(algorithm, mlp(), N) is algorithm


def test_a_model_that_vmap_cannot_take_is_evaluated_client_by_client():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2 if x.sum().item() > 1e9 else 1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Branching(5, 3)
    task = vfl.task(module, dtype=torch.float64)
    plain = nn.Linear(5, 3)
    plain.load_state_dict(module.state_dict())
    usual = vfl.task(plain, dtype=torch.float64)
    found = []
    for one, execution in ((task, "loop"), (usual, "vmap")):
        tuned = FineTuning(fine_tune_steps=2).wrap(FedAvg().build(one, N), one, N)
        found.append(evaluate_personal(*played(tuned, one, DATA, execution=execution)))
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], **NEAR)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_clients_and_their_sums_are_the_whole(world):
    task = regression()
    tuned = FineTuning(fine_tune_steps=1).wrap(FedAvg().build(task, N), task, N)
    engine, state = played(tuned, task, DATA)
    brought = []

    class Alone(vfl.Ranks):
        def all_reduce(self, flat):
            brought.append(flat.clone())
            return flat

    state.store.owners.clear()
    for rank in range(world):
        engine.ranks = Alone(rank, world)
        evaluate_personal(engine, state)
    engine.ranks = vfl.Ranks()
    whole = evaluate_personal(engine, state)
    sizes = np.array(SIZES)[np.array(SIZES) > 0]
    values = (sum(brought)[:, np.arange(N) != EMPTY].numpy() / sizes).mean(1)
    np.testing.assert_allclose(values, [whole["loss"].mean, whole["accuracy"].mean], **NEAR)
    assert all(float(part.abs().sum()) > 0 for part in brought)


def test_replicas_have_personal_models_each():
    task, sizes = regression(), [3, 7, 5, 9]
    data = federated(sizes)
    tuned = FineTuning(fine_tune_steps=1).wrap(FedAvg().build(task, 4), task, 4)
    options = {"clients_per_round": 2, "execution": "vmap", "evaluation": vfl.Evaluation(0, 1)}
    together = vfl.simulate(tuned, task, data, 2, seed=5, replicas=2, **options).history[-1]
    for r in range(2):
        alone = vfl.simulate(tuned, task, data, 2, seed=5 + r, **options).history[-1]
        for name in ("personal_train_loss_mean", "client_train_loss_mean"):
            np.testing.assert_allclose(together["replicas"][r][name], alone[name], **NEAR)


def test_each_point_of_a_grid_has_the_personal_models_of_its_step_size():
    task, data = regression(), federated([3, 7, 5, 9])
    options = {"clients_per_round": 2, "execution": "vmap", "evaluation": vfl.Evaluation(0, 1)}
    grid = vfl.Replication(1, {"local_lr": (0.05, 0.2)})
    together = vfl.simulate(Ditto(), task, data, 2, replicas=grid, **options).history[-1]
    for replica in together["replicas"]:
        alone = vfl.simulate(Ditto(local_lr=replica["local_lr"]), task, data, 2, **options).history[-1]
        name = "personal_train_loss_mean"
        np.testing.assert_allclose(replica[name], alone[name], **NEAR)
    assert together["personal_train_loss_mean_std"] > 1e-3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fine_tune_steps": -1}, "fine-tune-steps must be at least 0, not -1"),
        ({"fine_tune_lr": float("nan")}, "fine-tune-lr must be a finite number ≥ 0, not nan"),
        ({"fine_tune_optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
    ],
)
def test_fine_tuning_without_meaning_is_refused(options, sentence):
    with pytest.raises(vfl.UsageError, match=sentence.replace("?", ".")):
        FineTuning(**options)


def test_fine_tuning_twice_and_an_algorithm_without_personal_models_are_refused():
    task = mlp()
    plain = FedAvg().build(task, N)
    tuned = FineTuning(fine_tune_steps=1)
    with pytest.raises(vfl.UsageError, match="fine-tunes its models already"):
        tuned.wrap(tuned.wrap(plain, task, N), task, N)
    with pytest.raises(vfl.UsageError, match="no personal models"):
        evaluate_personal(*played(plain, task, DATA, rounds=1))
