"""MARINA, PP-MARINA and VR-MARINA (Gorbunov, Burlachenko, Li & Richtárik, arXiv 2102.07845, Algorithms 1, 4 and 2).

N clients, S the cohort. A round is a synchronization with probability p; the first one always is.
Client: gᵢ(x) when the round is one, uncompressed; else C(gᵢ(x) − gᵢ(x_prev)), both gradients on the same examples.
Server: g ← mean_S of what came, in a synchronization, else g + mean_S;   x_prev ← x,   x ← x − γ g.
It sends x, and between synchronizations x_prev too, unless all clients took part in the last round and hold it (the
papers send everyone g in its place, from which who holds x_prev computes x).

Replicas each toss a coin of their own: they compute both kinds of round together, and each keeps what its coin says.

VR-MARINA: gᵢ is over all of the client's examples in a synchronization, over its minibatch else; with one client and no
compression it is PAGE (Li et al. 2008.10898). PP-MARINA: a synchronization asks all N clients, whatever the sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import vfl
from vfl.compressed import CompressedGradient, Smoothness, local_gradient
from vfl.local import keep_where


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    previous: Tensor  # [D] the model before
    g: Tensor  # [D] the estimate of the gradient
    sync: Tensor  # bool [] whether the coming round is a synchronization
    held: Tensor  # bool [] whether all clients hold the previous model
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


class Sent(NamedTuple):
    """What the server sends."""

    x: Tensor  # [D]
    previous: vfl.Tree  # [D]; () where the round is known to be a synchronization
    sync: vfl.Tree  # bool []; () where it is known
    lr: Tensor  # [] η of this round


def known(condition: Tensor) -> bool | None:
    """The condition's value; None under vmap over replicas, where each has its own."""
    try:
        return bool(condition)
    except RuntimeError:  # what vmap answers who asks for a value
        return None


@dataclass(frozen=True, kw_only=True)
class Marina(CompressedGradient):
    """MARINA: compressed gradient differences, now and then the whole gradient (Gorbunov et al., 2102.07845)."""

    p: float | None = None
    """Probability of a synchronization, above 0 and at most 1; by default 1/(1 + ω)."""

    whole: ClassVar[bool] = False  # whether a synchronization takes all of a client's examples
    asks_everyone: ClassVar[bool] = False  # whether a synchronization asks all clients

    def __post_init__(self) -> None:
        super().__post_init__()
        self.uncompressed_downlink()
        if self.p is not None and not 0 < self.p <= 1:
            raise vfl.UsageError(f"p must be above 0 and at most 1, not {self.p}")

    def probability(self, omega: float) -> float:
        """Of a synchronization."""
        return 1 / (1 + omega) if self.p is None else self.p

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task and N = population clients. Raises UsageError for a biased compressor."""
        trainer = self.trainer(task)
        p = self.probability(self.unbiased(trainer))
        task.refuse_private(self.method)

        def init_server(x: Tensor) -> Server:
            yes = torch.ones((), dtype=torch.bool, device=x.device)
            return Server(x, x, x.new_zeros(x.shape), yes, yes, trainer.server.init(x), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            lr, bits = trainer.rate(server.t), vfl.float_bits(server.x)
            both = bits * (2 - server.held.to(bits.dtype))
            # Rounds of the two kinds are programs of their own: as one, each would compute both kinds' gradients.
            sync = known(server.sync)
            if sync is None:
                sent = Sent(server.x, server.previous, server.sync, lr)
                return vfl.Broadcast(sent, torch.where(server.sync, bits, both))
            return vfl.Broadcast(Sent(server.x, () if sync else server.previous, (), lr), bits if sync else both)

        def synchronize(sent: Sent, batches: vfl.Batches) -> tuple[vfl.Message, vfl.Metrics]:
            if self.whole:
                g, metrics = vfl.full_gradient(task.grad_fn, sent.x, batches)
            else:
                g, metrics = local_gradient(trainer, vfl.ModelAndRate(sent.x, sent.lr), batches)
            return vfl.message(g, trainer.weight(batches)), metrics

        def difference(sent: Sent, batches: vfl.Batches, key: Tensor) -> tuple[vfl.Message, vfl.Metrics]:
            g, metrics = local_gradient(trainer, vfl.ModelAndRate(sent.x, sent.lr), batches)
            before, cost = local_gradient(trainer, vfl.ModelAndRate(sent.previous, sent.lr), batches)
            metrics = metrics._replace(gradients=metrics.gradients + cost.gradients)
            return trainer.message(g - before, trainer.weight(batches), key), metrics

        def client_update(
            sent: Sent, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            if isinstance(sent.previous, tuple):
                message, metrics = synchronize(sent, batches)
            elif isinstance(sent.sync, tuple):
                message, metrics = difference(sent, batches, key)
            else:
                message, metrics = keep_where(sent.sync, synchronize(sent, batches), difference(sent, batches, key))
            return message, client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            g = torch.where(server.sync, mean.payload, server.g + mean.payload)
            x, opt = trainer.server_step(-g, server.opt, server.x, server.t)
            sync, held = vfl.random.bernoulli(key, p, ()), mean.clients >= population
            return Server(x, server.x, g, sync, held, opt, server.t + 1), {}

        def everyone(server: Server) -> Tensor:
            return server.sync

        return vfl.Algorithm(
            init_server,
            vfl.stateless,
            broadcast,
            client_update,
            server_update,
            everyone if self.asks_everyone else None,
            late="never",
        )

    def step_size(self, smoothness: Smoothness, task: vfl.Task, population: int, clients: int | None = None) -> float:
        """γ = 1/(L̃(1 + √((1 − p)ω/(pN)))) (2102.07845, Theorem 2.1). Raises UsageError for a sample of the clients."""
        if clients not in (None, population):
            raise vfl.UsageError(
                f"marina's theorem asks all {population} clients, not {clients}; ppmarina has one for samples"
            )
        omega = self.unbiased(self.trainer(task))
        p = self.probability(omega)
        return 1 / (smoothness.L_tilde * (1 + math.sqrt((1 - p) * omega / (p * population))))


@dataclass(frozen=True, kw_only=True)
class PPMarina(Marina):
    """PP-MARINA: a sample of the clients, all of them to synchronize (2102.07845)."""

    asks_everyone: ClassVar[bool] = True

    def step_size(self, smoothness: Smoothness, task: vfl.Task, population: int, clients: int | None = None) -> float:
        """γ = 1/(L̃(1 + √((1 − p)(1 + ω)/(pS)))) (2102.07845, Theorem 4.1)."""
        omega = self.unbiased(self.trainer(task))
        p = self.probability(omega)
        return 1 / (smoothness.L_tilde * (1 + math.sqrt((1 - p) * (1 + omega) / (p * (clients or population)))))


@dataclass(frozen=True, kw_only=True)
class VRMarina(Marina):
    """VR-MARINA: minibatches, all examples to synchronize (2102.07845); PAGE for N = 1."""

    p: float | None = None
    """Probability of a synchronization; by default 1/(1 + ω). The paper's is at most b/(m + b) for b of m examples."""

    whole: ClassVar[bool] = True

    def step_size(self, smoothness: Smoothness, task: vfl.Task, population: int, clients: int | None = None) -> float:
        """None: Theorem 3.1 of 2102.07845 needs the smoothness of single examples' losses. Raises UsageError."""
        raise vfl.UsageError(
            "vrmarina's theorem needs the smoothness of single examples' losses, which is not known; tune server-lr"
        )
