"""Matrix products by the faster of torch's two CPU libraries, found by timing each shape of a program once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

WORTH = 1.1  # how much faster oneDNN must be to replace torch's own choice
LARGE = 2.0**21
TRIES = 7

aten = torch.ops.aten
_library = torch.library.Library("vfl", "FRAGMENT")
_library.define("onednn_mm(Tensor a, Tensor b) -> Tensor")


def onednn_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b by oneDNN, for float32 matrices [m, k] and [k, n] on the CPU."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


# Not a `torch.library.custom_op`, whose checks would cost as much as a small product.
_library.impl("onednn_mm", onednn_mm, "CPU")
_library.impl("onednn_mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")


def faster_products(module: GraphModule) -> GraphModule:
    """The program with `aten.mm` replaced by oneDNN's where that is measurably faster here; in place."""
    if not torch.backends.mkldnn.is_available():
        return module
    found: dict[Any, bool] = {}
    for node in module.graph.nodes:
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, left, right = cast("tuple[Node, ...]", node.args)
        a, b = (cast("Tensor", factor.meta["val"]) for factor in (left, right))
        if a.device.type != "cpu" or a.dtype != torch.float32 or a.shape[0] * a.shape[1] * b.shape[1] < LARGE:
            continue
        shape = (a.shape, a.stride(), b.shape, b.stride())
        if shape not in found:
            a, b = (torch.empty_strided(t.shape, t.stride()).fill_(1.0) for t in (a, b))
            found[shape] = _seconds(onednn_mm, a, b) * WORTH < _seconds(torch.mm, a, b)
        if found[shape]:
            with module.graph.inserting_before(node):
                product = module.graph.call_function(torch.ops.vfl.onednn_mm.default, (left, right))
                if bias:
                    product = module.graph.call_function(aten.add.Tensor, (product, bias[0]))
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.recompile()
    return module


def _seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        product(a, b)
        times.append(time.perf_counter() - started)
    return min(times)
