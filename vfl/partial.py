"""A part of a model that never leaves the clients. D parameters, P of them in the part."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vfl.errors import UsageError
from vfl.names import select
from vfl.task import Task
from vfl.training import LocalTraining, Trainer


class Part(NamedTuple):
    """A part of a model's parameters and buffers, and how to take the model apart and put it together."""

    task: Task
    inside: tuple[bool, ...]  # of each parameter
    buffers: tuple[bool, ...]  # of each buffer

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The entries [P] of x [D] that are in the part, and the others [D − P]."""
        # One split, and pieces as long as the parameters: what programs can do without a copy (`vfl.leafwise`).
        pieces = list(zip(x.split(self.task.sizes), self.inside, strict=True))
        mine, others = ([piece for piece, inside in pieces if inside is wanted] for wanted in (True, False))
        return torch.cat(mine or [x[:0]]), torch.cat(others or [x[:0]])

    def join(self, inside: Tensor, outside: Tensor) -> Tensor:
        """x [D] of the entries in the part [P] and the others [D − P]."""
        mine, others = (
            iter(entries.split([s for s, i in zip(self.task.sizes, self.inside, strict=True) if i is wanted]))
            for entries, wanted in ((inside, True), (outside, False))
        )
        return torch.cat([next(mine) if i else next(others) for i in self.inside])

    def own_buffers(self, buffers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Those of the module's buffers that are in the part."""
        return tuple(b for b, inside in zip(buffers, self.buffers, strict=True) if inside)

    def join_buffers(self, own: tuple[Tensor, ...], buffers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The module's buffers, with `own` for those in the part."""
        mine = iter(own)
        return tuple(next(mine) if inside else b for b, inside in zip(buffers, self.buffers, strict=True))

    def trainer(self, config: LocalTraining, inside: bool) -> Trainer:
        """The options at work on vectors of the part's entries alone, or of the others."""
        named = zip(self.task.names, self.task.shapes, self.inside, strict=True)
        kept = [(name, shape) for name, shape, i in named if i is inside]
        x = self.split(self.task.x)[0 if inside else 1]
        return config.trainer(self.task._replace(
            x=x, names=tuple(name for name, _ in kept), shapes=tuple(shape for _, shape in kept)
        ))  # fmt: skip


def personal_part(task: Task, patterns: str) -> Part:
    """The part of the model that stays on the clients.

    Raises UsageError where a pattern means nothing in this model, and where nothing is left to be shared.
    """
    chosen = select(patterns, task.names, task.buffer_names, task.norms, "personal")
    part = Part(task, tuple(n in chosen for n in task.names), tuple(n in chosen for n in task.buffer_names))
    if all(part.inside):
        raise UsageError(f"personal {patterns!r} keeps all parameters on the clients; at least one must be shared")
    return part
