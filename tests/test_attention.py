"""Attention of many clients is each client's own, in one call and without a warning."""

import pytest
import torch
from helpers import Calls
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from vfl import random
from vfl.attention import FUSED, register
from vfl.layers import functionalize
from vfl.task import Batch, task

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


KINDS = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {"need_weights": False}),
    "no bias": ({"bias": False}, {"average_attn_weights": False}),
    "other keys": ({"kdim": 6, "vdim": 4}, {}),
    "more keys": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": torch.arange(T) > 3}),
    "causal": ({"batch_first": True}, {"is_causal": True, "attn_mask": torch.ones(T, T, dtype=torch.bool).triu(1)}),
    "a mask a head": ({}, {"attn_mask": torch.linspace(0, 1, B * 2 * T * T, dtype=F64).reshape(B * 2, T, T)}),
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_with_dropout_is_torchs_but_for_the_draw(kind, alone):
    options, call = KINDS[kind]
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, dropout=0.0, **options).to(F64)
    ours = functionalize(nn.MultiheadAttention(8, 2, dropout=0.5, **options).to(F64))
    ours.load_state_dict(theirs.state_dict())
    ours.drop.p = 0.0
    shape = (B, T) if options.get("batch_first") else (T, B)
    inputs = [torch.randn(*shape, n, dtype=F64) for n in (8, options.get("kdim", 8), options.get("vdim", 8))]
    call = dict(call)
    if alone:
        one = 0 if options.get("batch_first") else 1
        inputs = [t.select(one, 0) for t in inputs]
        if kind == "a mask a head":
            call["attn_mask"] = call["attn_mask"][:2]
    elif "key_padding_mask" in call:
        call["key_padding_mask"] = call["key_padding_mask"].expand(B, -1)
    for found, expected in zip(ours(*inputs, **call), theirs(*inputs, **call), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            close(found, expected)


class Encoder(nn.Module):
    """Torch's own layer with its default dropout of 0.1, which is in attention, too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.layer(x)[:, 0]


def test_a_clients_dropout_is_the_same_alone_and_among_others():
    torch.manual_seed(0)
    problem = task(Encoder(), dtype=F64)
    x, y, mask = torch.randn(B, T, 8, dtype=F64), torch.arange(B), torch.ones(B, dtype=torch.bool)
    keys = random.split(random.key(0), C)

    def gradient(key):
        return problem.grad_fn(problem.x, Batch(x, y, mask, key), ())[0]

    found = vmap(gradient)(keys)
    close(found, torch.stack([gradient(key) for key in keys]))
    assert (found[0] - found[1]).abs().max() > 1e-3
