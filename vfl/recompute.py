"""Activation checkpointing that works under vmap and grad: a layer forgets what it computed, and computes it again.

`torch.utils.checkpoint` works through hooks on autograd's graph, which torch.func's transforms do not run. Here a layer
is one differentiable function whose gradient keeps its inputs alone (Chen et al., arXiv 1604.06174).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfl.errors import UsageError
from vfl.layers import KeyedDropout
from vfl.slots import Stateless


class _Recomputed(torch.autograd.Function):
    """call(*tensors) → a tensor, keeping the tensors alone for the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return call(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        found = iter(_Gradient.apply(ctx.call, *grad_outputs, *tensors))
        return None, *(next(found) if tensor.is_floating_point() else None for tensor in tensors)


class _Gradient(torch.autograd.Function):
    """The gradients of the floating-point tensors, by computing again.

    A function of its own, since torch.func records what a gradient does for the gradient's own gradient, and would so
    keep the activations after all.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        return _pulled(call, *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        pull, real = _real(functools.partial(_pulled, ctx.call), *given)
        found = iter(torch.func.vjp(pull, *real)[1](grad_outputs))
        return None, *(next(found) if tensor.is_floating_point() else None for tensor in given)


def _pulled(call: Callable[..., Tensor], cotangent: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The cotangent of call's output pulled back to each of its floating-point tensors."""
    of, real = _real(call, *tensors)
    return torch.func.vjp(of, *real)[1](cotangent)


def _real(call: Callable[..., Any], *tensors: Tensor) -> tuple[Callable[..., Any], list[Tensor]]:
    """call as a function of its floating-point tensors alone, and these: token ids have no gradient."""

    def of(*some: Tensor) -> Any:
        floats = iter(some)
        return call(*(next(floats) if tensor.is_floating_point() else tensor for tensor in tensors))

    return of, [tensor for tensor in tensors if tensor.is_floating_point()]


class Forgetful:
    """What stands in for a layer's `forward`: the same outputs and gradients, in less memory and more time."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name
        self.parameters = [n for n, _ in layer.named_parameters()]
        self.stateless = Stateless(layer, self.parameters)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The layer's output. Raises UsageError where inputs or output are not tensors."""
        held = dict(self.layer.named_parameters())  # those in the layer's slots now
        if not all(isinstance(tensor, Tensor) for tensor in inputs):
            raise UsageError(f"recompute {self.name!r}: the layer must take tensors alone")
        return _Recomputed.apply(self._call, *inputs, *(held[name] for name in self.parameters))

    def _call(self, *tensors: Tensor) -> Tensor:
        given = len(tensors) - len(self.parameters)
        named = dict(zip(self.parameters, tensors[given:], strict=True))
        output = self.stateless(named, *tensors[:given], call=type(self.layer).forward)[0]
        if not isinstance(output, Tensor):
            raise UsageError(f"recompute {self.name!r}: the layer must return one tensor, not {type(output).__name__}")
        return output


def recompute(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module, whose submodules of these names (`layers.2`) compute their activations again for the gradient.

    In place. Raises UsageError for a name that no submodule has, for one within another, and for one with buffers, as
    batch norm and dropout have.
    """
    known = dict(module.named_modules())
    for name in names:
        layer = known.get(name)
        if layer is None or not name:
            shown = ", ".join(filter(None, known))
            raise UsageError(f"recompute {name!r}: the model has no such submodule; known: {shown}")
        if outer := next((other for other in names if name.startswith(f"{other}.")), None):
            raise UsageError(f"recompute {name!r}: lies within {outer!r}; name one of them")
        unused = {id(m.key) for m in layer.modules() if isinstance(m, KeyedDropout) and m.p == 0}
        if any(id(buffer) not in unused for buffer in layer.buffers()):
            raise UsageError(f"recompute {name!r}: batch norm and dropout would go on twice; name layers without them")
        layer.forward = Forgetful(layer, name)
    return module
