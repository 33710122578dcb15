"""Functions of many clients' tensors by torch's fused library calls, where `vmap` would take them apart.

Under `vmap` with weights of each client's own, torch computes a normalization by a dozen passes over the activations,
for which its library has one call a client. An `Operation` has rules of its own for `vmap` and `grad`. C: clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    _unwrap_for_grad,
    _wrap_for_grad,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
    unwrap_if_dead,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter, temporarily_pop_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.func import vjp, vmap
from torch.fx.experimental.proxy_tensor import get_proxy_mode


class Operation(NamedTuple):
    """A function of tensors, of C clients each [C, ...], in calls that see plain tensors and may look at their values.

    Of its outputs the first alone has a gradient, with respect to the first inputs.
    """

    inputs: int  # how many
    forward: Callable[..., tuple[Tensor, ...]]  # (*inputs) → outputs
    backward: Callable[..., tuple[Tensor, ...]]  # (the first output's gradient, *inputs, *other outputs) → gradients
    formula: Callable[..., Tensor]  # one client's first output, in operations that torch can differentiate twice


def available(x: Tensor) -> bool:
    """Whether operations serve a tensor here: on a CPU, eagerly, and under no transforms but `vmap` and `grad`."""
    known = (TransformType.Vmap, TransformType.Grad)
    if any(i.key() not in known for i in get_interpreter_stack() or ()):
        return False
    if get_proxy_mode() is not None or torch.is_autocast_enabled("cpu"):
        return False
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def watched(x: Tensor) -> bool:
    """Whether operators on x are seen by anything else: a transform, a trace, a mode, or autograd."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or get_proxy_mode() is not None
        or (x.requires_grad and torch.is_grad_enabled())
    )


def vmapped() -> bool:
    """Whether there is a client axis that this code does not see."""
    return any(i.key() == TransformType.Vmap for i in get_interpreter_stack() or ())


def apply(operation: Operation, *inputs: Tensor) -> tuple[Tensor, ...]:
    """One client's outputs, under any nesting of `vmap` and `grad`."""
    return _call(_Forward(operation, 0), *inputs)


def at_once(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """`function` of tensors which may all have further axes in front, of the same sizes, called with those of `vmap`.

    So many clients cost its operators once, without vmap's rules for each of them, and it may change in place what it
    has made. It may consist of any operators: other transforms see these.
    """
    if torch.compiler.is_compiling():  # Dynamo knows vmap itself, not what is below
        return function(*inputs)
    if (transform := _innermost()) is None or transform.key() != TransformType.Vmap:
        return function(*inputs)
    return _without_vmap(transform, inputs, lambda mapped, *front: at_once(function, *front))


def each(function: Callable[..., tuple[Tensor, ...]], *stacked: Tensor) -> tuple[Tensor, ...]:
    """A function of one client's tensors for clients' [C, ...], one after the other."""
    C = len(stacked[0])
    if C == 1:
        return tuple(o[None] for o in function(*(t[0] for t in stacked)))
    made: tuple[Tensor, ...] = ()
    for c, mine in enumerate(zip(*(t.unbind() for t in stacked), strict=True)):
        found = function(*mine)
        made = made or tuple(o.new_empty(C, *o.shape) for o in found)
        for all_of_them, o in zip(made, found, strict=True):
            all_of_them[c] = o  # at once, so that the next client's lies in the same memory, and in the cache
    return made


class _Forward(NamedTuple):
    """An operation's outputs for tensors that have so many client axes in front."""

    operation: Operation
    axes: int

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _over_clients(self.operation.forward, self.axes, inputs)

    def gradient(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], by: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        return _call(_Backward(*self), by[0], *inputs, *outputs[1:])


class _Backward(NamedTuple):
    """The same for its gradients."""

    operation: Operation
    axes: int

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _over_clients(self.operation.backward, self.axes, inputs)

    def gradient(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], by: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        # Of a gradient, which few ask for: as torch finds it from the formula.
        n = len(outputs)
        real, others = inputs[: 1 + n], inputs[1 + n : 1 + self.operation.inputs]

        def pulled(u: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            real, others = tensors[:n], tensors[n:]
            return vjp(lambda *real: self.operation.formula(*real, *others), *real)[1](u)

        for _ in range(self.axes):
            pulled = vmap(pulled)
        return vjp(lambda *real: pulled(*real, *others), *real)[1](tuple(by))


def _over_clients(
    function: Callable[..., tuple[Tensor, ...]], axes: int, inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """A function of C clients' tensors for tensors with any number of client axes."""
    if axes == 1:
        return function(*inputs)
    if axes == 0:
        return tuple(o[0] for o in function(*(t[None] for t in inputs)))
    clients = inputs[0].shape[:axes]
    return tuple(o.unflatten(0, clients) for o in function(*(t.flatten(0, axes - 1) for t in inputs)))


# What follows does what `torch.autograd.Function` with a vmap rule would, in a fraction of the time of each call.


def _call(call: _Forward | _Backward, *inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(unwrap_if_dead(t) for t in inputs)
    if (transform := _innermost()) is None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return _record(call, *inputs)
        return call.compute(*inputs)
    if transform.key() != TransformType.Vmap:
        return _record(call, *inputs)
    return _without_vmap(
        transform, inputs, lambda mapped, *front: _call(call._replace(axes=call.axes + mapped), *front)
    )


def _innermost() -> Any | None:
    """The transform that sees an operator first."""
    return peek_interpreter_stack()


def _without_vmap(
    transform: Any, inputs: Sequence[Tensor], then: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `then(whether there is a client axis, *inputs with it in front)` gives outside of this `vmap`."""
    level = transform.level()
    pairs = [_unwrap_batched(t, level) for t in inputs]
    with temporarily_pop_interpreter_stack():
        size = next((t.shape[dim] for t, dim in pairs if dim is not None), None)
        if size is None:
            return then(False, *inputs)
        outputs = then(True, *(_in_front(t, dim, size) for t, dim in pairs))
    return tuple(_add_batch_dim(o, 0, level) for o in outputs)


def _in_front(t: Tensor, dim: int | None, size: int) -> Tensor:
    if dim is None:
        return t.expand(size, *t.shape)
    return t.movedim(dim, 0) if dim else t  # an operator less


def _record(call: _Forward | _Backward, *inputs: Tensor) -> tuple[Tensor, ...]:
    with enable_single_level_autograd_function():
        return cast(Any, _Recorded).apply(call, *inputs)


class _Recorded(_SingleLevelFunction):
    """A call with its gradients, under one level of `grad` or none."""

    @staticmethod
    def forward(call: _Forward | _Backward, *inputs: Tensor) -> tuple[Tensor, ...]:
        if peek_interpreter_stack() is None:
            return call.compute(*inputs)
        transform = retrieve_current_functorch_interpreter()
        level = transform.level()
        inputs = tuple(_unwrap_for_grad(t, level) for t in inputs)
        with torch.enable_grad(), transform.lower():  # for the levels below to record it, too
            outputs = _call(call, *inputs)
        return tuple(_wrap_for_grad(o, level) for o in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.given = len(tensors)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, outputs = ctx.saved_tensors[: ctx.given], ctx.saved_tensors[ctx.given :]
        found = ctx.call.gradient(inputs, outputs, grad_outputs)
        return None, *found, *(None,) * (ctx.given - len(found))
