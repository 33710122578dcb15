"""FedAvg (McMahan et al., arXiv 1602.05629) with any server optimizer (FedOpt: Reddi et al., arXiv 2003.00295).

Client: y ← x, then K steps y ← y − η g(y); it sends Δ = y − x with weight n.
Server: x ← ServerOpt(x, −Σ n Δ / Σ n, γ); plain sgd with γ = 1 gives the mean of the clients' models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

import vfl


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


def fedavg(
    config: vfl.LocalTraining,
    task: vfl.Task,
    corrected: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda g, y, x: g,
) -> vfl.Algorithm:
    """FedAvg whose local steps descend `corrected(g, y, x)` where g is the gradient at the local model y."""

    trainer = config.trainer(task)

    def init_server(x: Tensor) -> Server:
        return Server(x, trainer.server.init(x), x.new_zeros(()))

    def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
        return trainer.broadcast(server.x, server.t, key)

    def client_update(
        sent: vfl.ModelAndRate, client: tuple[()], batches: vfl.Batches, key: Tensor
    ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
        y, metrics = trainer.train(sent, batches, lambda g, y: corrected(g, y, sent.x))
        return trainer.message(y - sent.x, trainer.weight(batches), key), client, metrics

    def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
        x, opt = trainer.server_step(mean.payload, server.opt, server.x, server.t)
        return Server(x, opt, server.t + 1), {}

    return trainer.aggregator.of(vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update))


@dataclass(frozen=True, kw_only=True)
class FedAvg(vfl.LocalTraining):
    """FedAvg: local SGD, the server takes the weighted mean (McMahan et al., 1602.05629)."""

    compresses: ClassVar[bool] = True
    aggregates: ClassVar[bool] = True

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""
        return fedavg(self, task)


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """FedAvg with server momentum (Hsu et al., 1909.06335)."""

    server_optimizer: str = "sgd:momentum=0.9"
    """Server optimizer on the pseudo-gradient."""


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedAvg):
    """FedAvg with Adagrad on the server, τ = 1e-3 (Reddi et al., 2003.00295, Algorithm 2)."""

    server_lr: float = 0.1
    """Server step size."""
    server_optimizer: str = "adagrad:eps=1e-3,initial_v=1e-6"
    """Server optimizer on the pseudo-gradient."""


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedAvg):
    """FedAvg with Adam on the server, without bias correction, τ = 1e-3 (Reddi et al., 2003.00295, Algorithm 2)."""

    server_lr: float = 0.01
    """Server step size."""
    server_optimizer: str = "adam:b2=0.99,eps=1e-3,bias_correction=false,initial_v=1e-6"
    """Server optimizer on the pseudo-gradient."""


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAvg):
    """FedAvg with Yogi on the server, τ = 1e-3 (Reddi et al., 2003.00295, Algorithm 2)."""

    server_lr: float = 0.01
    """Server step size."""
    server_optimizer: str = "yogi:b2=0.99"
    """Server optimizer on the pseudo-gradient."""
