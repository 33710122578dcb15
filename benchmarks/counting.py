"""How many sample-gradients a computation takes, whatever it makes of them: a part of `benchmarks.algorithms`.

Every example of a minibatch whose gradient is taken counts as one, for each client, whether or not its mask leaves it
out: under `vmap` it is computed all the same. An example that is only passed forward, as by a teacher, counts as a
third, since a gradient takes about two more passes of the same size. B: batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    maybe_get_level,
)

import vfl


class Count:
    """What a task has computed so far."""

    def __init__(self) -> None:
        self.gradients = 0  # examples
        self.passes = 0  # examples that were only passed forward

    @property
    def total(self) -> float:
        """In sample-gradients."""
        return self.gradients + self.passes / 3

    def add(self, x: Tensor, batch: vfl.Batch, gradient: bool) -> None:
        """Counts a minibatch at the model x [D], for all clients that `vmap` has together here."""
        examples = math.prod((_axes(x) | _axes(batch.x)).values()) * len(batch.mask)
        if gradient:
            self.gradients += examples
        else:
            self.passes += examples


def counted(task: vfl.Task) -> tuple[vfl.Task, Count]:
    """The task, and the count of what is called of it. Compiled programs call nothing, so they are not for counting."""
    count = Count()

    def grad_fn(x: Tensor, batch: vfl.Batch, buffers: tuple[Tensor, ...]) -> tuple[Tensor, vfl.Aux]:
        count.add(x, batch, True)
        return task.grad_fn(x, batch, buffers)

    def outputs(x: Tensor, batch: vfl.Batch, buffers: tuple[Tensor, ...], *, training: bool = False) -> Tensor:
        count.add(x, batch, _differentiated(x))
        return task.outputs(x, batch, buffers, training=training)

    def evaluate(x: Tensor, batch: vfl.Batch, buffers: tuple[Tensor, ...]) -> dict[str, Tensor]:
        count.add(x, batch, False)
        return task.evaluate(x, batch, buffers)

    return task._replace(grad_fn=grad_fn, outputs=outputs, evaluate=evaluate), count


def _axes(t: Tensor) -> dict[int, int]:
    """The sizes of the axes that `vmap` hides of a tensor, by its nesting."""
    axes = {}
    while is_functorch_wrapped_tensor(t):
        within = get_unwrapped(t)
        if is_batchedtensor(t):
            axes[maybe_get_level(t)] = within.shape[maybe_get_bdim(t)]
        t = within
    return axes


def _differentiated(x: Tensor) -> bool:
    within = any(i.key() == TransformType.Grad for i in get_interpreter_stack() or ())
    return within or (torch.is_grad_enabled() and x.requires_grad)
