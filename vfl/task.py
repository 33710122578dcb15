"""A learning problem as pure functions of one flat vector. D parameters, B batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

from vfl.layers import KeyedDropout, MaskedBatchNorm, functionalize

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [B, ...], targets [B, ...]) → one loss an example [B]."""


class Batch(NamedTuple):
    """A minibatch; rows whose mask is false are padding and count for nothing."""

    x: Tensor  # [B, ...] model inputs
    y: Tensor  # [B, ...] targets
    mask: Tensor  # [B] bool
    key: Tensor  # [] random key of this batch (dropout)


class Aux(NamedTuple):
    """What a gradient brings along."""

    loss: Tensor  # [] sum of the losses of the batch's examples
    examples: Tensor  # [] how many there were
    buffers: tuple[Tensor, ...]  # the module's buffers after the forward pass


GradFn = Callable[[Tensor, Batch, tuple[Tensor, ...]], tuple[Tensor, Aux]]
"""(x [D], batch, buffers) → (gradient [D] of the batch's mean loss at x, aux)."""


class Task(NamedTuple):
    """A module and a loss, as functions of the flat parameter vector x [D]."""

    x: Tensor  # [D] the module's initial parameters
    buffers: tuple[Tensor, ...]  # the module's initial buffers
    grad_fn: GradFn
    evaluate: Callable[[Tensor, Batch, tuple[Tensor, ...]], dict[str, Tensor]]  # metric name → one value an example [B]
    names: tuple[str, ...]  # the parameters' names, in the order of x
    shapes: tuple[tuple[int, ...], ...]  # and their shapes
    buffer_names: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        """Entries of x that belong to each named parameter."""
        return [math.prod(shape) for shape in self.shapes]

    def parameters(self, x: Tensor) -> dict[str, Tensor]:
        """The named parameters in the flat vector x [..., D], as views."""
        # One split, not one slice a tensor: the slices' gradients would each be a vector of D entries.
        parts = x.split(self.sizes, dim=-1)
        return {
            n: p.unflatten(-1, s) if s else p.squeeze(-1)
            for n, p, s in zip(self.names, parts, self.shapes, strict=True)
        }

    def state_dict(self, x: Tensor, buffers: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What `module.load_state_dict` of the original module takes."""
        state = self.parameters(x) | dict(zip(self.buffer_names, buffers, strict=True))
        return {name: value.detach().clone().contiguous() for name, value in state.items()}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy an example [B], in nats: outputs [B, classes], or [B, T, classes] (mean over T)."""
    losses = functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.reshape(targets.shape[0], -1).mean(1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error an example [B], summed over the outputs."""
    return 0.5 * (outputs - targets.reshape(outputs.shape)).square().flatten(1).sum(1)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the target's [B]; the share of positions for sequences [B, T]."""
    return (outputs.argmax(-1) == targets).to(outputs.dtype).reshape(targets.shape[0], -1).mean(1)


def task(
    module: nn.Module,
    loss: Loss = cross_entropy,
    metrics: Mapping[str, Loss] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """A task from any module and any loss; the module itself is copied and left alone.

    `metrics` are evaluated beside the loss, one value an example; the default is accuracy under cross-entropy.
    Frozen parameters (`requires_grad` false) stay constants outside x. Batch norm ignores padding, and dropout
    draws from the batch's key.
    """
    if metrics is None:
        metrics = {"accuracy": accuracy} if loss is cross_entropy else {}
    module = functionalize(copy.deepcopy(module)).to(device, dtype).train()
    frozen = copy.deepcopy(module).eval()
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to train")
    masks = [f"{n}.mask".lstrip(".") for n, m in module.named_modules() if isinstance(m, MaskedBatchNorm)]
    keys = [f"{n}.key".lstrip(".") for n, m in module.named_modules() if isinstance(m, KeyedDropout)]
    buffers = {n: b.detach() for n, b in module.named_buffers() if n not in {*masks, *keys}}
    names, shapes = tuple(trained), tuple(tuple(p.shape) for p in trained.values())
    x0 = torch.cat([p.reshape(-1) for p in trained.values()])

    def forward(net: nn.Module, x: Tensor, batch: Batch, buffers: tuple[Tensor, ...]) -> tuple[Tensor, tuple]:
        # Layers may write buffers in place, which vmap allows only on tensors of its own.
        state = {n: b.clone() for n, b in zip(buffer_names, buffers, strict=True)}
        injected = dict.fromkeys(masks, batch.mask) | dict.fromkeys(keys, batch.key)
        call = made.parameters(x) | state | injected
        outputs = functional_call(net, call, (batch.x,))
        return outputs, tuple(call[n].detach() for n in buffer_names)

    def mean_loss(x: Tensor, batch: Batch, buffers: tuple[Tensor, ...]) -> tuple[Tensor, Aux]:
        outputs, after = forward(module, x, batch, buffers)
        total = torch.where(batch.mask, loss(outputs, batch.y), 0).sum()
        examples = batch.mask.sum()
        return total / examples.clamp(min=1), Aux(total.detach(), examples, after)

    def evaluate(x: Tensor, batch: Batch, buffers: tuple[Tensor, ...]) -> dict[str, Tensor]:
        outputs, _ = forward(frozen, x, batch, buffers)
        return {"loss": loss(outputs, batch.y)} | {n: m(outputs, batch.y) for n, m in metrics.items()}

    buffer_names = tuple(buffers)
    made = Task(x0, tuple(buffers.values()), grad(mean_loss, has_aux=True), evaluate, names, shapes, buffer_names)
    return made
