"""FedNova (Wang et al., arXiv 2007.07481): normalised averaging, for clients that do unequal amounts of local work.

Client: K_i steps of sgd, with momentum and a proximal term if wanted, change the model by Δᵢ = −η Gᵢ aᵢ, where the
columns of Gᵢ are its gradients and aᵢ [K_i] how much each of them counts; it sends dᵢ = Δᵢ / ‖aᵢ‖₁ and ‖aᵢ‖₁.
Server: x ← x + γ τ_eff Σ pᵢ dᵢ with τ_eff = Σ pᵢ ‖aᵢ‖₁, where FedAvg would take Σ pᵢ Δᵢ and so let the clients with
more steps decide which objective is minimised.
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
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


class Normalised(NamedTuple):
    """What a client sends."""

    d: Tensor  # [D] Δᵢ / (η ‖aᵢ‖₁), its change by a unit of work
    tau: Tensor  # [] η ‖aᵢ‖₁, its work as it enters τ_eff (η Kᵢ with tau_eff = steps)


@dataclass(frozen=True, kw_only=True)
class FedNova(vfl.LocalTraining):
    """FedNova: clients' changes are averaged by unit of local work (Wang et al., 2007.07481)."""

    mu: float = 0.0
    """Proximal coefficient μ ≥ 0 of the local objective, as in fedprox."""
    tau_eff: Literal["norm", "steps"] = "norm"
    """Server's effective steps τ_eff: the mean of the clients' ‖aᵢ‖₁, which makes equal work FedAvg, or of their step
    counts, which makes longer steps where a proximal term shortens the local ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.mu >= 0 and math.isfinite(self.mu)):
            raise vfl.UsageError(f"mu must be a finite number ≥ 0, not {self.mu}")
        if self.tau_eff not in ("norm", "steps"):
            raise vfl.UsageError(f"tau-eff must be norm or steps, not {self.tau_eff!r}")
        if self.local_optimizer.partition(":")[0].strip() != "sgd":
            raise vfl.UsageError(
                "fednova knows how much each gradient counts for sgd alone, with momentum or without, "
                f"so local-optimizer cannot be {self.local_optimizer!r}"
            )

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""

        trainer = self.trainer(task)

        def proximal(g: Tensor, displacement: Tensor) -> Tensor:
            return g + self.mu * displacement if self.mu else g

        def work(batches: vfl.Batches, lr: Tensor) -> Tensor:
            """η ‖aᵢ‖₁ []: the local steps on K scalar problems at once, the k-th with a gradient of 1 in step k alone.

            Clipping is no part of it: a clipped gradient counts as the gradient.
            """
            a = torch.zeros(batches.longest, dtype=lr.dtype, device=lr.device)
            opt = trainer.local.init(a)
            for k, one in enumerate(torch.eye(len(a), dtype=lr.dtype, device=lr.device)):
                a, opt = trainer.local.step(proximal(one, a), opt, a, lr * (k < batches.steps))
            return a.abs().sum()

        def init_server(x: Tensor) -> Server:
            return Server(x, trainer.server.init(x), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            return trainer.broadcast(server.x, server.t)

        def client_update(
            sent: vfl.ModelAndRate, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            y, metrics = trainer.train(sent, batches, lambda g, y: proximal(g, y - sent.x))
            done = work(batches, sent.lr)
            d = (y - sent.x) / torch.where(done > 0, done, 1)  # nothing is done at rate 0
            tau = done if self.tau_eff == "norm" else sent.lr * batches.steps
            return vfl.message(Normalised(d, tau), trainer.weight(batches)), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            d, tau = mean.payload
            x, opt = trainer.server_step(tau * d, server.opt, server.x, server.t)
            return Server(x, opt, server.t + 1), {}

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update)
