"""DP-SGD inside clients: gradients clipped example by example, with noise."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_same, federated, mlp, norm_and_dropout, regression, run
from papers import DATA, Array, gradient

import vfl
from algorithms.fedavg import FedAvg
from algorithms.frecon import Frecon
from algorithms.marina import Marina, PPMarina, VRMarina
from algorithms.mime import Mime
from vfl.privacy import private_gradients
from vfl.privacy.central import NOISE

SEED = 7


def normal(key: torch.Tensor, *shape: int) -> Array:
    return vfl.random.normal(key, shape, torch.float64).numpy()


def clipped(v: Array, norm: float) -> Array:
    return v * min(1.0, norm / np.linalg.norm(v))


def test_private_gradients_are_clipped_example_by_example():
    task, x, rows = regression(), regression().x, np.arange(7)
    clip, z = 2.0, 0.8
    inner = private_gradients(task, clip, z)
    key = vfl.random.key(4)
    batch = vfl.Batch(DATA.x[[*rows, 0]], DATA.y[[*rows, 0]], torch.tensor([True] * 7 + [False]), key)
    each = [gradient(x.numpy(), rows[[j]]) for j in range(7)]
    lengths = np.array([np.linalg.norm(g) for g in each])
    assert (lengths > clip).any() and (lengths < clip).any()
    noise = normal(vfl.random.fold_in(key, NOISE), len(x))
    wanted = sum(clipped(g, clip) for g in each) + z * clip * noise
    found, aux = inner.grad_fn(x, batch, ())
    np.testing.assert_allclose(found.numpy(), wanted / 7, rtol=1e-12, atol=1e-12)
    mapped, _ = torch.func.vmap(lambda x: inner.grad_fn(x, batch, ()))(x[None])
    np.testing.assert_allclose(mapped[0].numpy(), wanted / 7, rtol=1e-12, atol=1e-12)
    fixed, _ = private_gradients(task, clip, z, batch_size=10).grad_fn(x, batch, ())
    np.testing.assert_allclose(fixed.numpy(), wanted / 10, rtol=1e-12, atol=1e-12)
    plain, plain_aux = task.grad_fn(x, batch, ())
    assert aux.examples == 7 and torch.allclose(aux.loss, plain_aux.loss, rtol=1e-12)
    same, _ = private_gradients(task, 1e9, 0).grad_fn(x, batch, ())
    np.testing.assert_allclose(same.numpy(), plain.numpy(), rtol=1e-12, atol=1e-12)


def test_a_run_with_private_gradients_is_the_same_under_vmap_and_loop_and_in_any_chunk():
    task = private_gradients(mlp(), 0.5, 0.3)
    options = {"clients_per_round": 5, "batch_size": 4, "seed": SEED}
    runs = [run(FedAvg(), task, federated(), 3, **options, **how)
            for how in ({"chunk": 100}, {"chunk": 2}, {"execution": "loop"})]  # fmt: skip
    for other in runs[1:]:
        assert_same(other, runs[0], 1e-9)


@pytest.mark.parametrize("method", [Marina, PPMarina, VRMarina, Frecon, Mime])
def test_methods_that_compare_two_gradients_of_one_minibatch_are_refused(method):
    with pytest.raises(vfl.UsageError, match=f"{method.__name__.lower()} compares two gradients of one minibatch"):
        method().build(private_gradients(mlp(), 0.5, 0.3), 4)
    method().build(mlp(), 4)


def test_the_noise_in_a_gradient_has_the_stated_deviation():
    """zC/B on every entry: 5 standard deviations around the chi-square's mean."""
    D, C, z = 20_000, 0.7, 1.3
    task = vfl.task(torch.nn.Linear(D, 1, bias=False), vfl.squared_error, dtype=torch.float64)
    nothing = vfl.Batch(torch.zeros(4, D, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64),
                        torch.ones(4, dtype=torch.bool), vfl.random.key(1))  # fmt: skip
    g, _ = private_gradients(task, C, z).grad_fn(task.x, nothing, ())
    assert abs((g / (z * C / 4)).square().mean() - 1) < 5 * math.sqrt(2 / D)


def test_one_example_changes_the_sum_by_at_most_the_norm():
    task, C = mlp(), 0.3
    x, key, n = 5 * task.x, vfl.random.key(0), 8
    inner = private_gradients(task, C, 0.5, batch_size=n)
    whole = vfl.Batch(DATA.x[:n], DATA.y[:n], torch.ones(n, dtype=torch.bool), key)
    g, _ = inner.grad_fn(x, whole, ())
    moved = []
    for j in range(n):
        without, _ = inner.grad_fn(x, whole._replace(mask=torch.arange(n) != j), ())
        moved.append(float((n * (g - without)).norm()))
    assert max(moved) <= C * (1 + 1e-12)
    assert max(moved) > 0.99 * C, "some examples should be clipped"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: private_gradients(mlp(), -1, 1), "example-clip must be a finite number > 0, not -1"),
        (lambda: private_gradients(mlp(), 1, -1), "example-noise must be a finite number ≥ 0, not -1"),
        (lambda: private_gradients(mlp(), 1, 1, 0), "batch size of private gradients must be at least 1, not 0"),
        (lambda: private_gradients(norm_and_dropout(), 1, 1), "cannot average the model's buffers"),
    ],
)
def test_a_value_without_meaning_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(vfl.UsageError) as error:
        make()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
