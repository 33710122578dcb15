"""Ways to compute the convolutions of many clients, each with weights of its own, and their derivatives.

Letters: C clients, B batch, I and O channels in and out, G groups, n [d] the inputs' size, m [d] the outputs', k [d]
the kernel's, for d = 1, 2 or 3 dimensions. Tensors: x [C, B, I, *n], w [C, O, I/G, *k], b [C, O] and g [C, B, O, *m],
the gradient of the outputs y.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten

Product = Literal["outputs", "inputs", "weights"]
"""What two of x, w and g determine.

The outputs y are bilinear in x and w, so Σ g·y is linear in each of x, w and g, and its derivative for one of the
three is a product of the other two: of x and w, the outputs y; of g and w, the gradient of the inputs; of g and x, that
of the weights. Their derivatives are the same three products, so that there are derivatives of every order.
"""


@dataclass(frozen=True)  # no NamedTuple, which vmap would take for a tree of numbers
class Geometry:
    """What decides a convolution beside its tensors; d numbers each, but for the groups."""

    inputs: tuple[int, ...]  # n
    kernel: tuple[int, ...]  # k
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # zeros on either side
    dilation: tuple[int, ...]
    groups: int

    @property
    def outputs(self) -> tuple[int, ...]:
        """m = ⌊(n + 2 padding − dilation (k − 1) − 1) / stride⌋ + 1."""
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in self.by_dimension())

    def by_dimension(self) -> list[tuple[int, int, int, int, int]]:
        """(n, k, stride, padding, dilation) of each dimension."""
        return list(zip(self.inputs, self.kernel, self.stride, self.padding, self.dilation, strict=True))


class Outputs(Protocol):
    """y [C, B, O, *m], without bias where b is None."""

    def __call__(self, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, /) -> Tensor: ...


class Derivative(Protocol):
    """The gradient of Σ g·y for one factor, from g and the other one."""

    def __call__(self, g: Tensor, other: Tensor, geometry: Geometry, /) -> Tensor: ...


class Formulation(NamedTuple):
    """One way to compute the three products."""

    outputs: Outputs
    inputs: Derivative  # (g, w) → [C, B, I, *n]
    weights: Derivative  # (g, x) → [C, O, I/G, *k]

    def product(self, which: Product, geometry: Geometry, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """One of them, of its factors in the order above."""
        if which == "outputs":
            return self.outputs(a, b, bias, geometry)
        return (self.inputs if which == "inputs" else self.weights)(a, b, geometry)


# A lone client's, by the library that torch takes for them: the same tensors without their first axis.


def _library_outputs(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    return aten.convolution(x, w, b, *_options(geometry))


def _library_inputs(g: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    x = g.new_empty(len(g), w.shape[1] * geometry.groups, *geometry.inputs)  # of which only the shape matters
    return aten.convolution_backward(g, x, w, None, *_options(geometry), [True, False, False])[0]


def _library_weights(g: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    w = g.new_empty(g.shape[1], x.shape[1] // geometry.groups, *geometry.kernel)
    return aten.convolution_backward(g, x, w, None, *_options(geometry), [False, True, False])[1]


def _options(geometry: Geometry) -> tuple[Any, ...]:
    zeros = [0] * len(geometry.kernel)
    return [*geometry.stride], [*geometry.padding], [*geometry.dilation], False, zeros, geometry.groups


ALONE = Formulation(_library_outputs, _library_inputs, _library_weights)
"""An ordinary convolution: one client's, or that of all clients who share their weights."""


# Grouped: all clients in one call of the library, as groups of channels.


def _grouped_outputs(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    bias = None if b is None else b.flatten()
    return _as_clients(_library_outputs(_as_channels(x), w.flatten(0, 1), bias, _for_all(geometry, w)), len(w))


def _grouped_inputs(g: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    return _as_clients(_library_inputs(_as_channels(g), w.flatten(0, 1), _for_all(geometry, w)), len(w))


def _grouped_weights(g: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    return _library_weights(_as_channels(g), _as_channels(x), _for_all(geometry, g)).unflatten(0, (len(g), -1))


def _for_all(geometry: Geometry, t: Tensor) -> Geometry:
    return replace(geometry, groups=len(t) * geometry.groups)


def _as_channels(t: Tensor) -> Tensor:
    """[C, B, channels, ...] → [B, C · channels, ...]."""
    return t.transpose(0, 1).flatten(1, 2)


def _as_clients(t: Tensor, clients: int) -> Tensor:
    """And back."""
    return t.unflatten(1, (clients, -1)).transpose(0, 1).contiguous()


# Unfold: one batched matrix product, with a column of inputs for each output (K = I/G · k rows).


def _unfold_outputs(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    rows, columns = _rows(w, geometry.groups), _columns(x, geometry)
    y = rows @ columns if b is None else torch.baddbmm(b.reshape(*rows.shape[:2], 1), rows, columns)
    return y.reshape(*w.shape[:2], x.shape[1], *geometry.outputs).transpose(1, 2).contiguous()


def _unfold_inputs(g: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    C, B, G = len(g), g.shape[1], geometry.groups
    columns = _rows(w, G).mT @ _by_group(g, G)
    columns = columns.reshape(C, G * w.shape[2], *geometry.kernel, B, *geometry.outputs)
    columns = columns.movedim(2 + len(geometry.kernel), 1)  # [C, B, I, *k, *m]
    padded = g.new_zeros(*columns.shape[:3], *(n + 2 * p for n, _, _, p, _ in geometry.by_dimension()))
    for tap in itertools.product(*map(range, geometry.kernel)):  # each adds to every input at most once
        seen = [slice(t * d, t * d + s * (m - 1) + 1, s) for t, m, (_, _, s, _, d) in
                zip(tap, geometry.outputs, geometry.by_dimension(), strict=True)]  # fmt: skip
        padded[(..., *seen)] += columns[(slice(None), slice(None), slice(None), *tap)]
    return padded[(..., *(slice(p, p + n) for n, _, _, p, _ in geometry.by_dimension()))].contiguous()


def _unfold_weights(g: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    w = _by_group(g, geometry.groups) @ _columns(x, geometry).mT
    return w.reshape(len(g), g.shape[2], x.shape[2] // geometry.groups, *geometry.kernel)


def _columns(x: Tensor, geometry: Geometry) -> Tensor:
    """[C · G, K, B · m]: the inputs that each output sees."""
    C, B, I = x.shape[:3]  # noqa: E741
    x = functional.pad(x, [p for p in reversed(geometry.padding) for _ in range(2)])
    for i, (_, k, s, _, d) in enumerate(geometry.by_dimension()):
        x = x.unfold(3 + i, d * (k - 1) + 1, s)[..., ::d]
    dims = len(geometry.kernel)  # now [C, B, I, *m, *k]
    x = x.permute(0, 2, *range(3 + dims, 3 + 2 * dims), 1, *range(3, 3 + dims))
    G = geometry.groups
    return x.reshape(C * G, I // G * math.prod(geometry.kernel), B * math.prod(geometry.outputs))


def _by_group(t: Tensor, groups: int) -> Tensor:
    """g or y [C, B, O, *m] → [C · G, O/G, B · m]."""
    C, B, O = t.shape[:3]  # noqa: E741
    return t.transpose(1, 2).reshape(C * groups, O // groups, B * math.prod(t.shape[3:]))


def _rows(w: Tensor, groups: int) -> Tensor:
    """[C, O, I/G, *k] → [C · G, O/G, K]."""
    C, O = w.shape[:2]  # noqa: E741
    return w.reshape(C * groups, O // groups, math.prod(w.shape[2:]))


# Each: a call of the library for each client. In a traced program one operation, however many clients there are.


def _each_outputs(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    y = _no_outputs(x, w, b, geometry)
    for c, mine in enumerate(y):  # a result of its own for each, stacked in the end, would take twice the memory
        mine.copy_(_library_outputs(x[c], w[c], None if b is None else b[c], geometry))
    return y


def _each_inputs(g: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    x = _no_inputs(g, w, geometry)
    for c, mine in enumerate(x):
        mine.copy_(_library_inputs(g[c], w[c], geometry))
    return x


def _each_weights(g: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    w = _no_weights(g, x, geometry)
    for c, mine in enumerate(w):
        mine.copy_(_library_weights(g[c], x[c], geometry))
    return w


def _no_outputs(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    return x.new_empty(*x.shape[:2], w.shape[1], *geometry.outputs)


def _no_inputs(g: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    return g.new_empty(*g.shape[:2], w.shape[2] * geometry.groups, *geometry.inputs)


def _no_weights(g: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    return g.new_empty(len(g), g.shape[2], x.shape[2] // geometry.groups, *geometry.kernel)


_operations = torch.library.Library("vfl", "FRAGMENT")


def _operation(
    name: str, tensors: str, function: Callable[..., Tensor], shape: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A function of tensors and a geometry as an operation that tracing does not look into; `shape` makes its result
    without the numbers."""

    # Not a `torch.library.custom_op`, whose checks would cost as much as a small convolution.
    def with_geometry(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(*given: Any) -> Tensor:
            *factors, n, k, stride, padding, dilation, groups = given
            geometry = Geometry(tuple(n), tuple(k), tuple(stride), tuple(padding), tuple(dilation), groups)
            return call(*factors, geometry)

        return compute

    numbers = "int[] n, int[] k, int[] stride, int[] padding, int[] dilation, int groups"
    _operations.define(f"{name}({tensors}, {numbers}) -> Tensor")
    _operations.impl(name, with_geometry(function), "CompositeExplicitAutograd")
    _operations.impl(name, with_geometry(shape), "Meta")
    operation = getattr(torch.ops.vfl, name).default

    def call(*given: Any) -> Tensor:
        *factors, geometry = given
        return operation(*factors, geometry.inputs, geometry.kernel, geometry.stride, geometry.padding,
                         geometry.dilation, geometry.groups)  # fmt: skip

    return call


def _opaque(name: str, ways: Formulation) -> Formulation:
    """The same, each of the three as one operation."""
    return Formulation(
        _operation(f"{name}_convolution", "Tensor x, Tensor w, Tensor? b", ways.outputs, _no_outputs),
        _operation(f"{name}_convolution_inputs", "Tensor g, Tensor w", ways.inputs, _no_inputs),
        _operation(f"{name}_convolution_weights", "Tensor g, Tensor x", ways.weights, _no_weights),
    )


FORMULATIONS: Mapping[str, Formulation] = {
    "each": _opaque("each", Formulation(_each_outputs, _each_inputs, _each_weights)),
    "grouped": Formulation(_grouped_outputs, _grouped_inputs, _grouped_weights),
    # An operation, too: compiled, the many small ones that it consists of would take minutes.
    "unfold": _opaque("unfold", Formulation(_unfold_outputs, _unfold_inputs, _unfold_weights)),
}
