"""Normalizations of many clients are each client's own, by whichever calls they are computed."""

import copy

import pytest
import torch
from helpers import Calls
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from vfl import normalization
from vfl.layers import functionalize
from vfl.normalization import MaskedBatchNorm

C, B = 3, 5
LAYERS = {
    "layer": (nn.LayerNorm(4), (3, 4), "native_layer_norm"),
    "layer, two axes": (nn.LayerNorm((2, 3), eps=0.1), (4, 2, 3), "native_layer_norm"),
    "group": (nn.GroupNorm(2, 6), (6, 3, 2), "native_group_norm"),
    "group, no pixels": (nn.GroupNorm(3, 6, eps=0.1), (6,), "native_group_norm"),
    "batch": (nn.BatchNorm1d(4), (4,), "native_batch_norm"),
    "batch, 2d": (nn.BatchNorm2d(3, eps=0.1), (3, 2, 4), "native_batch_norm"),
    "batch, 3d": (nn.BatchNorm3d(2, affine=False), (2, 2, 1, 3), "native_batch_norm"),
}
BATCH = [name for name in LAYERS if name.startswith("batch")]
every_layer = pytest.mark.parametrize("name", LAYERS)
every_batch_norm = pytest.mark.parametrize("name", BATCH)


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    for name in ("_LEAST_ROWS", "_LEAST_GROUPS", "_LEAST_CHANNELS"):
        monkeypatch.setattr(normalization, name, 1)


class Case:
    """A layer with tensors for all clients, and a loss Σ u y³ of one, whose gradients need y and its derivatives."""

    def __init__(self, name):
        module, shape, self.call = LAYERS[name]
        torch.manual_seed(0)
        self.theirs = copy.deepcopy(module).double()  # torch's own
        self.ours = functionalize(copy.deepcopy(self.theirs))
        self.x = torch.randn(C, B, *shape, dtype=torch.float64)
        self.w = {n: torch.randn(C, *p.shape, dtype=torch.float64) for n, p in self.theirs.named_parameters()}
        self.u = torch.randn(B, *shape, dtype=torch.float64)

    def loss(self, w, x, mask=None, layer=None):
        state = {n: b.clone() for n, b in self.ours.named_buffers()} | ({} if mask is None else {"mask": mask})
        y = functional_call(layer or self.ours, {**state, **w}, (x,))
        each = self.u * y**3
        return (each if mask is None else torch.where(mask.reshape([-1] + [1] * (y.dim() - 1)), each, 0)).sum()

    def by_loop(self, w, x, mask=None):
        """The gradients, by torch's own layer on the real examples of one client after the other."""
        found = []
        for c in range(C):
            rows = slice(None) if mask is None else mask[c]
            leaves = {n: t[c].clone().requires_grad_() for n, t in w.items()}
            mine = x[c].clone().requires_grad_()
            y = functional_call(self.theirs, leaves, (mine[rows],))
            found.append(torch.autograd.grad((self.u[rows] * y**3).sum(), [*leaves.values(), mine]))
        *dw, dx = (torch.stack(parts) for parts in zip(*found, strict=True))
        return dict(zip(w, dw, strict=True)), dx


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_layer
def test_gradients_under_vmap_are_those_of_a_loop(name):
    case = Case(name)
    with Calls() as calls:
        found = vmap(grad(case.loss, (0, 1)))(case.w, case.x)
    assert case.call in calls.names and f"{case.call}_backward" in calls.names  # a fused call, no formula
    close(found, case.by_loop(case.w, case.x))


@every_layer
def test_clients_may_share_the_weights(name):
    case = Case(name)
    shared = {n: t[0] for n, t in case.w.items()}
    expected = case.by_loop({n: t[:1].expand_as(t) for n, t in case.w.items()}, case.x)
    close(vmap(grad(case.loss, (0, 1)), (None, 0))(shared, case.x), expected)


@every_layer
def test_replicas_are_one_more_axis(name):
    case = Case(name)
    w, x = {n: torch.stack([t, 2 * t]) for n, t in case.w.items()}, torch.stack([case.x, case.x.flip(0)])
    found = vmap(vmap(grad(case.loss, (0, 1))))(w, x)
    for r in range(2):
        expected = case.by_loop({n: t[r] for n, t in w.items()}, x[r])
        close(({n: t[r] for n, t in found[0].items()}, found[1][r]), expected)


@every_layer
def test_the_axis_of_clients_may_lie_anywhere(name):
    case = Case(name)
    w, x = {n: t.movedim(0, -1) for n, t in case.w.items()}, case.x.movedim(0, 2)
    close(vmap(grad(case.loss, (0, 1)), (-1, 2))(w, x), case.by_loop(case.w, case.x))


@pytest.mark.parametrize("name", [name for name, (layer, *_) in LAYERS.items() if list(layer.parameters())])
def test_gradients_of_gradients_are_those_of_a_loop(name):
    case = Case(name)

    def slope(layer):
        return lambda w, x: sum((g**2).sum() for g in grad(lambda w, x: case.loss(w, x, layer=layer))(w, x).values())

    found = vmap(grad(slope(case.ours), (0, 1)))(case.w, case.x)
    expected = []
    for c in range(C):
        leaves = [t[c].clone().requires_grad_() for t in (*case.w.values(), case.x)]
        y = functional_call(case.theirs, dict(zip(case.w, leaves, strict=False)), (leaves[-1],))
        first = torch.autograd.grad((case.u * y**3).sum(), leaves[:-1], create_graph=True)
        expected.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))
    *dw, dx = (torch.stack(parts) for parts in zip(*expected, strict=True))
    close(found, (dict(zip(case.w, dw, strict=True)), dx))


@every_batch_norm
@pytest.mark.parametrize("vectorized", [True, False])
def test_padding_enters_neither_the_statistics_nor_the_gradients(name, vectorized):
    case = Case(name)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    x = torch.where(mask.reshape(C, B, *[1] * (case.x.dim() - 2)), case.x, 1e6)
    if vectorized:
        found = vmap(grad(case.loss, (0, 1)))(case.w, x, mask)
    else:
        each = [grad(case.loss, (0, 1))({n: t[c] for n, t in case.w.items()}, x[c], mask[c]) for c in range(C)]
        found = {n: torch.stack([e[0][n] for e in each]) for n in case.w}, torch.stack([e[1] for e in each])
    close(found, case.by_loop(case.w, x, mask))


@every_batch_norm
@pytest.mark.parametrize("real", [0, 1, 4])
def test_running_statistics_are_those_of_the_real_examples(name, real):
    case = Case(name)
    mask = torch.arange(B) < real
    state = {n: b.clone() for n, b in case.ours.named_buffers()} | {"mask": mask}

    def after(w, x):
        values = {**state, **w}
        layer = case.ours
        for n, t in values.items():
            (layer._buffers if n in layer._buffers else layer._parameters)[n] = t
        layer(x)
        return layer.running_mean, layer.running_var

    found = vmap(after)(case.w, case.x)
    for c in range(C):
        theirs = copy.deepcopy(case.theirs)
        if real and case.x[c, :real].numel() > case.x.shape[2]:  # of one value a channel torch makes none
            theirs(case.x[c, :real])
            expected = theirs.running_mean, theirs.running_var
        elif real:
            expected = 0.1 * case.x[c, 0], torch.full_like(theirs.running_var, 0.9)
        else:
            expected = theirs.running_mean, theirs.running_var
        close(tuple(t[c] for t in found), expected)


@every_layer
def test_a_traced_program_is_right_for_other_numbers(name):
    case = Case(name)
    program = make_fx(lambda w, x: vmap(grad(case.loss, (0, 1)))(w, x))(case.w, case.x)
    other = {n: 2 * t for n, t in case.w.items()}
    close(program(other, case.x.flip(0)), case.by_loop(other, case.x.flip(0)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own jvp
@every_layer
def test_other_transforms_see_the_same_function(name):
    case = Case(name)
    one, expected = {n: t[0] for n, t in case.w.items()}, case.by_loop(case.w, case.x)
    _, slope = jvp(lambda x: case.loss(one, x), (case.x[0],), (torch.ones_like(case.x[0]),))
    close(slope, expected[1][0].sum())
    recorded = case.x.clone().requires_grad_()  # by plain autograd, around vmap
    vmap(case.loss)(case.w, recorded).sum().backward()
    close(recorded.grad, expected[1])
    alone = case.x[0].clone().requires_grad_()  # and without
    case.loss(one, alone).backward()
    close(alone.grad, expected[1][0])


def test_users_layers_stay_what_they_were():
    class Own(nn.LayerNorm):
        pass

    layers = nn.Sequential(Own(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.BatchNorm1d(3))
    ours = functionalize(copy.deepcopy(layers))
    assert type(ours[0]) is Own
    assert isinstance(ours[1], nn.LayerNorm) and isinstance(ours[2], nn.GroupNorm)
    assert isinstance(ours[3], MaskedBatchNorm)
    assert ours.state_dict().keys() == layers.state_dict().keys()
