"""q-FedAvg (Li et al., arXiv 1905.10497, Algorithm 2): minimises Σ pᵢ Fᵢ(x)^{q+1} / (q+1), so large losses count more.

Client: F = Fᵢ(x), the mean loss of all its examples at the model sent; y after local steps from x as in FedAvg; with
u = L (x − y) in the place of the gradient it sends Δᵢ = F^q u and hᵢ = q F^{q−1} ‖u‖² + L F^q.
Server: x ← x − Σ wᵢ Δᵢ / Σ wᵢ hᵢ; q = 0 is FedAvg with the same weights wᵢ.
The paper draws clients with probability pᵢ and weighs them equally; drawn uniformly, they are weighed by pᵢ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import vfl


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


class Scaled(NamedTuple):
    """What a client sends."""

    delta: Tensor  # [D] F^q u
    h: Tensor  # [] bound on the curvature of F^{q+1} / (q+1) along the way


@dataclass(frozen=True, kw_only=True)
class QFedAvg(vfl.LocalTraining):
    """q-FedAvg: clients with larger losses weigh more, for more equal ones (Li et al., 1905.10497)."""

    q: float = 1.0
    """Fairness q ≥ 0: 0 is FedAvg, and the larger, the nearer to minimising the worst client's loss."""
    lipschitz: float | None = None
    """L > 0, an estimate of the local losses' smoothness; 1/local-lr where none is given, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.q >= 0 and math.isfinite(self.q)):
            raise vfl.UsageError(f"q must be a finite number ≥ 0, not {self.q}")
        if self.lipschitz is not None and not (self.lipschitz > 0 and math.isfinite(self.lipschitz)):
            raise vfl.UsageError(f"lipschitz must be a finite number > 0, not {self.lipschitz}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""

        trainer, q = self.trainer(task), self.q

        def mean_loss(x: Tensor, batches: vfl.Batches) -> Tensor:
            """Fᵢ(x) [], in evaluation mode; kept above 0, so that its powers exist, and NaN where it is negative."""
            total = x.new_zeros(())
            for batch in batches.whole():
                losses = task.evaluate(x, batch, batches.buffers)["loss"]
                total = total + torch.where(batch.mask, losses, 0).sum()
            F = total / batches.examples.clamp(min=1)
            return torch.where(F < 0, torch.nan, F.clamp(min=torch.finfo(x.dtype).eps))

        def init_server(x: Tensor) -> Server:
            return Server(x, trainer.server.init(x), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            return trainer.broadcast(server.x, server.t)

        def client_update(
            sent: vfl.ModelAndRate, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            F = mean_loss(sent.x, batches)
            y, metrics = trainer.train(sent, batches)
            # At rate 0 nothing moves, and any L will do.
            L = 1 / torch.where(sent.lr > 0, sent.lr, 1) if self.lipschitz is None else self.lipschitz
            u = L * (sent.x - y)
            h = q * F ** (q - 1) * u.square().sum() + L * F**q
            return vfl.message(Scaled(F**q * u, h), trainer.weight(batches)), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            delta, h = mean.payload
            step = delta / torch.where(h > 0, h, 1)  # a large power of small losses may be 0 in single precision
            x, opt = trainer.server_step(-step, server.opt, server.x, server.t)
            return Server(x, opt, server.t + 1), {}

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update)
