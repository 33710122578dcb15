"""What `torch.func.vmap` and `torch.func.vjp` do for this library's calls, at the price of those calls alone.

Torch's own check every argument and walk several trees in each call, and keep a gradient's graph for another gradient,
which costs a small model more than its arithmetic, and a large one memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _remove_batch_dim,
    _unwrap_for_grad,
    _wrap_for_grad,
    get_interpreter_stack,
)
from torch._functorch.eager_transforms import enable_inplace_requires_grad, grad_increment_nesting
from torch._functorch.vmap import (
    lazy_load_decompositions,  # pyright: ignore[reportPrivateImportUsage]
    vmap_increment_nesting,
)
from torch.autograd.graph import _engine_run_backward

from vfl.base import Tree, tree_map


def mapped(function: Callable[[Tree], Tree], stacked: Tree, count: int) -> Tree:
    """`torch.func.vmap` of a function of one tree of tensors, each of them [count, ...]."""
    lazy_load_decompositions()
    with vmap_increment_nesting(count, "error") as level:
        outputs = function(tree_map(lambda leaf: _add_batch_dim(leaf, 0, level), stacked))
        return tree_map(lambda leaf: _remove_batch_dim(leaf, level, count, 0), outputs)


def pulled_back(
    function: Callable[[list[Tensor]], tuple[Tensor, Tree]], inputs: list[Tensor], weight: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tree]:
    """The gradients of Σ weight · values for (values, beside) = function(inputs), the values, and what came beside.

    They can be differentiated again by what `torch.func` itself transforms.
    """
    stack = get_interpreter_stack()
    if stack is None:  # autograd alone takes a third of the time
        leaves = [each.detach().requires_grad_() for each in inputs]
        with torch.enable_grad():
            values, beside = function(leaves)
        return _gradients(values, leaves, weight, False), values.detach(), beside
    again = any(transform.key() != TransformType.Vmap for transform in stack)
    with grad_increment_nesting() as level, torch.enable_grad():
        leaves = [_wrap_for_grad(each, level) for each in inputs]
        with enable_inplace_requires_grad(True):
            for leaf in leaves:
                leaf.requires_grad_()
        values, beside = function(leaves)
        found = _gradients(values, leaves, weight, again)
        return tree_map(lambda t: _unwrap_for_grad(t, level), (found, values.detach(), beside))


def _gradients(values: Tensor, leaves: list[Tensor], weight: Tensor, again: bool) -> tuple[Tensor, ...]:
    if not values.requires_grad:  # they do not depend on the inputs
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    weight = weight.to(values.dtype)
    # As `torch.autograd.grad`, whose checks load a library for symbolic shapes: a third of a second.
    found = _engine_run_backward((values,), (weight,), again, again, tuple(leaves), True, accumulate_grad=False)
    return tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True))
