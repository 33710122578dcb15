"""Ditto (Li et al., arXiv 2012.04221, Algorithm 1): FedAvg, and beside it a personal model near the global one.

Client: y ← x, K steps y ← y − η g(y), and it sends Δ = y − x, as in FedAvg; its own model vᵢ takes K steps on the same
minibatches, v ← v − η (g(v) + λ (v − x)), and never leaves it. With λ = 0 that is training alone.
Server: FedAvg's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import vfl
from algorithms.fedavg import Server, fedavg


@dataclass(frozen=True, kw_only=True)
class Ditto(vfl.LocalTraining):
    """Ditto: personal models held near the global one by a proximal term (Li et al., 2012.04221)."""

    lam: float = 0.1
    """Proximal weight λ ≥ 0 of the personal models; 0: each client trains alone, beside FedAvg."""

    compresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lam >= 0 and math.isfinite(self.lam)):
            raise vfl.UsageError(f"lam must be a finite number ≥ 0, not {self.lam}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""
        trainer, plain = self.trainer(task), fedavg(self, task)

        def init_client(x: Tensor) -> vfl.Model:
            return vfl.Model(x.clone(), tuple(b.clone() for b in task.buffers))

        def client_update(
            sent: vfl.ModelAndRate, own: vfl.Model, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, vfl.Model, vfl.Metrics]:
            x, lr = sent
            message, _, metrics = plain.client_update(sent, (), batches, key)
            mine = batches._replace(buffers=own.buffers)
            v, cost = trainer.train(vfl.ModelAndRate(own.x, lr), mine, lambda g, v: g + self.lam * (v - x))
            return message, vfl.Model(v, cost.buffers), metrics._replace(gradients=metrics.gradients + cost.gradients)

        def model(server: Server, own: vfl.Model, batches: vfl.Batches) -> vfl.Model:
            return own

        return plain._replace(init_client=init_client, client_update=client_update, personal=vfl.Personal(model))
