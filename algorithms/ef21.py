"""EF21 (Richtárik, Sokolov & Fatkhullin, arXiv 2106.05203, Algorithm 2). N clients, S the cohort.

Client: it sends cᵢ = C(∇fᵢ − gᵢ), C contractive, with ∇fᵢ its gradient at x;   gᵢ ← gᵢ + cᵢ.
Server: g ← g + (1/N) Σ_S cᵢ, so that g stays the mean of all N gᵢ;   x ← x − γ g. It sends x.
With a sample of the clients this is EF21-PP (Fatkhullin et al., 2110.03294). Starting from gᵢ = 0, the first message is
the papers' gᵢ⁰ = C(∇fᵢ(x⁰)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

import vfl
from vfl.compressed import Sent, Shift, ShiftedGradient, Smoothness, difference, init_shift, local_gradient


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    g: Tensor  # [D] the estimate of the gradient, (1/N) Σ gᵢ
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


@dataclass(frozen=True, kw_only=True)
class EF21(ShiftedGradient):
    """EF21: error feedback for biased compressors, as a compressed difference (Richtárik et al., 2106.05203)."""

    compressor: str = "top_k:0.2"
    """How clients compress what they send: a contraction, as top_k:0.2, rank_k:2, sign or natural."""

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task and N = population clients. Raises UsageError for C that is no contraction."""
        trainer = self.trainer(task)
        self.contractive(trainer)

        def init_server(x: Tensor) -> Server:
            return Server(x, x.new_zeros(x.shape), trainer.server.init(x), x.new_zeros(()))

        def init_client(x: Tensor) -> Shift:
            return init_shift(self, x)

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            (x, g), bits = trainer.send((server.x, server.g if self.corrected else ()), key)
            return vfl.Broadcast(Sent(x, g, trainer.rate(server.t)), bits)

        def client_update(
            sent: Sent, client: Shift, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, Shift, vfl.Metrics]:
            correction = sent.h - client.h if self.corrected else None
            gradient, metrics = local_gradient(trainer, vfl.ModelAndRate(sent.x, sent.lr), batches, correction)
            (c, _, bits), client = difference(trainer.compressor, gradient, client, 1.0, key)
            return vfl.Message(c, trainer.weight(batches), bits), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            g = server.g + mean.clients / population * mean.payload
            x, opt = trainer.server_step(-g, server.opt, server.x, server.t)
            return Server(x, g, opt, server.t + 1), {}

        return vfl.Algorithm(init_server, init_client, broadcast, client_update, server_update, late="whole")

    def step_size(self, smoothness: Smoothness, task: vfl.Task, population: int, clients: int | None = None) -> float:
        """γ = 1/(L + L̃ √(β/θ)), θ = 1 − √(1 − α), β = (1 − α)/θ (2106.05203, Theorem 1).

        For clients that take part with probability p = S/N, θ becomes pθ − (1 − p)ρ, and β becomes
        βp + (1 + 1/ρ)(1 − p), for any ρ > 0 (2110.03294, Theorem 7, all probabilities p); here ρ = pθ/(2(1 − p)).
        """
        root = math.sqrt(1 - self.contractive(self.trainer(task)))
        theta, p = 1 - root, (clients or population) / population
        B = beta = root**2 / theta
        if p < 1:
            rho = p * theta / (2 * (1 - p))
            theta, B = p * theta / 2, beta * p + (1 + 1 / rho) * (1 - p)
        return 1 / (smoothness.L + smoothness.L_tilde * math.sqrt(B / theta))
