"""Private runs against plain numpy with the same draws of noise, and what the mechanisms promise."""

import math

import numpy as np
import papers
import pytest
import torch
from helpers import (
    SIZES,
    N,
    assert_same,
    federated,
    mlp,
    regression,
    round_keys,
    run,
    state_numbers,
)
from papers import DATA, Array, client_key, drawn, local_model
from private_kinds import KINDS, private_kind

import vfl
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Delta, Scaffold
from vfl import checkpoint
from vfl.privacy import Adaptive, classical_multiplier, locally_private, private, tree
from vfl.privacy.central import NOISE, Clipped, clip_tree, message_noise

SEED, ROUNDS, COHORT = 7, 12, 5.0
WORK = {"batch_size": 4, "local_epochs": 2, "seed": SEED, "evaluation": vfl.Evaluation(0), "chunk": 100}
POISSON = {"clients_per_round": 5, "sampling": "poisson", **WORK}


def cohorts(t: int) -> papers.Cohort:
    """The engine's Poisson cohort of round t, and its minibatches."""
    ids = vfl.sampler("poisson", 5, DATA.offsets).draw(round_keys(SEED, t)[0]).ids.tolist()
    return drawn(SEED, t, ids, vfl.Work(4, 2))


def noise_keys(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of round t's noise on the sum and on the count."""
    sums, count = vfl.random.split(vfl.random.fold_in(round_keys(SEED, t)[2], NOISE))
    return sums, count


def normal(key: torch.Tensor, *shape: int) -> Array:
    return vfl.random.normal(key, shape, torch.float64).numpy()


def clipped(v: Array, norm: float) -> Array:
    return v * min(1.0, norm / np.linalg.norm(v))


def changes(x: Array, t: int, lr: float = 0.1) -> dict[int, Array]:
    """Each client's change of the model in round t."""
    return {i: local_model(x, b, lr, lambda g, y: g) - x for i, b in cohorts(t).items() if b}


# --- against references ---


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_central_privacy_is_clipping_summing_and_noise_over_the_expected_cohort(execution):
    clip, z = 0.15, 0.7
    task = regression()
    algorithm = private(FedAvg().build(task, N), clip=clip, noise_multiplier=z, cohort=COHORT)
    found = run(algorithm, task, federated(), ROUNDS, execution=execution, **POISSON)
    x, shares, sizes = task.x.numpy(), [], []
    for t in range(ROUNDS):
        sent = changes(x, t)
        key = vfl.random.fold_in(noise_keys(t)[0], 0)
        total = sum(clipped(d, clip) for d in sent.values())
        shares.append(np.mean([np.linalg.norm(d) > clip for d in sent.values()]))
        sizes.append(len(sent))
        x = x + (total + z * clip * normal(key, x.size)) / COHORT
    assert len(set(sizes)) > 1 and 0 < np.mean(shares) < 1, "cohorts differ, and some messages are clipped"
    assert_same({"x": found["server.inner.x"], "clipped": found["metric.clipped"]}, {"x": x, "clipped": shares}, 1e-10)


def test_adaptive_clipping_follows_its_update(monkeypatch):
    C, z, sigma_b, gamma, eta = 0.05, 0.4, 0.3, 0.6, 0.5
    task = regression()
    adaptive = Adaptive(gamma, sigma_b, eta)
    algorithm = private(FedAvg().build(task, N), clip=C, noise_multiplier=z, cohort=COHORT, adaptive=adaptive)
    found = run(algorithm, task, federated(), ROUNDS, **POISSON)
    x, norms, z_delta = task.x.numpy(), [], (z**-2 - (2 * sigma_b) ** -2) ** -0.5
    for t in range(ROUNDS):
        sent = changes(x, t)
        sums, count = noise_keys(t)
        total = sum(clipped(d, C) for d in sent.values())
        x = x + (total + z_delta * C * normal(vfl.random.fold_in(sums, 0), x.size)) / COHORT
        centred = sum((np.linalg.norm(d) <= C) - 0.5 for d in sent.values()) + sigma_b * normal(count)
        C = C * math.exp(-eta * (centred / COHORT + 0.5 - gamma))
        norms.append(C)
    assert max(norms) > 2 * min(norms), "the norm should have moved"
    assert_same({"x": found["server.inner.x"], "C": found["metric.clip"]}, {"x": x, "C": norms}, 1e-10)
    assert found["metric.bits_up"][0] == len(changes(task.x.numpy(), 0)) * (x.size * 64 + 1)


def test_without_noise_the_adaptive_norm_finds_the_quantile():
    lengths = torch.linspace(1, 9, 9, dtype=torch.float64)
    algorithm = private(FedAvg().build(regression(), N), clip=1.0, noise_multiplier=0, cohort=9,
                        adaptive=Adaptive(0.5, 0.45, 0.2))  # fmt: skip
    server = algorithm.init_server(regression().x)
    for t in range(100):
        fits = (lengths <= server.clip).double() - 0.5
        mean = vfl.Mean(Clipped(torch.zeros_like(server.x), fits.mean()), torch.tensor(9.0), torch.tensor(9.0))
        server, _ = algorithm.server_update(server, mean, vfl.random.key(t))
    assert 4 < server.clip < 6  # the median is 5


@pytest.mark.parametrize("estimator", ["binary", "honaker"])
def test_ftrl_adds_the_trees_noise_to_the_prefix_sums(estimator):
    """Every node has a draw of its own; the reference walks each prefix's subtrees down to the leaves."""
    levels, clip, z = 3, 0.15, 0.7  # 12 rounds take two trees of 7 steps
    task = regression()
    algorithm = private(
        FedAvg().build(task, N), clip=clip, noise_multiplier=z, cohort=COHORT, noise=tree(levels, estimator)
    )
    found = run(algorithm, task, federated(), ROUNDS, **POISSON)
    x0 = x = task.x.numpy()
    total, noise, noises, ended = np.zeros_like(x), np.zeros_like(x), {}, np.zeros_like(x)
    for t in range(ROUNDS):
        total = total + sum(clipped(d, clip) for d in changes(x, t).values())
        step = t % 7 + 1
        if step == 1 and t:
            ended, noises = ended + noise, {}
        top = (step & -step).bit_length() - 1
        noises[top, step >> top] = own_noise(noises, top, step, normal(noise_keys(t)[0], x.size), estimator)
        noise = sum(noises[k, step >> k] for k in range(levels) if step >> k & 1)
        x = x0 + (total + z * clip * (ended + noise)) / COHORT
    assert_same({"x": found["server.inner.x"]}, {"x": x}, 1e-10)


def own_noise(noises: dict, k: int, step: int, drawn: Array, estimator: str) -> Array:
    """The noise of the node k levels up that ends with this step, made of its left subtrees' and a fresh draw."""
    if k == 0 or estimator == "binary":
        return drawn
    right, variance = np.zeros_like(drawn), 1.0  # what is known of the node one level below, and its fresh part
    for level in range(1, k + 1):
        a = 1 / (2 - 2.0**-level)
        left = noises[level - 1, (step >> (level - 1)) - 1]
        right = (1 - a) * (left + right)
        variance = a**2 + (1 - a) ** 2 * variance
    return right + math.sqrt(variance) * drawn


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("weights", [None, (2.0, 6.0)])
def test_local_privacy_is_flutes(weights, scale):
    clip, epsilon, delta = 0.15, 30.0, 1e-3
    z = math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    sigma = z * math.hypot(clip, weights[1] if weights else 0)
    task = regression()
    algorithm = locally_private(FedAvg().build(task, N), clip=clip, noise_multiplier=z, weights=weights, scale=scale)
    found = run(algorithm, task, federated(), ROUNDS, **POISSON)
    x = task.x.numpy()
    for t in range(ROUNDS):
        total, weight = np.zeros_like(x), 0.0
        for i, d in changes(x, t).items():
            keys = vfl.random.split(vfl.random.fold_in(vfl.random.fold_in(client_key(SEED, t, i), 2), NOISE))
            d = d * clip / np.linalg.norm(d) if scale else clipped(d, clip)
            w = 1.0
            if weights:
                w = np.clip(np.clip(SIZES[i], *weights) + sigma * normal(keys[1]), *weights)
            total, weight = total + w * (d + sigma * normal(keys[0], x.size)), weight + w
        x = x + total / weight
    assert_same({"x": found["server.x"]}, {"x": x}, 1e-10)


# --- what is promised ---


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_with_a_norm_that_nothing_reaches_and_no_noise_the_run_is_the_plain_one(name):
    config = {"fedavg": FedAvg(weighting="uniform"), "scaffold": Scaffold()}[name]
    options = {"clients_per_round": 5, "batch_size": 4, "seed": SEED, "chunk": 100}
    data = federated([size or 2 for size in SIZES])  # in a cohort with an empty client m is not the number of messages
    plain = run(config, mlp(), data, 4, **options)
    wrapped = private(config.build(mlp(), N), clip=1e9, noise_multiplier=0, cohort=5)
    found = run(wrapped, mlp(), data, 4, **options)
    for key in ("x", "c") if name == "scaffold" else ("x",):
        np.testing.assert_allclose(found[f"server.inner.{key}"], plain[f"server.{key}"], rtol=1e-10, atol=1e-12)


def test_clipping_bounds_what_one_client_can_change_of_the_sum():
    """Over all leaves of a payload together: by C when it comes or goes, by 2C when another takes its place."""
    C = 0.3
    draw = np.random.default_rng(0)
    payloads = [
        (torch.from_numpy(draw.standard_normal(6) * s), torch.tensor(float(s))) for s in (0, 1e-9, 0.05, 1, 1e6)
    ]
    sent = [torch.cat([leaf.reshape(-1) for leaf in clip_tree(p, C)[0]]) for p in payloads]
    total = torch.stack(sent).sum(0)
    for i, mine in enumerate(sent):
        assert (total - (total - mine)).norm() <= C * (1 + 1e-12)
        for other in sent:
            assert ((total - mine + other) - total).norm() <= 2 * C * (1 + 1e-12)
        whole = torch.cat([leaf.reshape(-1) for leaf in payloads[i]])
        if whole.norm() <= C:
            assert torch.equal(mine, whole), "short messages stay as they are"
        else:
            assert abs(mine.norm() - C) < 1e-12 and abs(mine @ whole - C * whole.norm()) < 1e-9 * whole.norm()


def chi_square_bounds(n: int) -> tuple[float, float]:
    """5 standard deviations around 1 of the mean of n squared standard normals, whose variance is 2/n."""
    return 1 - 5 * math.sqrt(2 / n), 1 + 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("adaptive", [None, Adaptive(0.5, 3.0, 0.0)], ids=["fixed", "adaptive"])
def test_the_noise_in_the_model_has_the_stated_deviation(adaptive):
    D, clip, z, m = 20_000, 0.7, 1.3, 25.0
    task = vfl.task(torch.nn.Linear(D, 1, bias=False), vfl.squared_error, dtype=torch.float64)
    algorithm = private(FedAvg().build(task, N), clip=clip, noise_multiplier=z, cohort=m, adaptive=adaptive)
    server, moves = algorithm.init_server(torch.zeros(D, dtype=torch.float64)), []
    fits = () if adaptive is None else torch.tensor(0.0, dtype=torch.float64)
    mean = vfl.Mean(Clipped(torch.zeros(D, dtype=torch.float64), fits), torch.tensor(20.0), torch.tensor(20.0))
    for t in range(3):
        after, _ = algorithm.server_update(server, mean, vfl.random.key(t))
        moves.append(after.x - server.x)
        server = after
    stated = clip / m * (z if adaptive is None else (z**-2 - (2 * 3.0) ** -2) ** -0.5)
    low, high = chi_square_bounds(3 * D)
    assert low < (torch.cat(moves) / stated).square().mean() < high
    for a, b in ((0, 1), (0, 2), (1, 2)):  # draws of different rounds are independent
        assert abs((moves[a] * moves[b]).mean() / stated**2) < 5 / math.sqrt(D)


def test_local_noise_has_the_stated_deviation_and_is_each_clients_own():
    D, clip, z, w = 20_000, 0.7, 1.3, 2.0
    silent = vfl.Algorithm(
        lambda x: x, vfl.stateless, lambda s, key: vfl.Broadcast(s, torch.zeros(())),
        lambda sent, client, batches, key: (
            vfl.message(torch.zeros(D, dtype=torch.float64), torch.tensor(1.0)), client,
            vfl.Metrics(*torch.zeros(3))),
        lambda s, mean, key: (s, {}),
    )  # fmt: skip
    noisy = locally_private(silent, clip=clip, noise_multiplier=z, weights=(0.5, w))
    sent = [noisy.client_update((), (), None, vfl.random.key(i))[0].payload for i in range(2)]  # pyright: ignore
    low, high = chi_square_bounds(2 * D)
    stated = z * math.sqrt(clip**2 + w**2)
    assert low < (torch.cat(sent) / stated).square().mean() < high
    assert abs((sent[0] * sent[1]).mean() / stated**2) < 5 / math.sqrt(D)


@pytest.mark.parametrize("estimator", ["binary", "honaker"])
def test_the_trees_noise_on_a_prefix_sum_has_the_variance_of_theory(estimator):
    """Binary: popcount(t). Honaker: a subtree of 2ᵏ leaves has 1 / (2 − 2⁻ᵏ)."""
    D, levels = 20_000, 5
    source, hidden = tree(levels, estimator), torch.zeros(D, dtype=torch.float64)
    memory, total = source.init(hidden), torch.zeros(D, dtype=torch.float64)
    low, high = chi_square_bounds(D)
    for t in range(1, 32):
        drawn, memory = source.draw(hidden, memory, vfl.random.key(t))
        total = total + drawn
        digits = [k for k in range(levels) if t >> k & 1]
        stated = sum(1 if estimator == "binary" else 1 / (2 - 2.0**-k) for k in digits)
        assert low < total.square().mean() / stated < high, t
    independent_sum = 31
    assert stated < independent_sum / 5, "far less than that of as many independent draws"


@pytest.mark.parametrize("estimator", ["binary", "honaker"])
def test_the_trees_noises_have_the_covariances_of_a_tree_with_a_draw_in_every_node(estimator, monkeypatch):
    """The reference keeps all nodes, each with a coordinate of its own; ours draws once a step."""
    levels, T = 4, 15
    steps = iter(torch.eye(T, dtype=torch.float64))
    monkeypatch.setattr("vfl.privacy.noise.random.normal", lambda key, shape, dtype: next(steps))
    source, hidden = tree(levels, estimator), torch.zeros(T, dtype=torch.float64)
    memory, sums = source.init(hidden), torch.zeros(0, T, dtype=torch.float64)
    for t in range(T):
        drawn, memory = source.draw(hidden, memory, vfl.random.key(t))
        sums = torch.cat([sums, (drawn if t == 0 else sums[-1] + drawn)[None]])

    def node(k: int, n: int) -> Array:
        """What is known of the n-th node k levels up: its own noise and its children's, by inverse variances."""
        own = np.zeros((levels, 2**levels))
        own[k, n] = 1
        if k == 0 or estimator == "binary":
            return own.ravel()
        children = node(k - 1, 2 * n) + node(k - 1, 2 * n + 1)
        precise = 1 / (children @ children)
        return (own.ravel() + precise * children) / (1 + precise)

    prefixes = []
    for t in range(1, T + 1):
        digits = [k for k in range(levels) if t >> k & 1]
        prefixes.append(sum(node(k, (t >> k) - 1) for k in digits))
    wanted = np.stack(prefixes) @ np.stack(prefixes).T
    np.testing.assert_allclose((sums @ sums.T).numpy(), wanted, rtol=1e-12, atol=1e-12)


def test_scaffolds_control_variate_moves_by_the_noisy_sum_over_the_population():
    """Told of m clients, the server moves c by m/N times the sum over m: the actual cohort's size does not show."""
    clip, m = 0.4, 5.0
    task = mlp()
    algorithm = private(Scaffold().build(task, N), clip=clip, noise_multiplier=0, cohort=m)
    server = algorithm.init_server(task.x)
    ones = torch.ones_like(task.x)
    mean = vfl.Mean(Clipped(Delta(ones, 2 * ones), ()), torch.tensor(3.0), torch.tensor(3.0))
    after, _ = algorithm.server_update(server, mean, vfl.random.key(0))
    np.testing.assert_allclose(after.inner.c, 3 * 2 / N * ones)
    np.testing.assert_allclose(after.x - server.x, 3 / m * ones)


# --- execution, resume, replicas; tests/test_ranks.py has the ranks ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_run_is_the_same_in_any_chunk_and_one_by_one(kind):
    options = {"clients_per_round": 6, "batch_size": 4, "seed": 3}
    runs = [run(private_kind(kind, mlp()), mlp(), federated(), 4, **options, **how)
            for how in ({"chunk": 100}, {"chunk": 2}, {"execution": "loop"})]  # fmt: skip
    assert np.isfinite(runs[0]["metric.clipped"]).all()
    for other in runs[1:]:
        assert_same(other, runs[0], 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_run_goes_on_from_a_checkpoint_as_if_never_stopped(kind, tmp_path):
    def engine() -> vfl.Engine:
        task = mlp()
        return vfl.Engine(private_kind(kind, task), task, federated(), clients_per_round=6, chunk=3, execution="vmap")

    first = engine()
    state = first.init(3)
    for t in range(6):
        state, metrics = first.play(state)
        if t == 2:
            checkpoint.save(tmp_path, state, {}, keep=1)
    second = engine()
    again = checkpoint.load(checkpoint.of_round(tmp_path, 3), second.init(3), {})
    for _ in range(3):
        again, repeated = second.play(again)
    assert_same(state_numbers(again), state_numbers(state), 0)
    assert repeated["clipped"] == metrics["clipped"]


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_a_private_run_equal_their_runs_alone(kind):
    data = federated([size or 2 for size in SIZES])
    options = {"clients_per_round": 6, "batch_size": 4, "evaluation": vfl.Evaluation(0), "execution": "vmap"}
    state, history = vfl.simulate(private_kind(kind, mlp()), mlp(), data, 3, seed=3, replicas=2, **options)
    for r in range(2):
        alone, rows = vfl.simulate(private_kind(kind, mlp()), mlp(), data, 3, seed=3 + r, **options)
        np.testing.assert_allclose(state.server.x[r], alone.server.x, rtol=1e-10, atol=1e-10)
        assert history[-1]["replicas"][r]["clipped"] == rows[-1]["clipped"]


# --- refusals ---


def test_tree_noise_is_refused_for_messages_of_several_vectors():
    algorithm = private(Scaffold().build(mlp(), N), clip=1, noise_multiplier=1, cohort=4, noise=tree(3))
    with pytest.raises(vfl.UsageError, match="whose clients send one vector"):
        run(algorithm, mlp(), federated(), 1, clients_per_round=4)


def test_count_noise_too_small_for_the_noise_multiplier_is_refused():
    assert message_noise(0, 0.1) == 0
    assert message_noise(1.0, 1e9) == pytest.approx(1.0)
    with pytest.raises(vfl.UsageError, match=r"count-noise must be above half the noise multiplier 1, not 0\.5"):
        message_noise(1.0, 0.5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda a: private(a, clip=0, noise_multiplier=1, cohort=4), "clip must be a finite number > 0, not 0"),
        (lambda a: private(a, clip=1, noise_multiplier=-1, cohort=4), "noise-multiplier must be a finite number ≥ 0"),
        (
            lambda a: private(a, clip=1, noise_multiplier=1, cohort=4, adaptive=Adaptive(0.5, 1), noise=tree(2)),
            "an adaptive clipping norm needs noise drawn afresh",
        ),
        (lambda a: locally_private(a, clip=math.inf, noise_multiplier=1), "clip must be a finite number > 0, not inf"),
        (
            lambda a: locally_private(a, clip=1, noise_multiplier=1, weights=(2, 1)),
            "min-weight ≤ max-weight, not 2 and",
        ),
        (lambda a: classical_multiplier(0, 1e-5), "the ε of a message must be a finite number > 0, not 0"),
        (lambda a: classical_multiplier(-1, 1e-5), "the ε of a message must be a finite number > 0, not -1"),
        (lambda a: classical_multiplier(1, 0), "delta must lie between 0 and 1, not 0"),
    ],
)
def test_a_value_without_meaning_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(vfl.UsageError) as error:
        make(FedAvg().build(mlp(), N))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
