"""FRECON (Zhao, Burlachenko, Li & Richtárik, arXiv 2112.13097, Algorithm 2). N clients, S the cohort.

Client: with gᵢ(x) its gradient at x, on the same examples for both models, it sends
    uᵢ = C(gᵢ(x) − hᵢ),   qᵢ = C(gᵢ(x) − gᵢ(x_prev));   hᵢ ← hᵢ + a uᵢ with a = 1/(1 + ω).
Server: g ← mean_S qᵢ + (1 − λ) g + λ (h + mean_S uᵢ),   h ← h + (a/N) Σ_S uᵢ,   x_prev ← x,   x ← x − γ g.
The first round has no g yet, and so λ = 1. It sends x, and x_prev too unless all clients took part in the last round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import vfl
from vfl.compressed import Shift, ShiftedGradient, Smoothness, difference, init_shift, local_gradient


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    previous: Tensor  # [D] the model before
    g: Tensor  # [D] the estimate of the gradient
    h: Tensor  # [D] the mean shift, (1/N) Σ hᵢ
    held: Tensor  # bool [] whether all clients hold the previous model
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


class Sent(NamedTuple):
    """What the server sends."""

    x: Tensor  # [D]
    previous: Tensor  # [D]
    h: vfl.Tree  # [D] where local steps are corrected, else ()
    lr: Tensor  # [] η of this round


class Payload(NamedTuple):
    """What the server takes from a client's message."""

    u: Tensor  # [D] C(gᵢ − hᵢ)
    q: Tensor  # [D] C(gᵢ(x) − gᵢ(x_prev))
    change: vfl.Tree  # [D] of hᵢ where it is not a·u for everyone, else (); the server can tell it from u


@dataclass(frozen=True, kw_only=True)
class Frecon(ShiftedGradient):
    """FRECON: COFIG with a recursive estimate of the gradient (Zhao et al., 2112.13097)."""

    lam: float | None = None
    """Weight λ of the fresh estimate, above 0 and at most 1; by default |S|/(2(1 + ω)N), as theory has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.uncompressed_downlink()
        if self.lam is not None and not 0 < self.lam <= 1:
            raise vfl.UsageError(f"lam must be above 0 and at most 1, not {self.lam}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task and N = population clients. Raises UsageError for a biased compressor."""
        trainer = self.trainer(task)
        omega = self.unbiased(trainer)
        a = 1 / (1 + omega)
        task.refuse_private(self.method)

        def init_server(x: Tensor) -> Server:
            g, h, held = torch.zeros_like(x), torch.zeros_like(x), torch.ones((), dtype=torch.bool, device=x.device)
            return Server(x, x, g, h, held, trainer.server.init(x), x.new_zeros(()))

        def init_client(x: Tensor) -> Shift:
            return init_shift(self, x)

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            h = server.h if self.corrected else ()
            bits = vfl.float_bits((server.x, h)) + vfl.float_bits(server.previous) * ~server.held
            return vfl.Broadcast(Sent(server.x, server.previous, h, trainer.rate(server.t)), bits)

        def client_update(
            sent: Sent, client: Shift, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, Shift, vfl.Metrics]:
            u_key, q_key = vfl.random.split(key).unbind()
            correction = sent.h - client.h if self.corrected else None
            g, metrics = local_gradient(trainer, vfl.ModelAndRate(sent.x, sent.lr), batches, correction)
            before, cost = local_gradient(trainer, vfl.ModelAndRate(sent.previous, sent.lr), batches, correction)
            (u, change, bits), client = difference(trainer.compressor, g, client, a, u_key)
            q, q_bits = trainer.compressor.compress(g - before, q_key)
            metrics = metrics._replace(gradients=metrics.gradients + cost.gradients)
            return vfl.Message(Payload(u, q, change), trainer.weight(batches), bits + q_bits), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            u, q, change = mean.payload
            share = mean.clients / population
            lam = share / (2 * (1 + omega)) if self.lam is None else self.lam
            lam = torch.where(server.t > 0, lam, 1.0).to(u.dtype)
            g = q + (1 - lam) * server.g + lam * (server.h + u)
            x, opt = trainer.server_step(-g, server.opt, server.x, server.t)
            h = server.h + share * (a * u if self.shifts == "zero" else change)
            return Server(x, server.x, g, h, mean.clients >= population, opt, server.t + 1), {}

        return vfl.Algorithm(init_server, init_client, broadcast, client_update, server_update, late="whole")

    def step_size(self, smoothness: Smoothness, task: vfl.Task, population: int, clients: int | None = None) -> float:
        """γ = 1/(L_max(1 + √(10 N)(1 + ω)/S)) (the nonconvex theorem of 2112.13097, with the default λ)."""
        omega = self.unbiased(self.trainer(task))
        return 1 / (smoothness.L_max * (1 + math.sqrt(10 * population) * (1 + omega) / (clients or population)))
