"""LSTM layers of many clients by oneDNN: each client's own, as torch's layer makes it."""

import pytest
import torch
from helpers import Calls
from torch import nn
from torch.func import functional_call, grad, vmap

from vfl import recurrence
from vfl.layers import functionalize

C, B, T, H = 3, 2, 4, 5
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(recurrence, "_LEAST", 1)


def case(batch_first=True, dtype=torch.float32):
    torch.manual_seed(0)
    theirs = nn.LSTM(3, H, 2, batch_first=batch_first).to(dtype)
    ours = functionalize(nn.LSTM(3, H, 2, batch_first=batch_first).to(dtype))
    w = {n: torch.randn(C, *p.shape, dtype=dtype) for n, p in theirs.named_parameters()}
    x = torch.randn(C, *((B, T) if batch_first else (T, B)), 3, dtype=dtype)
    state = tuple(torch.randn(C, 2, B, H, dtype=dtype) for _ in range(2))
    return theirs, ours, w, x, state


def loss(layer, w, x, h, c):
    """Of every output: all positions of the last layer, and both layers' last states."""
    y, (h, c) = functional_call(layer, w, (x, (h, c)))
    return (y**3).sum() + (h**2).sum() + (c**3).sum()


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_under_vmap_are_those_of_torchs_layer_in_a_loop(batch_first):
    theirs, ours, w, x, state = case(batch_first)
    with Calls() as calls:
        found = vmap(grad(lambda *given: loss(ours, *given), (0, 1, 2, 3)))(w, x, *state)
    assert calls.names.count("mkldnn_rnn_layer_backward") == 2 * C  # two layers
    for i in range(C):
        leaves = [t[i].clone().requires_grad_() for t in (*w.values(), x, *state)]
        named = dict(zip(w, leaves, strict=False))
        expected = torch.autograd.grad(loss(theirs, named, *leaves[len(w) :]), leaves)
        mine = [*(t[i] for t in found[0].values()), *(t[i] for t in found[1:])]
        torch.testing.assert_close(mine, list(expected), rtol=1e-6, atol=1e-6)


def test_what_its_derivatives_follow_from_is_torchs_layer():
    torch.manual_seed(0)
    layer = nn.LSTM(3, H).double()
    x, h, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((T, B, 3), (B, H), (B, H)))
    y, (_, last) = layer(x, (h[None], c[None]))
    found = recurrence._fused_formula(x, *layer.parameters(), h, c)
    torch.testing.assert_close(found, torch.cat([y, last]), rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients_follow():
    def second(dtype):
        _, ours, w, x, state = case(dtype=torch.float32)
        w, x, *state = ({n: t.to(dtype) for n, t in w.items()}, x.to(dtype), *(t.to(dtype) for t in state))

        def slope(w, x, h, c):
            return sum((g**2).sum() for g in grad(lambda w: loss(ours, w, x, h, c))(w).values())

        return vmap(grad(slope, (0, 1)))({n: 0.3 * t for n, t in w.items()}, x, *state)

    (w32, x32), (w64, x64) = second(torch.float32), second(torch.float64)  # which oneDNN has no layer for
    torch.testing.assert_close(x32, x64.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(w32, {n: t.float() for n, t in w64.items()}, rtol=1e-4, atol=1e-3)


def test_many_small_clients_keep_the_loop_over_positions(monkeypatch):
    monkeypatch.setattr(recurrence, "_LEAST", 1e9)
    _, ours, w, x, state = case()
    with Calls() as calls:
        vmap(lambda *given: loss(ours, *given))(w, x, *state)
    assert "mkldnn_rnn_layer" not in calls.names
