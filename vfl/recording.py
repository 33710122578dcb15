"""A function's operators, as they ran once.

`make_fx` finds the same, but makes a fake tensor for each result and loads half a compiler: a second at the least and a
millisecond for each operator, where this takes a hundredth. Here, code takes the ways that it takes eagerly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten


def record(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> tuple[GraphModule, list[Tensor]]:
    """The operators that the function called for these inputs, and its results; `val` of a node's `meta` is its form.

    Raises RuntimeError where it looks at a value, which for other inputs may be another one.
    """
    mode = _Recorder()
    for i, tensor in enumerate(inputs):
        mode.made(tensor, mode.graph.placeholder(f"input_{i}"))
    with mode:
        results = function(*inputs)
    mode.graph.output([mode.node(result) for result in results])
    return GraphModule(mode.constants, mode.graph), results


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.graph, self.constants = Graph(), torch.nn.Module()
        self._nodes = WeakIdKeyDictionary()  # by the tensors that there are

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator loads the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            raise RuntimeError("what it computes depends on a value")
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self.node, (args, kwargs))
        node = self.graph.call_function(func, args, kwargs)
        if isinstance(found, Tensor):
            self.made(found, node)
        else:
            for i, each in enumerate(found or ()):
                if isinstance(each, Tensor):
                    self.made(each, self.graph.call_function(operator.getitem, (node, i)))
        return found

    def made(self, tensor: Tensor, node: Node) -> None:
        """From here on, the tensor is this node's result."""
        node.meta["val"] = form(tensor)
        self._nodes[tensor] = node

    def node(self, tensor: Tensor) -> Node:
        """The node whose result the tensor is; one that nothing here has made stays what it is."""
        if tensor not in self._nodes:
            name = f"constant_{sum(1 for _ in self.constants.buffers())}"
            self.constants.register_buffer(name, tensor)
            self.made(tensor, self.graph.get_attr(name))
        return self._nodes[tensor]


def form(tensor: Tensor) -> Tensor:
    """The tensor without its values."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def reduce_to_forms(module: GraphModule) -> None:
    """Makes every `val` of a program a form; those of make_fx are fake tensors, each in a world of its own."""
    for node in module.graph.nodes:
        value = getattr(module, node.target) if node.op == "get_attr" else node.meta.get("val")
        if isinstance(value, Tensor):
            node.meta["val"] = form(value)
