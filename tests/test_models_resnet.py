"""ResNet-18: its size and stages, its forward pass against one written from the state dict, and clients under vmap."""

import math

import pytest
import torch
from helpers import CLASSES, SIZES, assert_same, packed, run
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

import vfl
from algorithms.fedavg import FedAvg
from vfl.models import model
from vfl.task import Batch

F64 = torch.float64
NORMS = ("group", "batch")


def small(norm: str, width: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(f"resnet18:width={width},norm={norm}", (3, 8, 8), CLASSES).to(F64)


def by_hand(module: nn.Module, x: Tensor, groups: int) -> Tensor:
    """The forward pass with group norm, from the tensors in the order of the state dict alone."""
    tensors = iter(module.state_dict().values())

    def conv_norm(x: Tensor, stride: int, padding: int) -> Tensor:
        x = functional.conv2d(x, next(tensors), stride=stride, padding=padding)
        weight, bias = next(tensors), next(tensors)
        parts = x.unflatten(1, (groups, -1))
        centred = parts - parts.mean((2, 3, 4), keepdim=True)
        normal = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
        return normal * weight[:, None, None] + bias[:, None, None]

    x = conv_norm(x, 1, 1).clamp(min=0)
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            y = conv_norm(x, stride, 1).clamp(min=0)
            y = conv_norm(y, 1, 1)
            x = (y + (conv_norm(x, stride, 0) if stride == 2 else x)).clamp(min=0)
    outputs = x.mean((2, 3)) @ next(tensors).T + next(tensors)
    assert next(tensors, None) is None
    return outputs


@pytest.mark.parametrize(
    ("spec", "count"),
    [("resnet18", 11_173_962), ("resnet18:norm=batch", 11_173_962), ("resnet18:groups=32", 11_173_962),
     ("resnet18:16", 701_466)],
)  # fmt: skip
def test_resnet18_has_the_papers_number_of_parameters(spec: str, count: int) -> None:
    assert sum(p.numel() for p in model(spec, (3, 32, 32), 10).parameters()) == count


def test_the_stages_double_the_channels_and_halve_the_image() -> None:
    module, shapes = model("resnet18:width=2", (3, 32, 32), 10), []
    for child in module.children():
        child.register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    stages = [(2, 32, 32)] * 2 + [(4, 16, 16)] * 2 + [(8, 8, 8)] * 2 + [(16, 4, 4)] * 2
    assert shapes == [(2, 32, 32)] * 3 + stages + [(16, 1, 1), (16,), (10,)]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_forward_pass_is_the_papers_with_group_norm(groups: int) -> None:
    torch.manual_seed(0)
    module = model(f"resnet18:width=4,groups={groups}", (3, 12, 9), 5).to(F64)
    for parameter in module.parameters():  # the norms' weights and biases too, which begin as ones and zeros
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 3, 12, 9, dtype=F64)
    torch.testing.assert_close(module(x), by_hand(module, x, groups), rtol=1e-9, atol=1e-10)


def test_convolutions_start_with_he_et_als_variance() -> None:
    torch.manual_seed(0)
    for layer in model("resnet18", (3, 32, 32), 10).modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 30_000:
            fan_out = layer.out_channels * math.prod(layer.kernel_size)
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)


@pytest.mark.parametrize("norm", NORMS)
def test_clients_under_vmap_have_the_gradients_of_a_loop(norm: str) -> None:
    problem = vfl.task(small(norm), dtype=F64)
    C, B, draw = 3, 4, torch.Generator().manual_seed(1)
    x = problem.x + 0.1 * torch.randn(C, problem.x.numel(), generator=draw, dtype=F64)
    images = torch.randn(C, B, 3, 8, 8, generator=draw, dtype=F64)
    mask = torch.arange(B) < torch.tensor([[4], [2], [3]])
    batch = Batch(images, torch.arange(C * B).view(C, B) % CLASSES, mask, torch.arange(C))
    buffers = tuple(b.expand(C, *b.shape) for b in problem.buffers)
    g, aux = vmap(problem.grad_fn)(x, batch, buffers)
    for c in range(C):
        rows = mask[c]
        module = small(norm).train()
        module.load_state_dict(problem.state_dict(x[c], problem.buffers))
        functional.cross_entropy(module(images[c][rows]), batch.y[c][rows]).backward()
        wanted = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        torch.testing.assert_close(g[c], wanted, rtol=1e-9, atol=1e-11)
        for found, (name, buffer) in zip(aux.buffers, module.named_buffers(), strict=True):
            torch.testing.assert_close(found[c], buffer, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_federated_rounds_under_vmap_equal_the_loop(norm: str) -> None:
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(sum(SIZES), 3, 8, 8, generator=draw, dtype=F64)
    data = packed(images, torch.arange(len(images)) % CLASSES, SIZES)
    problem = vfl.task(small(norm, width=8), dtype=F64)
    options = {"clients_per_round": 4, "batch_size": 4, "seed": 1}
    wanted = run(FedAvg(local_lr=0.05), problem, data, 2, execution="loop", **options)
    assert abs(wanted["server.x"] - problem.x.numpy()).max() > 1e-3
    for chunk in (2, 4):
        found = run(FedAvg(local_lr=0.05), problem, data, 2, chunk=chunk, **options)
        assert_same(found, wanted, 1e-8, f"chunk {chunk}")


@pytest.mark.parametrize(
    ("spec", "shape", "says"),
    [
        ("resnet18:norm=bach", (3, 32, 32), "unknown norm of resnet18 'bach'; did you mean 'batch'?"),
        ("resnet18:width=3", (3, 32, 32), "width must be a multiple of groups and both at least 1, not 3 and 2"),
        ("resnet18:groups=0", (3, 32, 32), "width must be a multiple of groups and both at least 1, not 64 and 0"),
        ("resnet18:width=0,norm=batch", (3, 32, 32), "both at least 1, not 0 and 2"),
        ("resnet18", (3, 32, 7), "resnet18: needs images of at least 8×8 pixels, not 32×7"),
        ("resnet18", (80,), "resnet18: needs images [channels, height, width], not inputs of shape [80]"),
    ],
)
def test_resnet18_refuses_what_it_cannot_be(spec: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(vfl.UsageError) as error:
        model(spec, shape, 10)
    assert says in str(error.value)
