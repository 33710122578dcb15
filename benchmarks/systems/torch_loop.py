"""A plain PyTorch loop, as well as one writes it by hand: one module, clients one after the other, no overhead.

Its network and its local training also serve the peers that leave those to their users.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import work as common
from benchmarks.work import SHAPES, SIDE, SMALL, Arrays, Outcome, Shapes, Work, examples, parameters, timed


def network(model: str, initial: Arrays) -> nn.Module:
    """The module of a model; it takes what `benchmarks.work.examples` gives, small images as [B, 1, 28, 28]."""
    net = _layers(SHAPES[model]) if model in SMALL else models(model)
    for parameter, values in zip(net.parameters(), initial, strict=True):
        parameter.data.copy_(torch.from_numpy(values))
    return net


def _layers(shapes: Shapes) -> nn.Module:
    layers: list[nn.Module] = []
    for shape in shapes[::2]:  # a weight; its bias follows
        if len(shape) == 4:
            layers += [nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2), nn.ReLU(), nn.MaxPool2d(2)]
        else:
            flatten = [] if any(isinstance(layer, nn.Linear) for layer in layers) else [nn.Flatten()]
            layers += [*flatten, nn.Linear(shape[1], shape[0]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # no ReLU on the outputs


def models(model: str) -> nn.Module:
    """The module of that name as vfl has it: a plain one."""
    from vfl.models import model as made  # which the peers' environments lack

    if model == "lstm":
        return made("char_lstm", (common.POSITIONS,), common.CHARACTERS, (common.POSITIONS,))
    return made(model, (3, 32, 32) if model == "resnet18" else (1, SIDE, SIDE), common.CLASSES)


def train(net: nn.Module, x: Tensor, y: Tensor, work: Work) -> None:
    """A client's local SGD in place, on its examples x [n, ...] and y [n, ...]."""
    params = list(net.parameters())
    for _ in range(work.epochs):
        for rows in torch.randperm(len(y)).to(x.device).split(work.batch):
            loss = functional.cross_entropy(net(x[rows]).flatten(0, -2), y[rows].flatten())
            gradient = torch.autograd.grad(loss, params)
            with torch.no_grad():
                for p, g in zip(params, gradient, strict=True):
                    p.sub_(g, alpha=work.lr)


def tensors(work: Work, model: str = "cnn") -> tuple[Tensor, Tensor]:
    """The examples on their device: inputs [C, n, ...], an axis of channels among them, and labels [C, n, ...]."""
    x, y = (torch.from_numpy(array).to(work.device) for array in examples(work, model))
    return (x[:, :, None] if model in SMALL else x), y


def run(model: str, work: Work) -> Outcome:
    """FedAvg; under torchrun the clients are split over the processes and one all-reduce a round sums them."""
    from vfl.precision import tf32  # which the peers' environments lack

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("nccl" if work.device == "cuda" else "gloo")
    net = network(model, parameters(model, work)).to(work.device)
    with tf32(work.tf32):
        seconds, server = timed(_rounds(net, *tensors(work, model), work, several))
    if several:
        dist.destroy_process_group()
    nn.utils.vector_to_parameters(server, net.parameters())
    trained = [p.detach().cpu().numpy() for p in net.parameters()]
    return Outcome(seconds, trained, peak_memory=gpu_memory(work))


def gpu_memory(work: Work) -> float | None:
    """The most bytes ever allocated on the GPU; None on the CPU."""
    return float(torch.cuda.max_memory_allocated()) if work.device == "cuda" else None


def _rounds(net: nn.Module, x: Tensor, y: Tensor, work: Work, several: bool) -> Iterator[Tensor]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    torch.manual_seed(rank)
    local = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(local, net.parameters())  # the parameters are views of it from here on
    server = local.clone()
    for _ in range(work.rounds):
        total = torch.zeros_like(server)
        for c in range(rank, work.clients, world):
            local.copy_(server)
            train(net, x[c], y[c], work)
            total.add_(local, alpha=work.examples)
        if several:
            dist.all_reduce(total)
        server = total / (work.clients * work.examples)
        if work.device == "cuda":
            torch.cuda.synchronize()  # the round ends with its last kernel
        yield server
