"""FedRep (Collins et al., arXiv 2102.07078, Algorithm 1): a shared representation under personal heads.

Client: with the body φ that it was sent held fixed, its own head h takes the local steps, `head_passes` times over;
then, with h held fixed, φ takes them once; it sends the change of φ.
Server: FedAvg on φ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import vfl
from algorithms.fedper import fedper


@dataclass(frozen=True, kw_only=True)
class FedRep(vfl.LocalTraining):
    """FedRep: a head for each client on a shared body (Collins et al., 2102.07078)."""

    personal: str = "last"
    """Which parameters are the head (see fedper)."""
    head_passes: int = 1
    """How many times the head takes the round's local steps, before the body takes them once; the paper: 10."""

    compresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_passes < 1:
            raise vfl.UsageError(f"head-passes must be at least 1, not {self.head_passes}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""
        part = vfl.personal_part(task, self.personal)
        head, body = part.trainer(self, inside=True), part.trainer(self, inside=False)

        def local_steps(sent: vfl.ModelAndRate, batches: vfl.Batches) -> tuple[Tensor, vfl.Metrics]:
            x, lr = sent
            h, phi = part.split(x)
            passes: list[vfl.Metrics] = []

            def head_gradient(h: Tensor, batch: vfl.Batch, buffers: tuple) -> tuple[Tensor, vfl.Aux]:
                g, aux = task.grad_fn(part.join(h, phi), batch, buffers)
                return part.split(g)[0], aux

            for _ in range(self.head_passes):
                h, cost = vfl.descend(head_gradient, h, batches, head.local, lr, max_norm=self.clip_norm)
                batches = batches._replace(buffers=cost.buffers)
                passes.append(cost)

            def body_gradient(phi: Tensor, batch: vfl.Batch, buffers: tuple) -> tuple[Tensor, vfl.Aux]:
                g, aux = task.grad_fn(part.join(h, phi), batch, buffers)
                return part.split(g)[1], aux

            phi, cost = vfl.descend(body_gradient, phi, batches, body.local, lr, max_norm=self.clip_norm)
            gradients = sum((each.gradients for each in passes), cost.gradients)
            return part.join(h, phi), cost._replace(gradients=gradients)

        return fedper(self, part, local_steps)
