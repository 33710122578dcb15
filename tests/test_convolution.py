"""Convolutions of many clients are each client's own, however they are computed."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import vfl
from vfl import choices, timed_formulations
from vfl.errors import UsageError
from vfl.formulations import FORMULATIONS
from vfl.layers import functionalize

C, B = 3, 2
WAYS = ("auto", "each", "grouped", "unfold")
LAYERS = {
    "plain": (nn.Conv2d(2, 4, 3), (6, 5)),
    "padded": (nn.Conv2d(1, 3, 5, padding=2), (7, 7)),
    "everything": (nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 2), (2, 1), groups=2, bias=False), (9, 8)),
    "depthwise": (nn.Conv2d(3, 6, 3, padding=1, groups=3), (5, 5)),
    "pointwise": (nn.Conv2d(3, 2, 1, stride=2), (5, 4)),
    "same": (nn.Conv2d(2, 3, 3, padding="same", dilation=2), (6, 6)),
    "same, even": (nn.Conv2d(2, 3, (4, 3), padding="same"), (6, 5)),
    "valid": (nn.Conv2d(2, 3, 2, padding="valid"), (4, 4)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 5)),
    "1d": (nn.Conv1d(2, 4, 3, 2, 1), (9,)),
    "3d": (nn.Conv3d(2, 2, 2, padding=1), (3, 4, 3)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3, 2, 1), (4, 4)),
}


class Case:
    """A layer with tensors for all clients, and a loss Σ y³, whose gradients need y and all of its derivatives."""

    def __init__(self, name, dtype=torch.float64, way="auto"):
        module, n = LAYERS[name]
        torch.manual_seed(0)
        self.theirs = copy.deepcopy(module).to(dtype)  # torch's own
        self.ours = functionalize(copy.deepcopy(self.theirs), way)
        channels = getattr(module, "in_channels")  # noqa: B009
        self.x = torch.randn(C, B, channels, *n, dtype=dtype)
        self.w = {name: torch.randn(C, *p.shape, dtype=dtype) for name, p in self.theirs.named_parameters()}

    def outputs(self, w, x):
        return functional_call(self.ours, w, (x,))

    def loss(self, w, x):
        return (self.outputs(w, x) ** 3).sum()

    def by_loop(self, w, x):
        """What torch's own layer gives for one client after the other: the outputs, and the loss's gradients."""
        found = []
        for c in range(C):
            leaves = {name: t[c].clone().requires_grad_() for name, t in w.items()}
            mine = x[c].clone().requires_grad_()
            y = functional_call(self.theirs, leaves, (mine,))
            found.append((y.detach(), *torch.autograd.grad((y**3).sum(), [*leaves.values(), mine])))
        return [torch.stack(each) for each in zip(*found, strict=True)]


def close(found, expected, tolerance=1e-11):
    """Within a tolerance of the largest entry."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own layer
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_under_vmap_are_those_of_a_loop(name, way):
    case = Case(name, way=way)
    y, *gradients = case.by_loop(case.w, case.x)
    close(vmap(case.outputs)(case.w, case.x), y)
    weights, inputs = vmap(grad(case.loss, (0, 1)))(case.w, case.x)
    for found, expected in zip([*weights.values(), inputs], gradients, strict=True):
        close(found, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_shorter_numbers_lose_no_more_than_their_rounding(dtype, tolerance, way):
    case = Case("padded", dtype, way)
    exact = Case("padded")
    w, x, g = ({n: t.double() for n, t in case.w.items()}, case.x.double(), torch.randn(C, B, 3, 7, 7, dtype=dtype))

    def pulled(case, w, x, g):
        return vmap(lambda w, x, g: (functional_call(case, w, (x,)), *vjp(lambda w, x: functional_call(case, w, (x,)),
                                                                          w, x)[1](g)))(w, x, g)  # fmt: skip

    (y, weights, inputs), (y0, weights0, inputs0) = (
        pulled(case.ours, case.w, case.x, g),
        pulled(exact.theirs, w, x, g.double()),
    )
    for found, expected in zip([y, inputs, *weights.values()], [y0, inputs0, *weights0.values()], strict=True):
        assert found.dtype == dtype
        close(found.double(), expected, tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_images_with_their_channels_last_are_taken_as_they_are(way):
    case = Case("padded", way=way)
    x = case.x.flatten(0, 1).expand(-1, 1, -1, -1).contiguous(memory_format=torch.channels_last).unflatten(0, (C, B))
    close(vmap(case.outputs)(case.w, x), case.by_loop(case.w, x)[0])
    close(vmap(grad(case.loss))(case.w, x)["weight"], case.by_loop(case.w, x)[1])


@pytest.mark.parametrize("way", WAYS)
def test_replicas_are_one_more_axis(way):
    case, R = Case("everything", way=way), 2
    w = {name: torch.stack([t, -2 * t]) for name, t in case.w.items()}  # [R, C, ...]
    found = vmap(vmap(grad(case.loss, (0, 1))), (0, None))(w, case.x)
    first = vmap(vmap(grad(case.loss, (0, 1)), (None, 0)), (0, None))({n: t[:, 0] for n, t in w.items()}, case.x)
    for r in range(R):
        mine = {name: t[r] for name, t in w.items()}
        _, weights, inputs = case.by_loop(mine, case.x)
        close(found[0]["weight"][r], weights)
        close(found[1][r], inputs)
        _, weights, inputs = case.by_loop({name: t[:1].expand_as(t) for name, t in mine.items()}, case.x)
        close(first[0]["weight"][r], weights)  # one model a replica, which its clients share
        close(first[1][r], inputs)


class Calls(TorchDispatchMode):
    """Notes which convolutions run, and the first axis of what they get."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.made.append((str(func.overloadpacket), len(args[0])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_shared_weights_make_one_large_convolution(way):
    case = Case("padded", way=way)
    shared = {name: t[0] for name, t in case.w.items()}
    with Calls() as calls:
        y = vmap(case.outputs, (None, 0))(shared, case.x)
    assert calls.made == [("aten.convolution", C * B)]
    close(y, case.by_loop({name: t.expand(C, *t.shape) for name, t in shared.items()}, case.x)[0])
    found = vmap(grad(case.loss, (0, 1)), (None, 0))(shared, case.x)
    _, weights, bias, inputs = case.by_loop({name: t.expand(C, *t.shape) for name, t in shared.items()}, case.x)
    for mine, expected in zip([*found[0].values(), found[1]], [weights, bias, inputs], strict=True):
        close(mine, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own jvp
@pytest.mark.parametrize("way", ["each", "unfold"])
def test_other_transforms_see_the_same_function(way):
    case, theirs = Case("everything", way=way), Case("everything")
    theirs.ours = theirs.theirs
    w, x = case.w["weight"], case.x

    def second(case, w, x):  # the derivative of a gradient
        return grad(lambda w: (grad(lambda x: case.loss({"weight": w}, x))(x) ** 2).sum())(w)

    def forward(case, w, x):
        return jvp(lambda w: case.outputs({"weight": w}, x), (w,), (w.cos(),))[1]

    def pulled(case, w, x):
        y, pull = vjp(lambda w, x: case.outputs({"weight": w}, x), w, x)
        return pull(y)[0]  # after the transform is over

    for function in (second, forward, pulled):
        found, expected = (vmap(lambda w, x, c=c, f=function: f(c, w, x))(w, x) for c in (case, theirs))
        close(found, expected)
    recorded = w.clone().requires_grad_()  # by plain autograd, around vmap
    vmap(lambda w, x: case.loss({"weight": w}, x))(recorded, x).sum().backward()
    close(recorded.grad, case.by_loop(case.w, x)[1])


def test_a_bias_alone_can_be_learnt():
    case = Case("padded", way="each")
    recorded = case.w["bias"].clone().requires_grad_()
    vmap(case.loss)(case.w | {"bias": recorded}, case.x).sum().backward()
    close(recorded.grad, case.by_loop(case.w, case.x)[2])


@pytest.mark.parametrize("way", ["each", "unfold"])
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_traced_program_holds_a_call_for_all_clients(mode, way):
    case = Case("padded", way=way)

    def program(w, b, x):
        return vmap(grad(lambda w, b, x: case.loss({"weight": w, "bias": b}, x), (0, 1, 2)))(w, b, x)

    arguments = (case.w["weight"], case.w["bias"], case.x)
    graph = make_fx(program, tracing_mode=mode)(*arguments)
    named = [str(node.target) for node in graph.graph.nodes if "convolution" in str(node.target)]
    assert sorted(named) == [f"vfl.{way}_convolution{part}.default" for part in ("", "_inputs", "_weights")]
    for found, expected in zip(graph(*arguments), case.by_loop(case.w, case.x)[1:], strict=True):
        close(found, expected)


def test_every_operation_tells_its_shape_without_the_numbers():
    case = Case("everything", way="each")
    with torch.device("meta"):
        w, x = {n: torch.empty_like(t, device="meta") for n, t in case.w.items()}, case.x.to("meta")
    found = vmap(grad(case.loss, (0, 1)))(w, x)
    assert found[0]["weight"].shape == case.w["weight"].shape
    assert found[1].shape == x.shape
    assert vmap(case.outputs)(w, x).shape == vmap(case.outputs)(case.w, case.x).shape


def test_half_precision_layers_compute_in_it():
    case, doubles = Case("padded", torch.float32), Case("padded")
    with torch.autocast("cpu", torch.bfloat16):
        y = vmap(case.outputs)(case.w, case.x)
        theirs = functional_call(case.theirs, {name: t[0] for name, t in case.w.items()}, (case.x[0],))
        assert vmap(doubles.outputs)(doubles.w, doubles.x).dtype == torch.float64
    assert y.dtype == theirs.dtype == torch.bfloat16
    close(y[0].float(), theirs.float(), 2**-7)


@pytest.fixture
def timings(monkeypatch, tmp_path):
    """Seconds of each formulation in place of the clock's, and how often they were asked for."""
    timed_formulations._fastest.cache_clear()
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    seconds, asked = {"each": 3.0, "grouped": 1.0, "unfold": 2.0}, []

    def measured(call, device, best):
        call()
        asked.append(list(FORMULATIONS)[len(asked) % len(FORMULATIONS)])
        return seconds[asked[-1]]

    monkeypatch.setattr(timed_formulations, "_seconds", measured)
    yield seconds, asked
    timed_formulations._fastest.cache_clear()


def test_each_shape_is_timed_once_on_a_machine_and_the_fastest_way_taken(timings, tmp_path):
    seconds, asked = timings
    case = Case("padded")

    def made():
        timed_formulations._fastest.cache_clear()  # as in another process, which reads what was written down
        with Calls() as calls:
            vmap(case.outputs)(case.w, case.x)
        return calls.made[-1]

    assert made() == ("aten.convolution", B)  # grouped: one call for the batch of all
    assert len(asked) == 3
    (found,) = json.loads((tmp_path / "convolutions.json").read_text()).values()
    assert found == seconds
    seconds["each"] = 0.5
    assert made() == ("aten.convolution", B)
    assert len(asked) == 3
    (tmp_path / "convolutions.json").write_text("{")
    assert made() == ("vfl.each_convolution", C)
    assert len(asked) == 6


def test_what_cannot_be_computed_here_is_not_chosen(timings, monkeypatch):
    def refuse(*_):
        raise RuntimeError("not enough memory")

    broken = FORMULATIONS["grouped"]._replace(outputs=refuse)
    monkeypatch.setitem(FORMULATIONS, "grouped", broken)
    case = Case("padded")
    close(vmap(case.outputs)(case.w, case.x), case.by_loop(case.w, case.x)[0])


def test_large_convolutions_are_timed_with_few_clients(timings):
    names = []
    layer = functionalize(nn.Conv2d(64, 64, 3, padding=1))
    w, x = torch.zeros(9, 64, 64, 3, 3), torch.zeros(9, 1, 64, 4, 4)
    vmap(lambda w, x: functional_call(layer, {"weight": w, "bias": w[:, 0, 0, 0]}, (x,)))(w, x)
    names = list(json.loads((choices.folder() / "convolutions.json").read_text()))
    assert "[8, 1, 64, 4, 4]" in names[0]


class Net(nn.Module):
    """A user's module, which reads its layer, hangs a hook on it, and changes it afterwards."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3)
        self.layer.padding, self.layer.stride = 1, 2
        self.layer.register_forward_hook(lambda layer, given, y: 2 * y)
        self.own = Own(2, 2, 1)

    def forward(self, x):
        assert isinstance(self.layer, nn.Conv2d)
        return self.own(self.layer(x)).mean((2, 3)) * self.layer.out_channels


class Own(nn.Conv2d):
    """A subclass, which may do anything."""

    def forward(self, x):
        return super().forward(x).sin()


def test_users_layers_stay_what_they_were():
    torch.manual_seed(0)
    task = vfl.task(Net(), convolution="each", dtype=torch.float64)
    other = vfl.task(Net(), convolution="grouped", dtype=torch.float64)
    assert task.names == other.names == ("layer.weight", "layer.bias", "own.weight", "own.bias")
    x = torch.stack([task.x, 2 * task.x, -task.x])
    images, labels = torch.randn(C, B, 1, 6, 6, dtype=torch.float64), torch.tensor([[0, 1]] * C)

    def gradient(x, images, labels, task):
        batch = vfl.Batch(images, labels, torch.ones(B, dtype=torch.bool), vfl.random.key(0))
        return task.grad_fn(x, batch, ())[0]

    found = vmap(lambda *mine: gradient(*mine, task))(x, images, labels)
    close(found, torch.stack([gradient(x[c], images[c], labels[c], task) for c in range(C)]))
    close(found, vmap(lambda *mine: gradient(*mine, other))(x, images, labels))


def test_an_unknown_formulation_is_a_usage_error():
    with pytest.raises(UsageError, match=r"unknown convolution 'group'; did you mean 'grouped'\?"):
        vfl.task(nn.Conv2d(1, 1, 1), convolution="group")
