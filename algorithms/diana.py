"""DIANA (Mishchenko et al., arXiv 1901.09269; for any unbiased compressor Horváth et al. 1904.05115).

N clients, S the cohort (the papers ask everyone: S = N), a ≤ 1/(1 + ω) the step of the shifts.
Client: it sends mᵢ = C(gᵢ − hᵢ) with gᵢ its gradient at x;   hᵢ ← hᵢ + a mᵢ.
Server: g = h + mean_S mᵢ,   h ← h + a |S|/N mean_S mᵢ,   x ← x − γ g. It sends x.
So h stays the mean of all clients' hᵢ, whoever takes part.
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
    h: Tensor  # [D] the mean shift, (1/N) Σ hᵢ
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


class Payload(NamedTuple):
    """What the server takes from a client's message."""

    m: Tensor  # [D] C(gᵢ − hᵢ)
    change: vfl.Tree  # [D] of hᵢ where it is not a·m for everyone, else (); the server can tell it from m


@dataclass(frozen=True, kw_only=True)
class Diana(ShiftedGradient):
    """DIANA: compressed differences to learned shifts, which reach the solution (Mishchenko et al., 1901.09269)."""

    shift_step: float | None = None
    """Step size a of the shifts, above 0 and at most 1; by default 1/(1 + ω), the largest that theory allows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift_step is not None and not 0 < self.shift_step <= 1:
            raise vfl.UsageError(f"shift-step must be above 0 and at most 1, not {self.shift_step}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task and N = population clients. Raises UsageError for a biased compressor."""
        trainer = self.trainer(task)
        omega = self.unbiased(trainer)
        a = 1 / (1 + omega) if self.shift_step is None else self.shift_step

        def init_server(x: Tensor) -> Server:
            return Server(x, x.new_zeros(x.shape), trainer.server.init(x), x.new_zeros(()))

        def init_client(x: Tensor) -> Shift:
            return init_shift(self, x)

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            (x, h), bits = trainer.send((server.x, server.h if self.corrected else ()), key)
            return vfl.Broadcast(Sent(x, h, trainer.rate(server.t)), bits)

        def client_update(
            sent: Sent, client: Shift, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, Shift, vfl.Metrics]:
            correction = sent.h - client.h if self.corrected else None
            g, metrics = local_gradient(trainer, vfl.ModelAndRate(sent.x, sent.lr), batches, correction)
            (m, change, bits), client = difference(trainer.compressor, g, client, a, key)
            return vfl.Message(Payload(m, change), trainer.weight(batches), bits), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            m, change = mean.payload
            x, opt = trainer.server_step(-(server.h + m), server.opt, server.x, server.t)
            h = server.h + mean.clients / population * (a * m if self.shifts == "zero" else change)
            return Server(x, h, opt, server.t + 1), {}

        return vfl.Algorithm(init_server, init_client, broadcast, client_update, server_update, late="whole")

    def step_size(self, smoothness: Smoothness, task: vfl.Task, population: int, clients: int | None = None) -> float:
        """For μ > 0 and convex fᵢ, γ = 1/(L_max(1 + 6ω/N)) (Gorbunov, Hanzely & Richtárik 1905.11261, on DIANA).

        For μ = 0, γ = 1/(10 L √(1 + ω/N)(2 + ω)) (Horváth et al. 1904.05115, Theorem 4 with one example a client).
        Both ask all clients: raises UsageError for a sample.
        """
        if clients not in (None, population):
            raise vfl.UsageError(
                f"diana's theorems ask all {population} clients, not {clients}; cofig has one for samples"
            )
        omega = self.unbiased(self.trainer(task))
        if smoothness.mu > 0:
            return 1 / (smoothness.L_max * (1 + 6 * omega / population))
        return 1 / (10 * smoothness.L * math.sqrt(1 + omega / population) * (2 + omega))
