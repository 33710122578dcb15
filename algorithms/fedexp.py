"""FedExP (Jhunjhunwala et al., arXiv 2301.09604, Algorithm 1): FedAvg whose server extrapolates. S the cohort.

Client: as FedAvg; it sends Δᵢ and ‖Δᵢ‖².
Server: x ← x + γ Δ̄ with Δ̄ = mean_S Δᵢ and γ = max(1, mean_S ‖Δᵢ‖² / (2 (‖Δ̄‖² + ε))): the more the clients' changes
differ, the further it goes. The models it visits may oscillate; the paper evaluates the average of the last two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

import vfl


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


class Change(NamedTuple):
    """What a client sends."""

    delta: Tensor  # [D] change of the model
    square: Tensor  # [] its squared norm


@dataclass(frozen=True, kw_only=True)
class FedExP(vfl.LocalTraining):
    """FedExP: the server step grows with the diversity of the clients' changes (Jhunjhunwala et al., 2301.09604)."""

    eps: float = 1e-3
    """ε ≥ 0 beside the squared norm of the mean change; larger ones extrapolate less near the end."""
    weighting: Literal["examples", "uniform", "steps"] = "uniform"
    """A client's weight in both means."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.eps >= 0 and math.isfinite(self.eps)):
            raise vfl.UsageError(f"eps must be a finite number ≥ 0, not {self.eps}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""

        trainer = self.trainer(task)

        def init_server(x: Tensor) -> Server:
            return Server(x, trainer.server.init(x), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            return trainer.broadcast(server.x, server.t)

        def client_update(
            sent: vfl.ModelAndRate, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            y, metrics = trainer.train(sent, batches)
            delta = y - sent.x
            return vfl.message(Change(delta, delta.square().sum()), trainer.weight(batches)), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            delta, square = mean.payload
            norm = 2 * (delta.square().sum() + self.eps)
            gamma = (square / norm.clamp(min=1e-30)).clamp(min=1)  # where nobody moved, 0 / 0 without ε
            x, opt = trainer.server_step(gamma * delta, server.opt, server.x, server.t)
            return Server(x, opt, server.t + 1), {"extrapolation": gamma}

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update)
