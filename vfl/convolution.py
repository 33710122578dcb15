"""Convolutions of many clients at once, each with weights of its own, in whichever way is fastest here.

Under `vmap`, torch makes one grouped convolution of them, which on a CPU can take several times as long as a library
call for each client; for other shapes and devices it is the other way round. So the convolution, and each of its
derivatives, is here one operation with a `vmap` rule of its own, computed by that one of the `FORMULATIONS` which a
timing of these very shapes has found to be the fastest. Letters as in `vfl.formulations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    _unwrap_for_grad,
    _wrap_for_grad,
    get_interpreter_stack,
    peek_interpreter_stack,
    unwrap_if_dead,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional

from vfl.formulations import ALONE, FORMULATIONS, Geometry, Product
from vfl.timed_formulations import fastest

Wanted = Literal["auto", "each", "grouped", "unfold"]
"""A formulation, or the fastest of them."""


class _ClientConvolution(nn.modules.conv._ConvNd):
    """A convolution whose weights may be one client's of many."""

    wanted: Wanted = "auto"
    plain: Callable[..., Tensor]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # torch's `forward` calls it
        stride, dilation = (_numbers(option, weight.dim() - 2) for option in (self.stride, self.dilation))
        x, padding = _padded(self, input, weight, dilation)
        n, k = tuple(x.shape[2 - weight.dim() :]), tuple(weight.shape[2:])
        geometry = Geometry(n, k, stride, padding, dilation, self.groups)
        return convolution(x, weight, bias, geometry, self.wanted, self.plain)


class _ClientConv1d(_ClientConvolution, nn.Conv1d):
    plain = staticmethod(functional.conv1d)


class _ClientConv2d(_ClientConvolution, nn.Conv2d):
    plain = staticmethod(functional.conv2d)


class _ClientConv3d(_ClientConvolution, nn.Conv3d):
    plain = staticmethod(functional.conv3d)


def choose_formulation(layer: nn.Module, wanted: Wanted) -> None:
    """Lets a convolution compute many clients' that way; one of a subclass, or a transposed one, stays as it is."""
    kinds: dict[type, type[_ClientConvolution]] = {
        nn.Conv1d: _ClientConv1d, nn.Conv2d: _ClientConv2d, nn.Conv3d: _ClientConv3d
    }  # fmt: skip
    if type(layer) in kinds:
        layer.__class__ = kinds[type(layer)]  # which keeps all that the user has put on it
        assert isinstance(layer, _ClientConvolution)
        layer.wanted = wanted


def _padded(
    layer: nn.modules.conv._ConvNd, x: Tensor, w: Tensor, dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The inputs with what must be put around them first, and the zeros on either side that are left to add."""
    none = (0,) * len(dilation)
    if layer.padding_mode != "zeros":
        return functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), none
    if not isinstance(layer.padding, str):
        return x, _numbers(layer.padding, len(dilation))
    if layer.padding == "valid":
        return x, none
    both = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]  # 'same'
    odd = [p % 2 for p in reversed(both)]  # what an even kernel needs after the inputs, last dimension first
    x = functional.pad(x, [p for after in odd for p in (0, after)]) if any(odd) else x
    return x, tuple(p // 2 for p in both)


def _numbers(option: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """One for each dimension, as torch reads what a user may have put into a layer."""
    numbers = (option,) if isinstance(option, int) else tuple(option)
    return numbers * dimensions if len(numbers) == 1 else numbers


def convolution(
    x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, wanted: Wanted, plain: Callable[..., Tensor]
) -> Tensor:
    """One client's outputs [B, O, *m] of x [B, I, *n], w [O, I/G, *k] and b [O], under any transforms of torch's.

    Without any, and under others than `vmap` and `grad`, that is `plain`: torch's own convolution.
    """
    stack, batched = get_interpreter_stack(), x.dim() == 2 + len(geometry.kernel)
    known = (TransformType.Vmap, TransformType.Grad)
    if not stack or any(i.key() not in known for i in stack) or not batched or x.is_complex():
        return plain(x, w, b, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)  # as torch casts for its own, but for float64
        x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    return product("outputs", geometry, wanted, x, w, b)


def product(
    which: Product, geometry: Geometry, wanted: Wanted, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The product of the factors a and b; all tensors may have a client axis in front."""
    # A `Function` with a rule for vmap would do the same through torch's general machinery, in ten times the time. Like
    # there, whatever a `grad` that is over by now has left around a tensor comes off first.
    a, b, bias = unwrap_if_dead(a), unwrap_if_dead(b), None if bias is None else unwrap_if_dead(bias)
    if peek_interpreter_stack() is None:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, bias)):
            return _record(which, geometry, wanted, a, b, bias)
        return _compute(which, geometry, wanted, a, b, bias)
    transform = retrieve_current_functorch_interpreter()
    if transform.key() != TransformType.Vmap:
        return _record(which, geometry, wanted, a, b, bias)
    level = transform.level()
    (a, a_dim), (b, b_dim) = _unwrap_batched(a, level), _unwrap_batched(b, level)
    bias, bias_dim = (None, None) if bias is None else _unwrap_batched(bias, level)
    with transform.lower():
        if a_dim is None and b_dim is None and bias_dim is None:
            return product(which, geometry, wanted, a, b, bias)
        found, dim = _mapped(which, geometry, wanted, a, b, bias, (a_dim, b_dim, bias_dim))
    return _add_batch_dim(found, dim, level)


def _record(which: Product, geometry: Geometry, wanted: Wanted, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    with enable_single_level_autograd_function():
        return cast(Any, _Recorded).apply(which, geometry, wanted, a, b, bias)


def _mapped(
    which: Product,
    geometry: Geometry,
    wanted: Wanted,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    dims: Sequence[int | None],
) -> tuple[Tensor, int]:
    """The products over an axis that lies at `dims` of the three tensors, and where it lies in the result."""
    a_dim, b_dim, bias_dim = dims
    n = next(t.shape[dim] for t, dim in zip((a, b, bias), dims, strict=True) if t is not None and dim is not None)
    stacked = a.dim() - (a_dim is not None) == 3 + len(geometry.kernel)  # there is a client axis already
    if which != "weights" and a_dim is not None and b_dim is None and bias_dim is None:
        # All share the weights: they are one client with all the examples.
        batch = int(stacked)
        found = product(which, geometry, wanted, a.movedim(a_dim, batch).flatten(batch, batch + 1), b, bias)
        return found.unflatten(batch, (n, found.shape[batch] // n)), batch

    def clients(t: Tensor, dim: int | None) -> Tensor:
        t = t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1) if stacked else t

    offset = None if bias is None else clients(bias, bias_dim)
    found = product(which, geometry, wanted, clients(a, a_dim), clients(b, b_dim), offset)
    return found.unflatten(0, (n, len(found) // n)) if stacked else found, 0


class _Recorded(_SingleLevelFunction):
    """The product with its derivatives, under one level of `grad` or none."""

    @staticmethod
    def forward(
        which: Product, geometry: Geometry, wanted: Wanted, a: Tensor, b: Tensor, bias: Tensor | None
    ) -> Tensor:
        if peek_interpreter_stack() is None:
            return _compute(which, geometry, wanted, a, b, bias)
        transform = retrieve_current_functorch_interpreter()
        level = transform.level()
        a, b = _unwrap_for_grad(a, level), _unwrap_for_grad(b, level)
        bias = None if bias is None else _unwrap_for_grad(bias, level)
        with torch.enable_grad(), transform.lower():  # for the levels below to record it, too
            found = product(which, geometry, wanted, a, b, bias)
        return _wrap_for_grad(found, level)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.which, ctx.geometry, ctx.wanted, a, b, _ = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (u,), (a, b) = grad_outputs, ctx.saved_tensors
        for_a, for_b = {
            "outputs": (("inputs", u, b), ("weights", u, a)),
            "inputs": (("outputs", u, b), ("weights", a, u)),
            "weights": (("outputs", b, u), ("inputs", a, u)),
        }[ctx.which]

        def wanted(which: Product, *factors: Tensor) -> Tensor:
            return product(which, ctx.geometry, ctx.wanted, *factors)

        channels = u.dim() - len(ctx.geometry.kernel) - 1
        *_, needs_a, needs_b, needs_bias = ctx.needs_input_grad
        return (
            None, None, None,
            wanted(*for_a) if needs_a else None,
            wanted(*for_b) if needs_b else None,
            u.flatten(channels + 1).sum(-1).sum(channels - 1) if needs_bias else None,  # in two steps: half the time
        )  # fmt: skip


def _compute(which: Product, geometry: Geometry, wanted: Wanted, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The product of plain tensors."""
    if a.dim() == 2 + len(geometry.kernel):
        return ALONE.product(which, geometry, a, b, bias)
    name = fastest(which, geometry, a, b, bias) if wanted == "auto" else wanted
    return FORMULATIONS[name].product(which, geometry, a, b, bias)
