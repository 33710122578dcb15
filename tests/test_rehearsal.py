"""Server rehearsal: FedAvg and steps on the server's own examples, by hand and through the engine."""

import cli_runs
import numpy as np
import pytest
import torch
from cli_runs import here as here
from helpers import (
    CLASSES,
    EMPTY,
    FEATURES,
    SIZES,
    N,
    assert_same,
    federated,
    norm_and_dropout,
    numbers_of,
    regression,
    round_keys,
    run,
)
from papers import ROUNDS, drawn, local_model, own_rows

import vfl
from algorithms.ditto import Ditto
from algorithms.fedavg import FedAvg
from algorithms.marina import PPMarina
from vfl import checkpoint
from vfl.data.container import Examples
from vfl.rehearsal import Rehearsal, rehearsed
from vfl.wrappers import Context

DRAW = np.random.default_rng(5)
HELD = Examples(
    torch.from_numpy(DRAW.standard_normal((30, FEATURES))), torch.from_numpy(DRAW.integers(CLASSES, size=30))
)
OPTIONS = Rehearsal(rehearsal_steps=3, rehearsal_lr=0.2, rehearsal_optimizer="sgd:momentum=0.5", rehearsal_batch_size=8)
RUN = {"clients_per_round": 5, "batch_size": 4, "local_epochs": 2, "seed": 7, "chunk": 100}


def context(data):
    return Context(data.clients.population, "all", "uniform", 1, data)


def rehearsing(config, task, options=OPTIONS, held=HELD):
    return rehearsed(config.build(task, N), task, held, options)


def gradient(x, rows):
    """∇ of softmax regression's mean cross-entropy on some of the server's examples, the loss beside it."""
    inputs, labels = HELD.x.numpy()[rows], HELD.y.numpy()[rows]
    W, b = x[: CLASSES * FEATURES].reshape(CLASSES, FEATURES), x[CLASSES * FEATURES :]
    scores = inputs @ W.T + b
    e = np.exp(scores)
    loss = np.mean(np.log(e.sum(1)) - scores[np.arange(len(rows)), labels])
    r = e / e.sum(1, keepdims=True) - np.eye(CLASSES)[labels]
    return np.concatenate([(r.T @ inputs).ravel(), r.sum(0)]) / len(rows), loss


@pytest.mark.parametrize("everyone", [True, False])
def test_rehearsed_fedavg_equals_numpy_over_fifty_rounds(everyone):
    task = regression()
    x, m, losses = task.x.numpy(), np.zeros(len(task.x)), []
    for t in range(ROUNDS):
        ids = vfl.sampler("uniform", 5, federated().clients.offsets).draw(round_keys(7, t)[0]).ids.tolist()
        whole = {i: [own_rows(i)] * 3 if SIZES[i] else [] for i in range(N)}
        clients = whole if everyone else drawn(7, t, ids, vfl.Work(4, 2))
        models = {i: local_model(x, batches, 0.1, lambda g, y: g) for i, batches in clients.items() if batches}
        x = sum(SIZES[i] * y for i, y in models.items()) / sum(SIZES[i] for i in models)
        key, losses = vfl.random.fold_in(round_keys(7, t)[2], -1), [*losses, 0.0]
        for k in range(3):
            rows = vfl.random.choice(vfl.random.split(vfl.random.fold_in(key, k))[0], 30, 8).numpy()
            g, loss = gradient(x, rows)
            m = 0.5 * m + g
            x = x - 0.2 * m
            losses[-1] += loss / 3
    work = {"clients_per_round": "all", "batch_size": None, "local_steps": 3, "local_epochs": 1} if everyone else {}
    found = run(rehearsing(FedAvg(), task), task, federated(), ROUNDS, **RUN | work, evaluation=vfl.Evaluation(0))
    wanted = {"server.inner.x": x, "server.opt.m": m, "server.inner.t": np.array(ROUNDS)}
    assert_same({n: v for n, v in found.items() if n.startswith("server.")}, wanted, 1e-10)
    np.testing.assert_allclose(found["metric.rehearsal_loss"], losses, rtol=1e-10)


def test_a_step_visits_different_examples_of_the_server_and_all_of_them_over_time():
    task, seen = regression(), []

    def transform(x, dtype):
        seen.append(x[:, 0].tolist())
        return x.to(dtype)

    algorithm = rehearsed(FedAvg().build(task, N), task, HELD, OPTIONS, transform)
    vfl.simulate(algorithm, task, federated(), 10, execution="vmap", **RUN)
    assert len(seen) == 30
    assert all(len(set(rows)) == 8 for rows in seen)
    assert {value for rows in seen for value in rows} == set(HELD.x[:, 0].tolist())


def test_no_steps_and_no_rate_change_nothing():
    task = norm_and_dropout()
    plain = FedAvg().build(task, N)
    assert Rehearsal().wrap(plain, task, context(federated())) is plain
    still = rehearsing(FedAvg(), task, Rehearsal(rehearsal_steps=2, rehearsal_lr=0.0))
    found, wanted = (vfl.simulate(a, task, federated(), 3, execution="vmap", **RUN).x for a in (still, plain))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("spec", ["adam", "lamb"])
def test_a_resumed_run_with_any_optimizer_equals_an_uninterrupted_one(spec, tmp_path):
    task = norm_and_dropout()
    options = Rehearsal(rehearsal_steps=2, rehearsal_optimizer=spec, rehearsal_batch_size=100)  # more than it holds
    config = {"algorithm": rehearsing(FedAvg(), task, options), "task": task, "data": federated(), "execution": "vmap"}
    config |= RUN
    state, history = vfl.simulate(rounds=4, **config)
    half, first = vfl.simulate(rounds=2, **config)
    checkpoint.save(tmp_path, half, {}, 1)
    fresh = vfl.Engine(config["algorithm"], task, federated(), clients_per_round=5).init(99)
    back = checkpoint.load(checkpoint.of_round(tmp_path, 2), fresh, {})
    resumed, second = vfl.simulate(rounds=4, state=back, **config)
    assert_same(numbers_of(resumed, first + second), numbers_of(state, history), 0)


def test_replicas_rehearse_each_by_itself():
    task, data = regression(), federated([3, 7, 5, 9])
    algorithm = rehearsed(FedAvg().build(task, 4), task, HELD, OPTIONS)
    options = {"clients_per_round": 2, "execution": "vmap"}
    together = vfl.simulate(algorithm, task, data, 2, seed=5, replicas=2, **options).state
    for r in range(2):
        alone = vfl.simulate(algorithm, task, data, 2, seed=5 + r, **options).state
        torch.testing.assert_close(together.replica(r).server, alone.server, rtol=1e-9, atol=1e-9)


def test_what_else_an_algorithm_is_stays():
    task, data = regression(), federated()
    options = {"clients_per_round": 2, "execution": "vmap", "evaluation": vfl.Evaluation(0, 1)}
    history = vfl.simulate(rehearsing(PPMarina(), task), task, data, 6, **options).history
    assert {m["clients"] for m in history} == {2, N}
    found = vfl.simulate(rehearsing(Ditto(), task), task, data, 2, **options).history[-1]
    assert found["personal_train_loss_mean"] != found["client_train_loss_mean"]
    # A round without any message has no server step, and no rehearsal.
    options |= {"sampling": f"fixed:{EMPTY}"}
    assert torch.equal(vfl.simulate(rehearsing(FedAvg(), task), task, data, 2, **options).x, task.x)


def test_on_the_command_line_rehearsal_follows_aggregations_alone(here):
    """All updates come two rounds late, so that the server has nothing to aggregate in the first two."""
    late = ("--delay-probability", 1, "--delay", "fixed:2", "--rehearsal-steps", 1, "--validation", 0.2)
    assert cli_runs.vfl("fedavg", *cli_runs.SMALL, *late, "--rounds", 4, "--out", "run", "--quiet") == 0
    rehearsed = [row["rehearsal_loss"] is not None for row in cli_runs.metrics(here / "run")]
    assert rehearsed == [False, False, True, True]


def test_rehearsal_on_the_validation_set_lifts_the_model_where_clients_see_two_digits_each():
    data = vfl.data.federated("digits", partition="labels:2", clients=20, validation=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = vfl.task(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
    found = []
    for rehearsal in (Rehearsal(), Rehearsal(rehearsal_steps=10, rehearsal_lr=0.1)):
        algorithm = rehearsal.wrap(FedAvg().build(task, 20), task, context(data))
        when = vfl.Evaluation(every=100)
        history = vfl.simulate(
            algorithm, task, data, 10, clients_per_round=4, execution="vmap", evaluation=when
        ).history
        found.append(history[-1]["test_accuracy"])
    print(f"test accuracy {found[0]:.3f} without, {found[1]:.3f} with rehearsal")
    assert found[1] > found[0] + 0.05


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rehearsal_steps": -1}, "rehearsal-steps must be at least 0, not -1"),
        ({"rehearsal_lr": -0.5}, "rehearsal-lr must be a finite number ≥ 0, not -0.5"),
        ({"rehearsal_batch_size": 0}, "rehearsal-batch-size must be at least 1, not 0"),
        ({"rehearsal_optimizer": "adm"}, "unknown optimizer 'adm'; did you mean 'adam'"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        Rehearsal(**options)
    assert sentence in str(error.value)


def test_a_server_without_examples_is_refused():
    task = regression()
    with pytest.raises(vfl.UsageError, match="there is no validation set"):
        OPTIONS.wrap(FedAvg().build(task, N), task, context(federated()))
    with pytest.raises(vfl.UsageError, match="it holds none"):
        rehearsing(FedAvg(), task, held=Examples(HELD.x[:0], HELD.y[:0]))
