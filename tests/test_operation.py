"""Functions called once for all clients of a vmap: the same numbers and gradients, whatever the axes."""

import pytest
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import grad, vmap

from vfl.operation import at_once


def scaled(v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(a v² + v) for v [..., D] and a [...], and its sum [...], partly in place."""
    value = (v * v).mul_(a[..., None]).add_(v)
    return value, value.sum(-1)


def plain(v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same out of place, as vmap asks for where v alone is shared."""
    value = a[..., None] * v * v + v
    return value, value.sum(-1)


def once(v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    return at_once(scaled, v, a)


V = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(2, 3, 4)
A = torch.tensor([[0.5, 2.0, -1.0], [3.0, 0.1, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "inputs"),
    [
        (lambda f: f, (V[0, 0], A[0, 0])),
        (lambda f: vmap(f), (V[0], A[0])),
        (lambda f: vmap(f, (1, 0), (1, 0)), (V[0].T, A[0])),
        (lambda f: vmap(f, (None, 0)), (V[0, 0], A[0])),
        (lambda f: vmap(f, (0, None)), (V[0], A[0, 0])),
        (lambda f: vmap(vmap(f)), (V, A)),
        (lambda f: vmap(vmap(f, (0, None)), (None, 0)), (V[0], A[0])),
        (lambda f: vmap(lambda n: n + f(V[0, 0], A[0, 0])[1]), (A[0],)),
    ],
    ids=["alone", "clients", "axes-not-in-front", "one-vector", "one-factor", "replicas", "crossed", "no-axis"],
)
def test_what_is_called_at_once_gives_what_vmap_gives(call, inputs):
    torch.testing.assert_close(call(once)(*inputs), call(plain)(*inputs))


def test_it_is_called_with_the_clients_axes_in_front():
    seen = []

    def shape(v: Tensor) -> tuple[Tensor]:
        seen.append((tuple(v.shape), is_functorch_wrapped_tensor(v)))
        return (v,)

    vmap(vmap(lambda v: at_once(shape, v)), in_dims=2)(V)  # [2, 3, 4], whose last axis is mapped first
    assert seen == [((4, 2, 3), False)]


def test_gradients_through_it_are_those_of_the_function_itself():
    def total(f):
        return lambda v, a: vmap(f)(v, a)[0].sum()

    torch.testing.assert_close(grad(total(once), (0, 1))(V[0], A[0]), grad(total(plain), (0, 1))(V[0], A[0]))
    each = [vmap(grad(lambda v, a, f=f: f(v, a)[1], (0, 1)))(V[0], A[0]) for f in (once, plain)]
    torch.testing.assert_close(*each)
    found = []
    for f in (once, plain):
        v = V[0].clone().requires_grad_()
        total(f)(v, A[0]).backward()
        found.append(v.grad)
    torch.testing.assert_close(*found)
