"""Weights that a network learns: against numpy over fifty rounds, the policy gradient in closed form, their use."""

from typing import NamedTuple

import numpy as np
import papers
import pytest
import torch
from cli_runs import SMALL, here, metrics
from cli_runs import vfl as command
from helpers import (
    CLASSES,
    FEATURES,
    PARTIAL,
    SIZES,
    N,
    assert_same,
    federated,
    make_task,
    mlp,
    norm_and_dropout,
    numbers_of,
    packed,
    regression,
    round_keys,
    run,
)
from papers import DATA, ROUNDS, client_key, drawn, own_rows
from papers_local import mean_loss
from torch import nn

import vfl
from algorithms.dga import DGA
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from vfl import checkpoint, programs
from vfl.data.container import Examples
from vfl.delays import delayed, fixed
from vfl.learned_weights import LearnedWeights, Policy, Sent, first_network, learned
from vfl.privacy import private

__all__ = ["here"]

STREAM = 0x1EA2  # what the wrapper's draws are folded with
DRAW = np.random.default_rng(5)
HELD = Examples(
    torch.from_numpy(DRAW.standard_normal((40, FEATURES))), torch.from_numpy(DRAW.integers(CLASSES, size=40))
)
OFF = vfl.Evaluation(0)


def learning(config, task, **options):
    return learned(config.build(task, N), task, HELD, LearnedWeights(**options))


# Against numpy


def goodness(x, rows, reward):
    """Softmax regression's accuracy on some of the server's examples, or minus its loss."""
    inputs, labels = HELD.x.numpy()[rows], HELD.y.numpy()[rows]
    scores = inputs @ x[: CLASSES * FEATURES].reshape(CLASSES, FEATURES).T + x[CLASSES * FEATURES :]
    if reward == "accuracy":
        return np.mean(scores.argmax(1) == labels)
    return np.mean(scores[np.arange(len(rows)), labels] - np.log(np.exp(scores).sum(1)))


def slope(y, rows):
    """Softmax regression's gradients sum to zero, so something is added that gives them means of their own."""
    return papers.gradient(y, rows) + 0.5 * np.sin(y)


def in_numpy(options, beta, cohort, x, adam):
    """Dynamic aggregation by the loss, and the network beside it; the run's numbers, and how many rounds explored."""
    H, sigma, lr = options.weights_hidden, options.weights_noise, options.weights_lr
    start = vfl.random.normal(vfl.random.key(STREAM), (5 * H,), torch.float64).numpy() / np.sqrt(5)
    theta = np.concatenate([start, np.zeros(H)])
    m, n, count = np.zeros(6 * H), np.zeros(6 * H), 0
    center, std, last, explored = np.zeros(4), np.full(4, np.inf), 0.0, 0
    rewards, up = [], 0
    for t in range(ROUNDS):
        W, b, v = theta[: 4 * H].reshape(H, 4), theta[4 * H : 5 * H], theta[5 * H :]
        epsilon = max(options.weights_explore * options.weights_explore_decay**t, options.weights_explore_least)
        explores = bool(vfl.random.bernoulli(vfl.random.fold_in(round_keys(7, t)[3], STREAM), epsilon, ()))
        explored += explores
        changes, s, f, logs, score = [], [], [], [], np.zeros(6 * H)
        for i, batches in cohort(t).items():
            if not batches:
                continue
            y, losses, visited = x, 0.0, 0
            for rows in batches:
                losses, visited = losses + mean_loss(y, rows) * len(rows), visited + len(rows)
                y = y - 0.1 * slope(y, rows)
            changes.append(y - x)
            s.append(losses / visited)
            delta = changes[-1]
            f.append([-beta * (s[-1] - last), np.sqrt(np.mean(delta**2)), np.mean(delta), np.var(delta)])
            z = np.clip((np.array(f[-1]) - center) / std, -10, 10)
            h = [np.tanh(sum(W[k, j] * z[j] for j in range(4)) + b[k]) for k in range(H)]
            key = vfl.random.fold_in(vfl.random.fold_in(client_key(7, t, i), 2), STREAM)
            xi = float(vfl.random.normal(key, (), torch.float64)) if explores else 0.0
            logs.append(sum(v[k] * h[k] for k in range(H)) + sigma * xi)
            inner = [v[k] * (1 - h[k] ** 2) for k in range(H)]
            score += xi / sigma * np.array([inner[k] * z[j] for k in range(H) for j in range(4)] + inner + h)
            up += (x.size + 1) * 64
        candidates = []
        for e in (np.exp(np.array(f)[:, 0]), np.exp(logs)):
            candidates.append((x + e @ np.stack(changes) / e.sum(), e @ np.array(s) / e.sum()))
        draw = vfl.random.split(vfl.random.fold_in(round_keys(7, t)[2], STREAM))[0]
        rows = vfl.random.choice(draw, 40, options.weights_reward_examples).numpy()
        plain, other = (goodness(x, rows, options.weights_reward) for x, _ in candidates)
        rewards.append(other - plain)
        x, last = candidates[int(rewards[-1] > 0)]
        g = -rewards[-1] * score
        if g.any():
            count += 1
            m, n = 0.9 * m + 0.1 * g, 0.999 * n + 0.001 * g**2
            u = m / (1 - 0.9**count) / (np.sqrt(n / (1 - 0.999**count)) + 1e-8)
            theta = theta - lr * (u if adam else g)
        center, std = np.mean(f, axis=0), np.std(f, axis=0)
    memory = {"server.opt.m": m, "server.opt.v": n, "server.opt.count": count} if adam else {}
    followed = [float(r > 0) for r in rewards]
    wanted = {"server.inner.x": x, "server.inner.s": last, "server.inner.t": ROUNDS, "server.t": ROUNDS,
              "server.theta": theta, "server.center": center, "server.scale": 1 / std,
              "metric.reward": rewards, "metric.followed": followed}  # fmt: skip
    return wanted | memory, up, explored


def everyone(t):
    """All clients take 3 steps on all of their data."""
    return {i: [own_rows(i)] * 3 if SIZES[i] else [] for i in range(N)}


def some(t):
    """Five clients, 2 epochs in batches of 4."""
    ids = vfl.sampler("uniform", 5, DATA.offsets).draw(round_keys(7, t)[0]).ids.tolist()
    return drawn(7, t, ids, vfl.Work(4, 2))


@pytest.mark.parametrize(("reward", "optimizer"), [("loss", "adam"), ("accuracy", "adam"), ("loss", "sgd")])
@pytest.mark.parametrize("cohort", [everyone, some])
def test_learned_weights_equal_numpy_over_fifty_rounds(cohort, reward, optimizer):
    plain = regression()

    def grad_fn(x, batch, buffers):
        g, aux = plain.grad_fn(x, batch, buffers)
        return g + 0.5 * x.sin(), aux

    task = plain._replace(grad_fn=grad_fn)
    options = LearnedWeights(weights_reward=reward, weights_optimizer=optimizer, weights_reward_examples=30,
                             weights_lr=0.05 if optimizer == "adam" else 2.0, weights_hidden=3, weights_noise=0.8,
                             weights_explore=0.9, weights_explore_decay=0.97, weights_explore_least=0.4)  # fmt: skip
    wanted, up, explored = in_numpy(options, 2.0, cohort, task.x.numpy(), optimizer == "adam")
    work = {"clients_per_round": "all", "batch_size": None, "local_steps": 3}
    if cohort is some:
        work = {"clients_per_round": 5, "batch_size": 4, "local_epochs": 2}
    algorithm = learned(DGA(beta=2.0).build(task, N), task, HELD, options)
    found = run(algorithm, task, federated(), ROUNDS, seed=7, chunk=3, evaluation=OFF, **work)
    assert_same({name: found[name] for name in wanted}, wanted, 1e-10)
    assert found["metric.bits_up"][-1] == up, "what the network needs follows from the message"
    assert 10 < explored < 48
    assert 0.03 < np.mean(wanted["metric.followed"]) < 0.99, "one model was always kept"
    assert np.abs(wanted["server.theta"][-3:]).max() > 0.01, "the network has hardly learned"


# The policy gradient in closed form


class Plain(NamedTuple):
    """A server's state."""

    x: torch.Tensor


def alike(change, weight):
    """An algorithm whose clients all send this."""

    def client_update(sent, client, batches, key):
        zero = change.new_zeros(())
        return vfl.message(change, weight), client, vfl.Metrics(zero, zero, zero)

    return vfl.Algorithm(Plain, vfl.stateless, lambda server, key: vfl.Broadcast((), server.x.new_zeros(())),
                         client_update, lambda server, mean, key: (Plain(server.x + mean.payload), {}))  # fmt: skip


SIGMA, DRAWS = 0.7, 20_000
THETA = torch.from_numpy(DRAW.standard_normal(6 * 5))  # 5 hidden units
CHANGE = torch.from_numpy(DRAW.standard_normal((FEATURES + 1) * CLASSES))


def mu(theta):
    """The network at the features of CHANGE with weight 2."""
    f = torch.stack([torch.tensor(2.0).double().log(), CHANGE.norm() / len(CHANGE) ** 0.5, CHANGE.mean(),
                     CHANGE.var(correction=0)])  # fmt: skip
    return theta[25:] @ torch.tanh(theta[:20].reshape(5, 4) @ f + theta[20:25])


@pytest.fixture(scope="module")
def messages():
    """What so many clients with keys of their own send in a round that explores."""
    task = regression()
    algorithm = learned(alike(CHANGE, torch.tensor(2.0).double()), task, HELD, LearnedWeights(weights_noise=SIGMA))
    policy = Policy(THETA, THETA.new_zeros(4), THETA.new_ones(4), THETA.new_tensor(SIGMA))
    keys = vfl.random.split(vfl.random.key(1), DRAWS)
    return torch.func.vmap(lambda key: algorithm.client_update(Sent((), policy), (), None, key)[0])(keys)


def test_the_score_is_the_gradient_of_the_log_density_of_the_action(messages):
    def log_density(theta, a):
        return torch.distributions.Normal(mu(theta), SIGMA, validate_args=False).log_prob(a)

    a, own = messages.weight[:50, 1].log(), messages.weight[:50, :1]
    wanted = torch.func.vmap(torch.func.grad(log_density), (None, 0))(THETA, a)
    torch.testing.assert_close(messages.payload.score[:50] * own, wanted, rtol=1e-9, atol=1e-9)
    assert (own == 2).all() and wanted.abs().max() > 0.1


def test_the_actions_are_normal_around_the_networks_output(messages):
    a = messages.weight[:, 1].log()
    assert abs(a.mean() - mu(THETA)) < 5 * SIGMA / DRAWS**0.5
    assert abs(a.var() / SIGMA**2 - 1) < 5 * (2 / DRAWS) ** 0.5


def test_reward_times_score_is_an_unbiased_gradient_of_the_expected_reward(messages):
    """E[R(a)] is μ for R = a and μ² + σ² for R = a², whose gradients are ∇μ and 2μ∇μ."""
    a, score = messages.weight[:, 1].log(), messages.payload.score * messages.weight[:, :1]
    gradient = torch.func.grad(mu)(THETA)
    for reward, wanted in ((a, gradient), (a.square(), 2 * mu(THETA) * gradient)):
        samples = reward[:, None] * score
        error = (samples.mean(0) - wanted).abs() / (samples.std(0) / DRAWS**0.5)
        assert error.max() < 5
        assert (wanted.abs() / (samples.std(0) / DRAWS**0.5)).max() > 20, "zero would pass"


def test_a_round_that_does_not_explore_follows_the_network_and_has_no_score():
    task = regression()
    algorithm = learned(alike(CHANGE, torch.tensor(2.0).double()), task, HELD, LearnedWeights())
    policy = Policy(THETA, THETA.new_zeros(4), THETA.new_ones(4), THETA.new_zeros(()))
    message = algorithm.client_update(Sent((), policy), (), None, vfl.random.key(0))[0]
    torch.testing.assert_close(message.weight[1].log(), mu(THETA), rtol=1e-12, atol=1e-12)
    assert not message.payload.score.any()


# With the engine


@pytest.mark.parametrize("config", [DGA(), Scaffold(option=1), FedAvg(aggregator="norm_clip:0.1")])
def test_vmap_equals_loop_in_chunks_of_any_size(config):
    algorithm = learning(config, mlp(), weights_reward="loss")
    wanted = run(algorithm, mlp(), federated(), 4, execution="loop", **PARTIAL)
    for chunk in (1, 3, 100):
        assert_same(run(algorithm, mlp(), federated(), 4, chunk=chunk, **PARTIAL), wanted, 1e-9, f"chunk {chunk}")


def test_a_traced_program_gives_the_results_of_vmap(monkeypatch):
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
    algorithm, options = learning(DGA(), mlp()), {"clients_per_round": 4, "batch_size": 3, "chunk": 2}
    wanted = run(algorithm, mlp(), federated(), 3, **options)
    assert_same(run(algorithm, mlp(), federated(), 3, execution="compile", **options), wanted, 1e-9)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    config = {"algorithm": learning(DGA(), mlp(), weights_reward="loss"), "task": mlp(), "data": federated(),
              "execution": "vmap", **PARTIAL}  # fmt: skip
    state, history = vfl.simulate(rounds=6, **config)
    half, first = vfl.simulate(rounds=3, **config)
    checkpoint.save(tmp_path, half, {}, 1)
    fresh = vfl.Engine(config["algorithm"], mlp(), federated(), clients_per_round=6).init(99)
    back = checkpoint.load(checkpoint.of_round(tmp_path, 3), fresh, {})
    resumed, second = vfl.simulate(rounds=6, state=back, **config)
    assert_same(numbers_of(resumed, first + second), numbers_of(state, history), 0)


def test_replicas_learn_each_by_itself():
    task, data = mlp(), federated([3, 7, 5, 9])
    algorithm = learned(DGA().build(task, 4), task, HELD, LearnedWeights(weights_explore=0.5))
    options = {"clients_per_round": 3, "execution": "vmap"}
    together = vfl.simulate(algorithm, task, data, 4, seed=5, replicas=3, **options).state
    for r in range(3):
        alone = vfl.simulate(algorithm, task, data, 4, seed=5 + r, **options).state
        torch.testing.assert_close(together.replica(r).server, alone.server, rtol=1e-9, atol=1e-9)


def test_ties_teach_nothing_and_keep_the_algorithms_own_step():
    def evaluate(x, batch, buffers):
        return {"loss": x.new_ones(len(batch.y)), "accuracy": x.new_ones(len(batch.y))}

    task = mlp()._replace(evaluate=evaluate)
    found = run(learning(DGA(), task), task, federated(), 4, evaluation=OFF, **PARTIAL)
    wanted = run(DGA(), mlp(), federated(), 4, evaluation=OFF, **PARTIAL)
    np.testing.assert_allclose(found["server.inner.x"], wanted["server.x"], rtol=1e-12, atol=1e-12)
    assert (found["server.theta"] == first_network(8, task.x).numpy()).all()
    assert not found["metric.followed"].any() and not found["metric.reward"].any()


def test_clients_that_never_answer_or_are_dropped_count_for_nothing():
    task, data, rows = mlp(), federated(), np.r_[0:7, 19 : sum(SIZES)]
    data.clients.client(2).x[0, 0] = np.nan
    without = packed(data.clients.x[rows], data.clients.y[rows], [0 if i == 2 else n for i, n in enumerate(SIZES)])
    options = PARTIAL | {"clients_per_round": "all", "batch_size": None, "evaluation": OFF}
    silent = vfl.Devices(client_dropout=0.4)
    names = ("server.inner.x", "server.theta", "server.center", "server.scale", "metric.reward")
    found = []
    for examples in (data, without):
        algorithm = silent.wrap(DGA().build(task, N), task, vfl.Context(N, "all", "uniform", 4))
        algorithm = learned(algorithm, task, HELD, LearnedWeights())
        numbers = run(algorithm, task, examples, 4, on_nonfinite="drop", **options)
        found.append({name: numbers[name] for name in names})
        assert numbers["metric.unanswered"].any()
    assert_same(*found, 1e-12)


def test_features_that_do_not_differ_by_more_than_rounding_are_left_out():
    """A softmax regression's gradients sum to zero: their means are rounding errors, and one client has no spread."""
    found = run(learning(DGA(), regression()), regression(), federated(), 3, **PARTIAL)
    assert found["server.scale"][2] == 0
    assert (found["server.scale"][[0, 1, 3]] > 0).all()
    alone = run(learning(DGA(), regression()), regression(), federated(), 3, sampling="fixed:2")
    assert not alone["server.scale"].any()


# What it is for


def test_clients_with_shuffled_labels_lose_their_weight():
    """Two fifths of the clients; FedAvg weighs by examples, so it does not notice them."""
    shares, accuracies = [], []
    for seed in range(3):
        data = vfl.data.federated("digits", partition="iid", clients=50, validation=0.1, seed=seed)
        data = vfl.corrupt_labels(data, 0.4, seed)
        starts = torch.from_numpy(data.clients.offsets[vfl.adversaries(data, 0.4, seed)])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = (nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
            task = vfl.task(nn.Sequential(*layers))
        plain = FedAvg().build(task, 50)
        options = LearnedWeights(learn_weights=True, weights_reward="loss")
        algorithm = options.wrap(plain, task, vfl.Context(50, 10, "uniform", 60, data))

        def observed(sent, client, batches, key, algorithm=algorithm, starts=starts):
            message, client, metrics = algorithm.client_update(sent, client, batches, key)
            shuffled, weight = (starts == batches.start).any(), message.weight[1]
            return message, client, metrics._replace(counts={"shuffled": weight * shuffled, "all": weight})

        work = {"clients_per_round": 10, "batch_size": 10, "local_epochs": 2, "execution": "vmap", "chunk": 10,
                "seed": seed, "evaluation": vfl.Evaluation(60)}  # fmt: skip
        history = vfl.simulate(algorithm._replace(client_update=observed), task, data, 60, **work).history
        share = np.array([metrics["shuffled"] / metrics["all"] for metrics in history])
        shares.append([share[:10].mean(), share[-20:].mean()])
        wanted = vfl.simulate(plain, task, data, 60, **work).history
        accuracies.append([rounds[-1]["test_accuracy"] for rounds in (wanted, history)])
    (early, late), (without, with_it) = np.mean(shares, axis=0), np.mean(accuracies, axis=0)
    print(f"share of the shuffled: {early:.2f}, then {late:.2f}; accuracy {without:.3f} without, {with_it:.3f} with it")
    assert early > 0.3 and late < 0.15
    assert with_it > without + 0.01


def test_the_command_line_learns_weights(here):
    options = ("dga", *SMALL, "--validation", 0.2, "--learn-weights", "--rounds", 2, "--out", "a", "--quiet")
    assert command(*options) == 0
    assert {"reward", "followed", "validation_accuracy"} <= metrics(here / "a")[-1].keys()


# Refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights_hidden": 0}, "weights-hidden must be at least 1, not 0"),
        ({"weights_lr": -1.0}, "weights-lr must be a finite number ≥ 0, not -1.0"),
        ({"weights_noise": 0.0}, "weights-noise must be a finite number > 0, not 0.0"),
        ({"weights_explore": 1.5}, "weights-explore must be from 0 to 1, not 1.5"),
        ({"weights_reward": "f1"}, "weights-reward must be accuracy or loss, not 'f1'"),
        ({"weights_optimizer": "adm"}, "unknown optimizer 'adm'; did you mean 'adam'"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        LearnedWeights(**options)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_weighed_is_refused():
    task, options = mlp(), {"clients_per_round": 4}
    context = vfl.Context(N, 4, "uniform", 1, federated())
    plain = DGA().build(task, N)
    assert LearnedWeights().wrap(plain, task, context) is plain
    with pytest.raises(vfl.UsageError, match="there is no validation set"):
        LearnedWeights(learn_weights=True).wrap(plain, task, context)
    with pytest.raises(vfl.UsageError, match="it holds none"):
        learned(plain, task, Examples(HELD.x[:0], HELD.y[:0]), LearnedWeights())
    with pytest.raises(vfl.UsageError, match="use group norm"):
        learning(DGA(), norm_and_dropout())
    with pytest.raises(vfl.UsageError, match="aggregator must be mean"):
        learning(FedAvg(aggregator="median"), task)
    late = learned(delayed(plain, 0.5, fixed(1)), task, HELD, LearnedWeights())
    hidden = learned(private(plain, clip=1.0, noise_multiplier=1.0, cohort=4), task, HELD, LearnedWeights())
    weighed = learning(DGA(), task)
    numbers = make_task(nn.Linear(FEATURES, 1), vfl.squared_error)
    for algorithm, on, sentence in (
        (late, task, "clients have several weights"),
        (hidden, task, "leave learned weights out"),
        (delayed(weighed, 0.5, fixed(1)), task, "they run without delays"),
        (vfl.Delays(buffer_size=2).wrap(weighed, task, context), task, "they run without a buffer"),
        (learning(DGA(), numbers), numbers, "measures no accuracy"),
    ):
        with pytest.raises((vfl.UsageError, vfl.ClientError), match=sentence):
            vfl.simulate(algorithm, on, federated(), 1, execution="vmap", **options)
