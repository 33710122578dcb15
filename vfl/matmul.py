"""Matrix products in programs by kernels of our own (matmul.cpp), where a timing found them faster here.

Letters: z products of [m, k] and [k, n] matrices; a [(z,) m, k], b [(z,) k, n], base [(z,) m, n].
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from vfl import choices, native
from vfl.errors import first_line
from vfl.recording import reduce_to_forms

log = logging.getLogger("vfl")

WORTH = 1.1  # how much faster a kernel of ours must be to replace torch's
KIND = "products"
LEAST = 2**16  # multiplications; below, calls cost more than their work
TRIES = 7

NATIVE = native.Source(
    Path(__file__).with_suffix(".cpp"),
    {"products": [*["const float*"] * 4, "const int64_t*", "float*", *["int64_t"] * 13]},
)

aten = torch.ops.aten
ours = torch.ops.vfl
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
VIEWS = (*RESHAPES, aten.t.default, aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default)

# Each into a dense tensor `out`; float32 on the CPU.


def product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """a b."""
    return _call(a, b, None, None, None, out)


def product_of_rows(table: Tensor, rows: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """a b for a = table[rows], whose rows are not copied; table [N, k], rows [(z,) m]."""
    if b.stride(-2) != 1:  # whose columns would have to be neighbours
        return _call(table[rows], b, None, None, None, out)
    return _call(table, b, None, None, rows, out)


def add_product(base: Tensor, factor: Tensor, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """base + factor · (a b), where factor is a number [] or one for each product [z]: a step along a gradient."""
    return _call(a, b, base, factor, None, out)


def add_product_of_rows(base: Tensor, factor: Tensor, a: Tensor, table: Tensor, rows: Tensor, *, out: Tensor) -> Tensor:
    """The same for b = table[rows]; table [N, n], rows [(z,) k]."""
    return _call(a, table, base, factor, rows, out)


def _call(a: Tensor, b: Tensor, base: Tensor | None, factor: Tensor | None, rows: Tensor | None, out: Tensor) -> Tensor:
    """`rows` are those of a where the entries of b's columns are neighbours; else those of b."""
    *z, m, n = out.shape
    b_row, b_column = b.stride()[-2:]
    if 1 not in (b_row, b_column):
        b = b.contiguous()
        b_row, b_column = b.stride()[-2:]
    transposed = b_column != 1
    if transposed and a.stride(-1) != 1:
        a = a.contiguous()
    a_row, a_column = a.stride()[-2:]
    base_next = factor_next = 0
    if base is not None and factor is not None:
        if base.stride()[-2:] != (n, 1):
            base = base.contiguous()
        if z:
            base_next, factor_next = base.stride(0), factor.stride(0) if factor.dim() else 0
    if rows is not None:
        rows = rows.contiguous()
    kernel = NATIVE.found("products")
    assert kernel is not None  # as `faster_products` has seen
    kernel(
        a.data_ptr(), b.data_ptr(), 0 if base is None else base.data_ptr(), 0 if factor is None else factor.data_ptr(),
        0 if rows is None else rows.data_ptr(), out.data_ptr(),
        z[0] if z else 1, m, b.shape[-2] if rows is None or transposed else rows.shape[-1], n,
        a.stride(0) if a.dim() == 3 else 0, a_row, a_column,
        b.stride(0) if b.dim() == 3 else 0, b_column if transposed else b_row,
        base_next, factor_next, transposed, torch.get_num_threads(),
    )  # fmt: skip
    return out


Shape = Callable[..., Sequence[Any]]  # of the output, by the inputs' shapes

OPERATORS: dict[str, tuple[Callable[..., Tensor], str, Shape]] = {
    "product": (product, "Tensor a, Tensor b", lambda a, b: [*a[:-1], b[-1]]),
    "product_of_rows": (product_of_rows, "Tensor table, Tensor rows, Tensor b", lambda _, rows, b: [*rows, b[-1]]),
    "add_product": (add_product, "Tensor base, Tensor factor, Tensor a, Tensor b", lambda base, *_: base),
    "add_product_of_rows": (
        add_product_of_rows, "Tensor base, Tensor factor, Tensor a, Tensor table, Tensor rows", lambda base, *_: base
    ),
}  # fmt: skip
"""torch.ops.vfl's: the kernel of each, its arguments and its output's shape."""


def _register(name: str, kernel: Callable[..., Tensor], arguments: str, shape: Shape) -> None:
    """Not as a `torch.library.custom_op`, whose checks would cost as much as a small product."""

    def empty(*inputs: Tensor) -> Tensor:
        return inputs[0].new_empty(shape(*(t.shape for t in inputs)))

    _library.define(f"{name}({arguments}) -> Tensor")
    _library.impl(name, empty, "Meta")
    _library.impl(name, lambda *inputs: kernel(*inputs, out=empty(*inputs)), "CPU")


_library = torch.library.Library("vfl", "FRAGMENT")
for _name, _operator in OPERATORS.items():
    _register(_name, *_operator)


@functools.cache
def _lowered() -> None:
    """Lets programs call the kernels directly, without torch's dispatcher, which takes as long as a small product."""
    from torch._inductor.ir import FixedLayout
    from torch._inductor.lowering import register_lowering
    from torch._inductor.select_algorithm import ExternKernelChoice, realize_inputs

    def lower(name: str, kernel: Callable[..., Tensor], shape: Shape) -> None:
        choice = ExternKernelChoice(kernel, name=f"vfl_{name}")

        def lowering(*inputs: Any) -> Any:
            size = shape(*(x.get_size() for x in inputs))
            layout = FixedLayout(inputs[0].get_device(), inputs[0].get_dtype(), [*size])
            return choice.bind(realize_inputs(*inputs), layout).output_node()

        register_lowering(getattr(ours, name).default, type_promotion_kind=None)(lowering)

    for name, (kernel, _, shape) in OPERATORS.items():
        lower(name, kernel, shape)


def faster_products(module: GraphModule, inputs: list[Tensor], *, lowered: bool = False) -> GraphModule:
    """The program for such inputs with its products by our kernels where those are measurably faster here; in place.

    `lowered`: torch's compiler will get it, and is told how to call them.

    A step along a product, base + factor · (a b), becomes one operation: two passes over the weights fewer. Rows taken
    from a table for products alone are no longer copied.
    """
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default)
    nodes = [node for node in module.graph.nodes if node.target in products and not node.kwargs]
    if not nodes or not all(leaf.device.type == "cpu" for leaf in inputs):
        return module
    reduce_to_forms(module)
    nodes = [node for node in nodes if _large(node)]
    if not nodes or NATIVE.found("products") is None:
        return module
    if lowered:
        try:
            _lowered()
        except Exception as error:  # of a torch whose insides differ
            log.warning(
                "torch's compiler cannot call vfl's matrix products, so its own are used (%s)", first_line(error)
            )
            return module
    for node in nodes:
        *bias, left, right = cast("tuple[Node, ...]", node.args)
        a, b = _value(left), _value(right)
        # Remembered, so that a program is the same in each process: its results, and its place in the compiler's cache.
        shapes = " ".join(f"{[*t.shape]} by {[*t.stride()]}" for t in (a, b))
        where = f"{shapes} on {choices.machine(torch.device('cpu'))}"
        if choices.fastest(KIND, where, ("torch", "vfl"), functools.partial(_measure, a, b)) == "vfl":
            _replace(node, left, right, bias)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _large(node: Node) -> bool:
    """Whether a product is of the kernels' type, and worth a call."""
    a, b = (_value(cast("Node", factor)) for factor in node.args[-2:])
    return a.dtype == torch.float32 and a.numel() * b.shape[-1] >= LEAST


def _replace(node: Node, left: Node, right: Node, bias: list[Node]) -> None:
    graph, step = node.graph, None if bias else _step(node)
    if step is None:
        gathered = _gathered(left)
        with graph.inserting_before(node):
            if gathered:
                made = graph.call_function(ours.product_of_rows.default, (*_rows(graph, *gathered, left), right))
            else:
                made = graph.call_function(ours.product.default, (left, right))
            if bias:
                made = graph.call_function(aten.add.Tensor, (made, bias[0]))
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        return
    base, _, factor = cast("tuple[Node, Node, Node]", step.args)
    shape, flat, gathered = [*_value(node).shape], [*_value(step).shape], _gathered(right)
    with graph.inserting_before(step):
        factor = graph.call_function(aten.mul.Tensor, (factor, step.kwargs.get("value", 1)))
        each = [] if _value(cast("Node", step.args[2])).numel() == 1 else [-1]
        factor = graph.call_function(aten.view.default, (factor, each))
        base = graph.call_function(aten.view.default, (graph.call_function(aten.expand.default, (base, flat)), shape))
        if gathered:
            inputs = (base, factor, left, *_rows(graph, *gathered, right))
            made = graph.call_function(ours.add_product_of_rows.default, inputs)
        else:
            made = graph.call_function(ours.add_product.default, (base, factor, left, right))
        made = graph.call_function(aten.view.default, (made, flat))
    made.meta = step.meta  # for the next step, whose base it is
    step.replace_all_uses_with(made)
    graph.erase_node(step)


def _gathered(factor: Node) -> tuple[Node, Node] | None:
    """The table and the numbers of its rows, if it is these that a factor consists of."""
    width = _value(factor).shape[-1]
    while factor.target in (*RESHAPES, aten.expand.default):
        source = cast("Node", factor.args[0])
        if _value(source).numel() != _value(factor).numel():
            return None
        factor = source
    if factor.target is not aten.embedding.default:
        return None
    table, rows = cast("tuple[Node, Node]", factor.args[:2])
    same = _value(table).shape[1] == width and _value(table).is_contiguous() and _value(rows).dtype == torch.int64
    return (table, rows) if same else None


def _rows(graph: Graph, table: Node, rows: Node, factor: Node) -> tuple[Node, Node]:
    """The inputs that stand for such a factor."""
    return table, graph.call_function(aten.reshape.default, (rows, [*_value(factor).shape[:-1]]))


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
    return {"torch": _seconds(theirs, a, b), "vfl": _seconds(ours.product, a, b) * WORTH}


def _seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    clock, times = choices.clock(torch.device("cpu")), []
    for _ in range(TRIES):
        started = clock()
        product(a, b)
        times.append(clock() - started)
    return min(times)
