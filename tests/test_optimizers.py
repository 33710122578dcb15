"""Optimizers against torch.optim and against the papers' equations in numpy, in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vfl.base import leaves, tree_map
from vfl.errors import UsageError
from vfl.optimizers import OPTIMIZERS, clip_norm, optimizer

D, STEPS, LR = 7, 20, 0.03
SIZES = [4, 1, 2]

SPECS = [
    "sgd",
    "sgd:weight_decay=0.1",
    "sgd:momentum=0.9",
    "sgd:momentum=0.9,dampening=0.3",
    "sgd:momentum=0.9,nesterov=true,weight_decay=0.1",
    "adam",
    "adam:b1=0,weight_decay=0.1",
    "adam:b2=0.99,eps=1e-3,bias_correction=false,initial_v=1e-6",
    "adamw",
    "yogi",
    "yogi:bias_correction=true,weight_decay=0.1",
    "adagrad",
    "adagrad:b1=0.9,eps=1e-3,initial_v=1e-6",
    "rmsprop",
    "rmsprop:momentum=0.9,centered=true,weight_decay=0.1",
    "lamb",
    "lars",
    "lars:momentum=0",
]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def ours(spec: str, x: np.ndarray, gradients: np.ndarray, lr: float | Tensor = LR, sizes=None) -> np.ndarray:
    opt = optimizer(spec, sizes)
    y = torch.from_numpy(x)
    state = opt.init(y)
    for g in torch.from_numpy(gradients):
        y, state = opt.step(g, state, y, lr)
    return y.numpy()


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, LR)),
        ("sgd:weight_decay=0.1", lambda p: torch.optim.SGD(p, LR, weight_decay=0.1)),
        ("sgd:momentum=0.9", lambda p: torch.optim.SGD(p, LR, momentum=0.9)),
        ("sgd:momentum=0.9,dampening=0.3", lambda p: torch.optim.SGD(p, LR, momentum=0.9, dampening=0.3)),
        (
            "sgd:momentum=0.9,nesterov=true,weight_decay=0.1",
            lambda p: torch.optim.SGD(p, LR, momentum=0.9, nesterov=True, weight_decay=0.1),
        ),
        ("adam", lambda p: torch.optim.Adam(p, LR)),
        (
            "adam:b1=0.8,b2=0.95,eps=1e-3,weight_decay=0.1",
            lambda p: torch.optim.Adam(p, LR, (0.8, 0.95), 1e-3, weight_decay=0.1),
        ),
        ("adam:b1=0,b2=0", lambda p: torch.optim.Adam(p, LR, (0.0, 0.0))),
        ("adamw", lambda p: torch.optim.AdamW(p, LR)),
        ("adamw:b1=0.8,weight_decay=0.3", lambda p: torch.optim.AdamW(p, LR, (0.8, 0.999), weight_decay=0.3)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, LR)),
        (
            "adagrad:eps=1e-3,initial_v=0.2,weight_decay=0.1",
            lambda p: torch.optim.Adagrad(p, LR, eps=1e-3, initial_accumulator_value=0.2, weight_decay=0.1),
        ),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, LR)),
        (
            "rmsprop:alpha=0.9,eps=1e-3,momentum=0.8,centered=true,weight_decay=0.1",
            lambda p: torch.optim.RMSprop(p, LR, 0.9, 1e-3, 0.1, 0.8, True),
        ),
    ],
)
def test_optimizer_takes_the_steps_of_torch_optim(spec: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    x, gradients = numbers(D), numbers(STEPS, D, seed=1)
    parameter = torch.nn.Parameter(torch.from_numpy(x.copy()))
    theirs = make([parameter])
    for g in torch.from_numpy(gradients):
        parameter.grad = g.clone()
        theirs.step()
    assert_near(ours(spec, x, gradients), parameter.detach().numpy())


def fedopt(second: Callable, x: np.ndarray, gradients: np.ndarray, b1: float, tau: float) -> np.ndarray:
    """Algorithm 2 of 2003.00295, with Δ = −g and v₋₁ = τ²."""
    m, v = np.zeros(D), np.full(D, tau**2)
    for delta in -gradients:
        m = b1 * m + (1 - b1) * delta
        v = second(v, delta)
        x = x + LR * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(
    ("spec", "second", "b1"),
    [
        ("adagrad:eps=1e-3,initial_v=1e-6", lambda v, d: v + d**2, 0.0),
        ("adagrad:eps=1e-3,initial_v=1e-6,b1=0.9", lambda v, d: v + d**2, 0.9),
        ("yogi:b2=0.99", lambda v, d: v - 0.01 * d**2 * np.sign(v - d**2), 0.9),
        (
            "adam:b2=0.99,eps=1e-3,bias_correction=false,initial_v=1e-6",
            lambda v, d: 0.99 * v + 0.01 * d**2,
            0.9,
        ),
    ],
)
def test_fedadagrad_fedyogi_and_fedadam_follow_algorithm_2(spec: str, second: Callable, b1: float) -> None:
    x, gradients = numbers(D), numbers(STEPS, D, seed=1)
    assert_near(ours(spec, x, gradients), fedopt(second, x, gradients, b1, 1e-3))


def test_yogi_lets_a_large_second_moment_fall_by_the_gradient_and_not_by_its_share() -> None:
    x, gradients = numbers(D), 0.1 * numbers(STEPS, D, seed=1)
    m, v, y = np.zeros(D), np.full(D, 2.0), x  # v > g² throughout, the branch that differs most from Adam
    for g in gradients:
        m, v = 0.9 * m + 0.1 * g, v - 0.001 * g**2
        y = y - LR * m / (np.sqrt(v) + 1e-3)
    assert_near(ours("yogi:initial_v=2", x, gradients), y)


@pytest.mark.parametrize("sizes", [None, SIZES])
def test_lamb_follows_algorithm_2_layer_by_layer(sizes: list[int] | None) -> None:
    x, gradients = numbers(D), numbers(STEPS, D, seed=1)
    cuts = np.cumsum(sizes or [D])[:-1]
    m, v, y = np.zeros(D), np.zeros(D), x
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        r = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
        layers = zip(np.split(y, cuts), np.split(r + 0.01 * y, cuts), strict=True)
        y = np.concatenate([w - LR * np.linalg.norm(w) / np.linalg.norm(u) * u for w, u in layers])
    assert_near(ours("lamb", x, gradients, sizes=sizes), y)


@pytest.mark.parametrize("sizes", [None, SIZES])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_follows_algorithm_1_layer_by_layer(sizes: list[int] | None, momentum: float) -> None:
    x, gradients = numbers(D), numbers(STEPS, D, seed=1)
    cuts = np.cumsum(sizes or [D])[:-1]
    layers, memory = np.split(x, cuts), [np.zeros(1)] * (len(cuts) + 1)
    for t, g in enumerate(gradients):
        rate = LR / (1 + t)  # a changing rate shows that it belongs inside the momentum
        for i, (w, part) in enumerate(zip(layers, np.split(g, cuts), strict=True)):
            local = 0.1 * np.linalg.norm(w) / (np.linalg.norm(part) + 0.05 * np.linalg.norm(w))
            memory[i] = momentum * memory[i] + rate * local * (part + 0.05 * w)
            layers[i] = w - memory[i]
    opt = optimizer(f"lars:trust=0.1,weight_decay=0.05,momentum={momentum}", sizes)
    y = torch.from_numpy(x)
    state = opt.init(y)
    for t, g in enumerate(torch.from_numpy(gradients)):
        y, state = opt.step(g, state, y, LR / (1 + t))
    assert_near(y.numpy(), np.concatenate(layers))


@pytest.mark.parametrize("spec", ["lamb", "lars"])
def test_a_layer_of_zeros_moves_with_trust_ratio_one(spec: str) -> None:
    opt = optimizer(spec, SIZES)
    x = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    y, _ = opt.step(torch.ones_like(x), opt.init(x), x, LR)
    torch.testing.assert_close(y[:4], torch.full((4,), -LR, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_vmap_equals_a_loop_over_rows(spec: str) -> None:
    C = 5
    opt = optimizer(spec, SIZES)
    x = torch.from_numpy(numbers(D))  # shared at first, as a broadcast model
    gradients = torch.from_numpy(numbers(C, 3, D, seed=1))
    lr = torch.from_numpy(np.linspace(0.01, 0.1, C))

    def client(gradients: Tensor, lr: Tensor) -> tuple[Tensor, object]:
        y, state = x, opt.init(x)
        for g in gradients.unbind():
            y, state = opt.step(g, state, y, lr)
        return y, state

    mapped = torch.func.vmap(client)(gradients, lr)
    rows = [client(g, r) for g, r in zip(gradients, lr, strict=True)]
    for i, row in enumerate(rows):
        torch.testing.assert_close(tree_map(lambda leaf, i=i: leaf[i], mapped), row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mapped", [False, True])
def test_the_state_and_model_keep_their_dtype_whatever_the_rates_dtype(spec: str, mapped: bool) -> None:
    opt = optimizer(spec, SIZES)
    x = torch.from_numpy(numbers(2, D)).float()
    lr = torch.full((2,), LR, dtype=torch.float64)

    def one(x: Tensor, lr: Tensor) -> tuple[Tensor, object]:
        return opt.step(x, opt.init(x), x, lr)

    after = torch.func.vmap(one)(x, lr) if mapped else one(x[0], lr[0])
    assert {leaf.dtype for leaf in leaves(after)} == {torch.float32}


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_leaves_its_arguments_alone(spec: str) -> None:
    opt = optimizer(spec, SIZES)
    x, g = torch.from_numpy(numbers(D)), torch.from_numpy(numbers(D, seed=1))
    _, state = opt.step(g, opt.init(x), x, LR)
    before = [leaf.clone() for leaf in leaves((g, state, x))]
    opt.step(g, state, x, LR)
    for leaf, was in zip(leaves((g, state, x)), before, strict=True):
        assert torch.equal(leaf, was)


@pytest.mark.parametrize("spec", SPECS)
def test_a_tensor_rate_and_a_number_take_the_same_steps(spec: str) -> None:
    x, gradients = numbers(D), numbers(STEPS, D, seed=1)
    rate = torch.tensor(LR, dtype=torch.float64)
    assert_near(ours(spec, x, gradients, rate), ours(spec, x, gradients))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("x", [0.0, 1.0])
def test_zero_gradients_on_a_fresh_state_keep_the_model_finite(spec: str, x: float) -> None:
    zero = np.zeros((3, D))
    after = ours(spec, np.full(D, x), zero, sizes=SIZES)
    assert np.isfinite(after).all()
    if x == 0:
        assert not after.any()


def test_centered_rmsprop_survives_a_variance_that_rounds_below_zero() -> None:
    opt = optimizer("rmsprop:alpha=0.5,eps=1e-3,centered=true")
    g = torch.linspace(0.1, 2.0, 100)  # constant over the steps, so that v − mean² goes to zero
    x, state = torch.zeros(100), opt.init(g)
    for _ in range(60):
        x, state = opt.step(g, state, x, LR)
    assert (state.v < state.mean**2).any()
    assert torch.isfinite(x).all()


def test_adam_corrects_its_bias_exactly_in_float32() -> None:
    opt = optimizer("adam:eps=1e-30")
    x, g = torch.zeros(3), torch.tensor([1e-4, 1.0, 1e4])
    y, _ = opt.step(g, opt.init(x), x, 1.0)
    torch.testing.assert_close(y, -torch.ones(3), rtol=3e-7, atol=0)  # the first step is lr·sign(g)


def test_plain_sgd_has_no_state() -> None:
    opt = optimizer("sgd")
    assert opt.init(torch.zeros(D)) == ()
    assert opt.step(torch.ones(D), (), torch.zeros(D), 0.1)[1] == ()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sgd:momentum=-0.1", "sgd: momentum must be at least 0"),
        ("sgd:momentum=1", "sgd: momentum must be at least 0 and below 1, not 1.0"),
        ("sgd:momentum=nan", "sgd: momentum"),
        ("sgd:momentum=0.9,dampening=-1", "sgd: dampening"),
        ("sgd:dampening=0.1", "dampening needs a momentum"),
        ("sgd:nesterov=true", "nesterov needs a momentum"),
        ("sgd:momentum=0.9,dampening=0.1,nesterov=true", "nesterov needs dampening = 0"),
        ("sgd:weight_decay=-1", "sgd: weight_decay"),
        ("adam:b1=1", "adam: b1"),
        ("adam:b2=-0.1", "adam: b2"),
        ("adam:eps=0", "adam: eps must be a number above 0"),
        ("adam:initial_v=-1", "adam: initial_v"),
        ("adam:weight_decay=inf", "adam: weight_decay"),
        ("adamw:b1=1", "adamw: b1"),
        ("adamw:weight_decay=-1", "adamw: weight_decay"),
        ("yogi:b2=1", "yogi: b2"),
        ("yogi:weight_decay=-1", "yogi: weight_decay"),
        ("adagrad:eps=-1", "adagrad: eps"),
        ("adagrad:initial_v=-1", "adagrad: initial_v"),
        ("adagrad:b1=1", "adagrad: b1"),
        ("rmsprop:alpha=1", "rmsprop: alpha"),
        ("rmsprop:eps=0", "rmsprop: eps"),
        ("rmsprop:momentum=1", "rmsprop: momentum"),
        ("rmsprop:weight_decay=-1", "rmsprop: weight_decay"),
        ("lamb:b1=1", "lamb: b1"),
        ("lamb:weight_decay=-1", "lamb: weight_decay"),
        ("lars:momentum=1", "lars: momentum"),
        ("lars:weight_decay=-1", "lars: weight_decay"),
        ("lars:trust=0", "lars: trust"),
        ("adm", "unknown optimizer 'adm'; did you mean 'adam'?"),
        ("lamb:sizes=3", "which has no 'sizes'"),
        ("adam:betas=3", "which has no 'betas'"),
    ],
)
def test_bad_arguments_raise(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        optimizer(spec)
    assert says in str(caught.value)


def test_every_optimizer_is_covered_by_these_tests() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(OPTIMIZERS)


def test_clip_norm_shortens_long_gradients_only() -> None:
    g = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(torch.func.vmap(lambda row: clip_norm(row, 1.0))(g), expected)
    assert torch.equal(clip_norm(g[1], 1.0), g[1])
    torch.testing.assert_close(clip_norm(g[0], torch.tensor(2.0)), torch.tensor([1.2, 1.6]))


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_clip_norm_refuses_a_bound_that_is_not_positive(bad: float) -> None:
    with pytest.raises(UsageError, match="max_norm must be > 0"):
        clip_norm(torch.ones(2), bad)
