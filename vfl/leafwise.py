"""Keeps flat vectors in pieces inside a traced program.

Algorithms see parameters, gradients and messages as vectors of D entries. In a program, each local step would gather
the gradient's pieces into such a vector and take the new model apart again: two copies of D entries a step. This pass
carries the vectors as one piece a parameter through all that works entry by entry, and joins them only where
something needs the whole. Letters: D parameters.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from vfl.recording import form

aten = torch.ops.aten


class Pieces(NamedTuple):
    """A tensor [..., D], by pieces of its last dimension."""

    nodes: list[Node]


def leafwise(module: GraphModule, sizes: list[int]) -> GraphModule:
    """The same program, with vectors of sum(sizes) entries in pieces of these sizes wherever that saves a copy."""
    if len(sizes) == 1 or 0 in sizes:  # others leave empty pieces out, and may change their own parts in place
        return module
    rewriting = _Rewriting(sizes)
    for node in module.graph.nodes:
        rewriting.copy(node)
    rewriting.graph.eliminate_dead_code()
    return GraphModule(module, rewriting.graph)


class _Rewriting:
    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.length = sizes, sum(sizes)
        self.graph = Graph()
        self.new: dict[Node, Any] = {}  # what became of a node: a node, Pieces, or the outputs of a split
        self._split: dict[Node, Pieces] = {}
        self._joined: dict[int, Node] = {}

    def copy(self, node: Node) -> None:
        rewritten = self._rewritten(node)
        self.new[node] = self.graph.node_copy(node, self.whole) if rewritten is None else rewritten

    def whole(self, node: Node) -> Node:
        """A node of the old program as one tensor."""
        made = self.new[node]
        if isinstance(made, Pieces):
            if id(made) not in self._joined:
                self._joined[id(made)] = self._call(aten.cat.default, (made.nodes, -1), {}, _value(node))
            return self._joined[id(made)]
        return made

    def pieces(self, node: Node) -> Pieces:
        """A node [..., D] of the old program in pieces."""
        made = self.new[node]
        if isinstance(made, Pieces):
            return made
        if made not in self._split:
            parts = self.graph.call_function(aten.split_with_sizes.default, (made, self.sizes, -1))
            forms = form(_value(node)).split(self.sizes, -1)
            each = [self._call(operator.getitem, (parts, i), {}, part) for i, part in enumerate(forms)]
            self._split[made] = Pieces(each)
        return self._split[made]

    def _rewritten(self, node: Node) -> Any:
        """What an operation on pieces becomes; None: nothing special."""
        target, args = node.target, cast("Any", node.args)
        if target is aten.split_with_sizes.default and self._fits(args[0]) and list(args[1]) == self.sizes:
            return self.pieces(args[0]).nodes
        if target is operator.getitem and isinstance(self.new[args[0]], list):
            return self.new[args[0]][args[1]]
        if target is aten.cat.default and self._fits(node) and [_last(part) for part in args[0]] == self.sizes:
            return Pieces([self.whole(part) for part in args[0]])
        if not any(isinstance(self.new.get(a), Pieces) for a in node.all_input_nodes):
            return None
        if target is aten.sum.dim_IntList:
            return self._summed(node)
        if not self._fits(node):
            return None
        if target is aten.expand.default and args[1][-1] == self.length:
            return self._each(node, lambda i: (args[0], [*args[1][:-1], self.sizes[i]]))
        if target is aten.unsqueeze.default and args[1] not in (-1, _rank(args[0])):
            return self._each(node, lambda i: args)
        if target in (aten.squeeze.dim, aten.squeeze_.dim, aten.select.int) and args[1] not in (-1, _rank(args[0]) - 1):
            return self._each(node, lambda i: args)
        if target is aten.mm.default and self._fits(args[1]) and not self._fits(args[0]):  # a sum of rows by weights
            return self._each(node, lambda i: args)
        if torch.Tag.pointwise in getattr(target, "tags", ()) or target in (aten.clone.default, aten.detach.default):
            return self._each(node, lambda i: args)
        return None

    def _each(self, node: Node, arguments: Any, *, whole: bool = False) -> Pieces:
        """The operation applied to every piece, whose results have the form of the `whole` one or are its pieces."""

        def piece(i: int) -> Node:
            def convert(a: Node) -> Node:
                return self.pieces(a).nodes[i] if self._fits(a) else self.whole(a)

            args, kwargs = torch.fx.map_arg((arguments(i), node.kwargs), convert)
            result = _value(node)
            if not whole:
                result = torch.empty((*result.shape[:-1], self.sizes[i]), dtype=result.dtype, device="meta")
            return self._call(node.target, args, kwargs, result)

        return Pieces([piece(i) for i in range(len(self.sizes))])

    def _summed(self, node: Node) -> Any:
        """A sum: over the pieces as well where it runs along them."""
        source, dims = cast("Any", node.args)[:2]
        along = {d % _rank(source) for d in dims}
        if not dims or not self._fits(source):
            return None
        sums = self._each(node, lambda i: node.args, whole=_rank(source) - 1 in along)
        if _rank(source) - 1 not in along:
            return sums
        total, *rest = sums.nodes
        for part in rest:
            total = self._call(aten.add.Tensor, (total, part), {}, _value(node))
        return total

    def _call(self, target: Any, args: Any, kwargs: Any, value: Tensor) -> Node:
        """An operation whose result has the form of `value`."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node

    def _fits(self, node: Any) -> bool:
        return isinstance(node, Node) and _last(node) == self.length


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _last(node: Node) -> int | None:
    value = _value(node)
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() else None


def _rank(node: Node) -> int:
    return _value(node).dim()
