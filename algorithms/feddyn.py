"""FedDyn (Acar et al., arXiv 2111.04263, Algorithm 1): dynamic regularisation. N clients, S the cohort.

Client: from y ← x, local steps on fᵢ(y) − ⟨hᵢ, y⟩ + α/2 ‖y − x‖², so along g(y) − hᵢ + α (y − x); then
    hᵢ ← hᵢ − α (y − x),
which is ∇fᵢ(y) when the steps reach the minimum; it sends Δ = y − x.
Server: h ← h − α (1/N) Σ_S Δ, so that h stays the mean of all clients' hᵢ;   x ← mean_S y − h / α.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import vfl


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    h: Tensor  # [D] (1/N) Σ hᵢ
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


@dataclass(frozen=True, kw_only=True)
class FedDyn(vfl.LocalTraining):
    """FedDyn: dynamic regularisers make the local minima agree with the global one (Acar et al., 2111.04263)."""

    alpha: float = 0.1
    """Regularisation α > 0, in the paper's experiments from 0.001 to 0.1."""
    weighting: Literal["examples", "uniform", "steps"] = "uniform"
    """A client's weight in the mean; only uniform keeps h the mean of the clients' own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise vfl.UsageError(f"alpha must be a finite number > 0, not {self.alpha}")
        if self.weighting != "uniform":
            raise vfl.UsageError(f"feddyn averages its clients uniformly, so weighting cannot be {self.weighting!r}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task and N = population clients."""

        trainer, alpha = self.trainer(task), self.alpha

        def init_server(x: Tensor) -> Server:
            return Server(x, x.new_zeros(x.shape), trainer.server.init(x), x.new_zeros(()))

        def init_client(x: Tensor) -> Tensor:
            return x.new_zeros(x.shape)

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            return trainer.broadcast(server.x, server.t)

        def client_update(
            sent: vfl.ModelAndRate, h_i: Tensor, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, Tensor, vfl.Metrics]:
            shift = torch.add(h_i, sent.x, alpha=alpha)  # what no step changes: g − hᵢ + α (y − x) in two passes
            y, metrics = trainer.train(sent, batches, lambda g, y: torch.add(g - shift, y, alpha=alpha))
            delta = y - sent.x
            return vfl.message(delta, trainer.weight(batches)), torch.sub(h_i, delta, alpha=alpha), metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            delta: Tensor = mean.payload
            h = server.h - alpha * mean.clients / population * delta
            x, opt = trainer.server_step(delta - h / alpha, server.opt, server.x, server.t)
            return Server(x, h, opt, server.t + 1), {}

        return vfl.Algorithm(init_server, init_client, broadcast, client_update, server_update, late="whole")
