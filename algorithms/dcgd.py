"""DCGD: distributed compressed gradient descent (Khirirat et al., arXiv 1806.06573; Alistarh et al. 1610.02132).

Client: it sends C(gᵢ) with gᵢ its gradient at x.
Server: x ← x − γ mean_S C(gᵢ). It sends x.
It ends in a neighbourhood of the solution, unless the clients' gradients vanish there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

import vfl
from vfl.compressed import CompressedGradient, Smoothness, local_gradient


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


@dataclass(frozen=True, kw_only=True)
class DCGD(CompressedGradient):
    """DCGD: clients send compressed gradients (Khirirat et al., 1806.06573)."""

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task. Raises UsageError for a biased compressor."""
        trainer = self.trainer(task)
        self.unbiased(trainer)

        def init_server(x: Tensor) -> Server:
            return Server(x, trainer.server.init(x), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            return trainer.broadcast(server.x, server.t, key)

        def client_update(
            sent: vfl.ModelAndRate, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            g, metrics = local_gradient(trainer, sent, batches)
            return trainer.message(g, trainer.weight(batches), key), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            x, opt = trainer.server_step(-mean.payload, server.opt, server.x, server.t)
            return Server(x, opt, server.t + 1), {}

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update)

    def step_size(self, smoothness: Smoothness, task: vfl.Task, population: int, clients: int | None = None) -> float:
        """γ = 1/(L(1 + ω/S)): then γL(1 + ω/S) ≤ 1 in the descent lemma, up to the clients' dissimilarity."""
        omega = self.unbiased(self.trainer(task))
        return 1 / (smoothness.L * (1 + omega / (clients or population)))
