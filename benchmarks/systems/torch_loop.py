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

from benchmarks.work import SHAPES, Arrays, Outcome, Work, examples, parameters, timed


def network(model: str, initial: Arrays) -> nn.Sequential:
    """The module of a model; it takes images [B, 1, 28, 28]."""
    layers: list[nn.Module] = []
    for shape in SHAPES[model][::2]:  # a weight; its bias follows
        if len(shape) == 4:
            layers += [nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2), nn.ReLU(), nn.MaxPool2d(2)]
        else:
            flatten = [] if any(isinstance(layer, nn.Linear) for layer in layers) else [nn.Flatten()]
            layers += [*flatten, nn.Linear(shape[1], shape[0]), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])  # no ReLU on the outputs
    for parameter, values in zip(net.parameters(), initial, strict=True):
        parameter.data.copy_(torch.from_numpy(values))
    return net


def train(net: nn.Module, x: Tensor, y: Tensor, work: Work) -> None:
    """A client's local SGD in place, on x [n, 1, 28, 28] and y [n]."""
    params = list(net.parameters())
    for _ in range(work.epochs):
        for rows in torch.randperm(len(y)).split(work.batch):
            gradient = torch.autograd.grad(functional.cross_entropy(net(x[rows]), y[rows]), params)
            with torch.no_grad():
                for p, g in zip(params, gradient, strict=True):
                    p.sub_(g, alpha=work.lr)


def tensors(work: Work) -> tuple[Tensor, Tensor]:
    """The examples: images [C, n, 1, 28, 28] and labels [C, n]."""
    x, y = map(torch.from_numpy, examples(work))
    return x[:, :, None], y


def run(model: str, work: Work) -> Outcome:
    """FedAvg; under torchrun the clients are split over the processes and one all-reduce a round sums them."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("gloo")
    net = network(model, parameters(model, work))
    seconds, server = timed(_rounds(net, *tensors(work), work, several))
    if several:
        dist.destroy_process_group()
    nn.utils.vector_to_parameters(server, net.parameters())
    return Outcome(seconds, [p.detach().numpy() for p in net.parameters()])


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
        yield server
