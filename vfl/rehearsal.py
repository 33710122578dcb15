"""Server rehearsal: after each aggregation, the server trains the model on examples of its own. M examples, B batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vfl import random
from vfl.base import Algorithm, Mean, Tree, nested, with_model
from vfl.data.container import Examples, Transform, cast
from vfl.errors import UsageError
from vfl.optimizers import optimizer
from vfl.task import Batch, Task
from vfl.wrappers import Context


class Rehearsing(NamedTuple):
    """The server's state."""

    inner: Any  # the algorithm's own
    opt: Tree  # the rehearsal optimizer's memory, kept from round to round

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """After each aggregation, the server takes steps on examples that it holds (FLUTE, arXiv 2203.13789: replay)."""

    rehearsal_steps: int = 0
    """Optimizer steps that the server takes on its own examples after each aggregation; 0: none."""
    rehearsal_lr: float = 0.01
    """Step size of these steps."""
    rehearsal_optimizer: str = "sgd"
    """Their optimizer, whose memory is kept from round to round (see local-optimizer for the names)."""
    rehearsal_batch_size: int = 20
    """Examples a step, drawn without replacement from all that the server holds."""

    def __post_init__(self) -> None:
        if self.rehearsal_steps < 0:
            raise UsageError(f"rehearsal-steps must be at least 0, not {self.rehearsal_steps}")
        if not (self.rehearsal_lr >= 0 and math.isfinite(self.rehearsal_lr)):
            raise UsageError(f"rehearsal-lr must be a finite number ≥ 0, not {self.rehearsal_lr}")
        if self.rehearsal_batch_size < 1:
            raise UsageError(f"rehearsal-batch-size must be at least 1, not {self.rehearsal_batch_size}")
        optimizer(self.rehearsal_optimizer)

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The algorithm with rehearsal on the global validation set, the examples that no client holds.

        Wrapped before `Delays`, where it follows aggregations alone; around it, the server rehearses in every round.
        What is measured on that set is then measured on training examples. Raises UsageError where there is none.
        """
        if not self.rehearsal_steps:
            return algorithm
        examples, transform = context.server_examples("rehearsal needs examples on the server")
        return rehearsed(algorithm, task, examples, self, transform)


def rehearsed(
    algorithm: Algorithm, task: Task, examples: Examples, options: Rehearsal, transform: Transform = cast
) -> Algorithm:
    """The algorithm whose server takes steps on these examples [M, ...] after each of its own.

    The examples are drawn from the server's key. A module's buffers stay those that the clients average. The mean loss
    over the round's steps is reported as `rehearsal_loss`. Raises UsageError for no examples.
    """
    if not len(examples.y):
        raise UsageError("rehearsal needs at least one example on the server, and it holds none")
    held = examples.to(task.x.device)
    opt = optimizer(options.rehearsal_optimizer, task.sizes)
    size, steps = min(options.rehearsal_batch_size, len(held.y)), options.rehearsal_steps
    mask = torch.ones(size, dtype=torch.bool, device=task.x.device)

    def init_server(x: Tensor) -> Rehearsing:
        return Rehearsing(algorithm.init_server(x), opt.init(x))

    def server_update(server: Rehearsing, mean: Mean, key: Tensor) -> tuple[Rehearsing, Mapping[str, Tensor]]:
        inner, reported = algorithm.server_update(server.inner, mean, key)
        x, memory, loss = inner.x, server.opt, inner.x.new_zeros(())
        for k in range(steps):
            draw, noise = random.split(random.fold_in(random.fold_in(key, -1), k)).unbind(-1)  # no algorithm folds −1
            rows = random.choice(draw, len(held.y), size)
            batch = Batch(transform(held.x[rows], x.dtype), held.y[rows], mask, noise)
            g, aux = task.grad_fn(x, batch, task.buffers)
            x, memory = opt.step(g, memory, x, options.rehearsal_lr)
            loss = loss + aux.loss / (size * steps)
        return Rehearsing(with_model(inner, x), memory), {**reported, "rehearsal_loss": loss}

    return nested(algorithm)._replace(init_server=init_server, server_update=server_update)
