"""Attention of many clients is each client's own, in one call and without a warning."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from vfl.attention import FUSED, register

C, B, N, T, E = 3, 2, 4, 5, 6
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "shared": {"attn_mask": torch.randn(T, T, generator=torch.Generator().manual_seed(1)).double()},
    "an example's": {"attn_mask": torch.randn(B, 1, T, T, generator=torch.Generator().manual_seed(1)).double()},
    "scaled": {"scale": 0.3},
}
F64 = torch.float64
register()


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def inputs(*axes):
    torch.manual_seed(0)
    return tuple(torch.randn(*axes, B, N, T, E, dtype=F64) for _ in range(3))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def by_loop(loss, *stacked):
    found = []
    for mine in zip(*stacked, strict=True):
        leaves = [t.clone().requires_grad_() for t in mine]
        found.append(torch.autograd.grad(loss(*leaves), leaves))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_under_vmap_are_those_of_a_loop_in_one_call(mask):
    def loss(q, k, v):
        return (functional.scaled_dot_product_attention(q, k, v, **MASKS[mask]) ** 3).sum()

    qkv = inputs(C)
    with Calls() as calls:
        found = vmap(grad(loss, (0, 1, 2)))(*qkv)
    assert [name for name in calls.names if name in FUSED] == list(FUSED)
    close(found, by_loop(loss, *qkv))


def test_each_client_may_have_a_mask_of_its_own():
    def loss(mask, q, k, v):
        return (functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) ** 3).sum()

    qkv, masks = inputs(C), torch.randn(C, T, T, dtype=F64)
    found = vmap(grad(loss, (1, 2, 3)))(masks, *qkv)
    expected = [by_loop(lambda *mine, m=m: loss(m, *mine), *(t[c : c + 1] for t in qkv)) for c, m in enumerate(masks)]
    close(found, tuple(torch.cat(parts) for parts in zip(*expected, strict=True)))


def test_replicas_are_one_more_axis_and_keys_may_be_shared():
    def loss(q, k, v):
        return (functional.scaled_dot_product_attention(q, k, v) ** 3).sum()

    q, k, v = inputs(2, C)
    found = vmap(vmap(grad(loss, (0, 1, 2)), (0, None, 0)))(q, k[:, 0], v)
    for r in range(2):
        close(tuple(t[r] for t in found), by_loop(loss, q[r], k[r, :1].expand(C, -1, -1, -1, -1), v[r]))


@pytest.mark.parametrize("need_weights", [True, False])
def test_torchs_attention_layer_runs_under_vmap(need_weights):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).to(F64)
    w = {n: torch.randn(C, *p.shape, dtype=F64) for n, p in layer.named_parameters()}
    x = torch.randn(C, B, T, 8, dtype=F64)

    def loss(x, *values):
        named = dict(zip(w, values, strict=True))
        return (functional_call(layer, named, (x, x, x), {"need_weights": need_weights})[0] ** 3).sum()

    close(vmap(grad(loss, tuple(range(1 + len(w)))))(x, *w.values()), by_loop(loss, x, *w.values()))
