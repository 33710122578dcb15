"""Matrix products in compiled programs by kernels of our own (matmul.cpp), where a timing found them faster here.

Letters: z products of [m, k] and [k, n] matrices; a [(z,) m, k], b [(z,) k, n], base [(z,) m, n].
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from vfl import choices
from vfl.errors import first_line

log = logging.getLogger("vfl")

WORTH = 1.1  # how much faster a kernel of ours must be to replace torch's
KIND = "products"
LEAST = 2**16  # multiplications; below, calls cost more than their work
TRIES = 7

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default, aten.transpose.int,
         aten.squeeze.dim, aten.unsqueeze.default, aten.select.int)  # fmt: skip

_library = torch.library.Library("vfl", "FRAGMENT")
_library.define("product(Tensor a, Tensor b) -> Tensor")
_library.define("add_product(Tensor base, Tensor a, Tensor b, Tensor factor) -> Tensor")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of float32 matrices on the CPU."""
    return product_out(a, b, out=a.new_empty(*a.shape[:-1], b.shape[-1]))


def add_product(base: Tensor, a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """base + factor a b, where factor is a number [] or one for each product [z]; a step along a weight's gradient."""
    return add_product_out(base, a, b, factor, out=a.new_empty(*a.shape[:-1], b.shape[-1]))


def product_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """`product` into a dense tensor."""
    _call(a, b, None, None, out)
    return out


def add_product_out(base: Tensor, a: Tensor, b: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
    """`add_product` into a dense tensor."""
    _call(a, b, base, factor, out)
    return out


def _call(a: Tensor, b: Tensor, base: Tensor | None, factor: Tensor | None, out: Tensor) -> None:
    *z, m, k = a.shape
    *_, b_row, b_column = b.stride()
    if 1 not in (b_row, b_column):
        b = b.contiguous()
        *_, b_row, b_column = b.stride()
    *a_next, a_row, a_column = a.stride()
    transposed = b_column != 1
    if transposed and a_column != 1:
        a = a.contiguous()
        *a_next, a_row, a_column = a.stride()
    n = b.shape[-1]
    base_next = factor_next = 0
    if base is not None and factor is not None:
        if base.stride()[-2:] != (n, 1):
            base = base.contiguous()
        if z:
            base_next, factor_next = base.stride(0), factor.stride(0) if factor.dim() else 0
    _kernel()(
        a, b, a if base is None else base, a if factor is None else factor, out,
        z[0] if z else 1, m, k, n,
        a_next[0] if z else 0, a_row, a_column, b.stride(0) if z else 0, b_row if not transposed else b_column,
        base_next, factor_next, base is not None, transposed, torch.get_num_threads(),
    )  # fmt: skip


@functools.cache
def _kernel() -> Callable[..., None]:
    """matmul.cpp as machine code, built once on each machine by the compiler that compiled programs need anyway."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    arguments = ["const float*"] * 4 + ["float*"] + ["int64_t"] * 14
    return cast("Callable[..., None]", CppPythonBindingsCodeCache.load_pybinding(arguments, source, device_type="cpu"))


@functools.cache
def _lowered() -> None:
    """Lets programs call the kernels directly, without torch's dispatcher, which takes as long as a small product."""
    from torch._inductor.ir import FixedLayout
    from torch._inductor.lowering import register_lowering
    from torch._inductor.select_algorithm import ExternKernelChoice, realize_inputs

    def lower(target: Any, choice: Any, a: int) -> None:
        """`a` is the position of a among the operator's inputs; b follows it."""

        def lowering(*inputs: Any) -> Any:
            *left, _ = inputs[a].get_size()
            layout = FixedLayout(inputs[a].get_device(), inputs[a].get_dtype(), [*left, inputs[a + 1].get_size()[-1]])
            return choice.bind(realize_inputs(*inputs), layout).output_node()

        register_lowering(target, type_promotion_kind=None)(lowering)

    lower(torch.ops.vfl.product.default, ExternKernelChoice(product_out, name="vfl_product"), 0)
    lower(torch.ops.vfl.add_product.default, ExternKernelChoice(add_product_out, name="vfl_add_product"), 1)


# Not a `torch.library.custom_op`, whose checks would cost as much as a small product.
_library.impl("product", product, "CPU")
_library.impl("product", lambda a, b: a.new_empty(*a.shape[:-1], b.shape[-1]), "Meta")
_library.impl("add_product", add_product, "CPU")
_library.impl("add_product", lambda base, a, b, factor: a.new_empty(*a.shape[:-1], b.shape[-1]), "Meta")


def faster_products(module: GraphModule, inputs: list[Tensor]) -> GraphModule:
    """The program for such inputs with its products by our kernels where those are measurably faster here; in place.

    A step along a product, base + factor · (a b), becomes one operation: two passes over the weights fewer.
    """
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default)
    nodes = [node for node in module.graph.nodes if node.target in products and not node.kwargs]
    if not nodes or not all(leaf.device.type == "cpu" for leaf in inputs):
        return module
    try:
        _kernel()
    except Exception as error:
        log.warning("building vfl's matrix products failed, so torch's are used (%s)", first_line(error))
        return module
    _lowered()
    constants = FakeTensorMode(allow_non_fake_inputs=True)  # a traced program holds some as they are
    FakeTensorProp(module, constants).propagate(*inputs)
    for node in nodes:
        *bias, left, right = cast("tuple[Node, ...]", node.args)
        a, b = _value(left), _value(right)
        if a.dtype != torch.float32 or a.numel() * b.shape[-1] < LEAST:
            continue
        # Remembered, so that a program is the same in each process: its results, and its place in the compiler's cache.
        shapes = " ".join(f"{[*t.shape]} by {[*t.stride()]}" for t in (a, b))
        where = f"{shapes} on {choices.machine(a.device)}"
        if choices.fastest(KIND, where, ("torch", "vfl"), functools.partial(_measure, a, b)) == "vfl":
            _replace(node, left, right, bias)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _replace(node: Node, left: Node, right: Node, bias: list[Node]) -> None:
    graph, step = node.graph, None if bias else _step(node)
    if step is None:
        with graph.inserting_before(node):
            made = graph.call_function(torch.ops.vfl.product.default, (left, right))
            if bias:
                made = graph.call_function(aten.add.Tensor, (made, bias[0]))
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        return
    base, _, factor = cast("tuple[Node, Node, Node]", step.args)
    shape = _value(node).shape
    with graph.inserting_before(step):
        sign = graph.call_function(aten.mul.Tensor, (factor, step.kwargs.get("value", 1)))
        if _value(factor).numel() == 1:
            sign = graph.call_function(aten.view.default, (sign, []))
        else:
            sign = graph.call_function(aten.view.default, (sign, [-1]))
        whole = graph.call_function(aten.expand.default, (base, list(_value(step).shape)))
        whole = graph.call_function(aten.view.default, (whole, list(shape)))
        made = graph.call_function(torch.ops.vfl.add_product.default, (whole, left, right, sign))
        made = graph.call_function(aten.view.default, (made, list(_value(step).shape)))
    made.meta = step.meta  # for the next step, whose base it is
    step.replace_all_uses_with(made)
    graph.erase_node(step)


def _step(node: Node) -> Node | None:
    """The base + factor · product that is all the product is used for, if it is so."""
    dense = torch.empty(_value(node).shape, device="meta")
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in VIEWS and user.args[0] is node:
            dense = cast("Callable[..., Tensor]", user.target)(dense, *user.args[1:], **user.kwargs)
        elif user.target is aten.addcmul.default and user.args[1] is node:
            base, _, factor = (_value(cast("Node", argument)) for argument in user.args)
            z = 1 if dense.dim() == 1 else dense.shape[0]
            fits = factor.numel() == 1 or factor.shape == (z, *[1] * (dense.dim() - 1))
            same = dense.is_contiguous() and dense.shape == _value(user).shape and base.dtype == torch.float32
            return user if fits and same else None
        else:
            return None
        node = user
    return None


def _value(node: Node) -> Tensor:
    return node.meta["val"]


def _measure(a: Tensor, b: Tensor) -> dict[str, float]:
    """Seconds of a product of such factors by torch's library and by our kernels, with what these must be faster by."""
    a, b = (torch.empty_strided(t.shape, t.stride()).fill_(1.0) for t in (a, b))
    theirs = torch.bmm if a.dim() == 3 else torch.mm
    return {"torch": _seconds(theirs, a, b), "vfl": _seconds(product, a, b) * WORTH}


def _seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        product(a, b)
        times.append(time.perf_counter() - started)
    return min(times)
