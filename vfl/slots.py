"""Calls a module with tensors other than its own, at the price of a few dictionary entries.

`torch.func.functional_call` walks the whole module tree in each call, which costs a small model more than its forward
pass. A task's modules never change, so the places of their tensors are looked up once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class Stateless:
    """A module as a function of its tensors; a tensor that stands in several places (tied weights) is one."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module = module
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for layer in module.modules():
            for registry in (layer._parameters, layer._buffers):
                for key, tensor in registry.items():
                    places.setdefault(id(tensor), []).append((registry, key))
        held = dict([*module.named_parameters(), *module.named_buffers()])
        self._places = {name: places[id(held[name])] for name in names}

    def __call__(
        self, tensors: Mapping[str, Tensor], *inputs: Any, call: Callable[..., Any] = nn.Module.__call__
    ) -> tuple[Any, dict[str, Tensor]]:
        """The module's outputs with these tensors in place of its own, and what it has left in their places."""
        own = [(registry, key, registry[key]) for name in tensors for registry, key in self._places[name]]
        for name, tensor in tensors.items():
            for registry, key in self._places[name]:
                registry[key] = tensor
        try:
            outputs = call(self.module, *inputs)
            left = {name: self._places[name][0][0][self._places[name][0][1]] for name in tensors}
        finally:
            for registry, key, tensor in own:
                registry[key] = tensor
        return outputs, left
