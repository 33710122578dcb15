"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378, Algorithm 1). N clients, S the cohort, K local steps.

Client: y ← x, then K steps y ← y − η (g(y) − cᵢ + c); then its new control variate is
    option I:   cᵢ⁺ = ∇fᵢ(x),   option II:   cᵢ⁺ = cᵢ − c + (x − y)/(K η);
it sends Δy = y − x and Δc = cᵢ⁺ − cᵢ.
Server: x ← x + γ mean_S Δy,   c ← c + |S|/N mean_S Δc, so that c stays the mean of all clients' cᵢ.

With a compressor C it sends C(Δy) and C(Δc), each with a draw of its own, and both sides move by a·C(Δc), so that c
stays that mean. For an unbiased C, a = 1/(1 + ω), DIANA's step (Horváth et al. 1904.05115), since with a = 1 the cᵢ
would run away for ω > 1; for a biased one a = 1, as in EF21 (Richtárik et al. 2106.05203).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

import vfl


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    c: Tensor  # [D] the control variate, (1/N) Σ cᵢ
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done


class Sent(NamedTuple):
    """What the server sends."""

    x: Tensor  # [D]
    c: Tensor  # [D]
    lr: Tensor  # [] η of this round


class Delta(NamedTuple):
    """What a client sends, compressed."""

    y: Tensor  # [D] change of the model
    c: Tensor  # [D] change of the client's control variate


@dataclass(frozen=True, kw_only=True)
class Scaffold(vfl.LocalTraining):
    """SCAFFOLD: control variates correct the drift of local steps (Karimireddy et al., 1910.06378)."""

    option: Literal[1, 2] = 2
    """How a client renews its control variate: 1 by its full gradient at the model sent, 2 from its own steps."""
    weighting: Literal["examples", "uniform", "steps"] = "uniform"
    """A client's weight in the mean; only uniform keeps c the mean of the clients' control variates."""

    compresses: ClassVar[bool] = True
    aggregates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting != "uniform":
            raise vfl.UsageError(f"scaffold averages its clients uniformly, so weighting cannot be {self.weighting!r}")
        if self.option == 2 and (self.local_optimizer != "sgd" or self.local_lr == 0):
            raise vfl.UsageError(
                "scaffold's option 2 reads the gradients off plain sgd steps, so it needs "
                "local-optimizer sgd and local-lr above 0; use option 1 otherwise"
            )

    def by_theory(self, setting: vfl.Setting) -> Self:
        """η = 1/(81 L_max K γ), and at most S/(15 μ N K γ) where μ > 0, for convex fᵢ (1910.06378, Theorem VII).

        Raises UsageError for γ < 1, a compressor, and server or client optimizers other than sgd.
        """
        if self.server_lr < 1 or (self.server_optimizer, self.local_optimizer, self.compressor, self.downlink) != (
            "sgd", "sgd", "identity", "identity"
        ):  # fmt: skip
            raise vfl.UsageError("scaffold's theorem has plain sgd on both sides, server-lr at least 1 and no "
                                 "compressor; leave these options out, or step-size at given")  # fmt: skip
        steps, constants = setting.steps * self.server_lr, setting.smoothness
        bounds = [1 / (81 * constants.L_max * steps)]
        if constants.mu > 0:
            bounds.append(setting.clients / setting.population / (15 * constants.mu * steps))
        return replace(self, local_lr=min(bounds))

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task and N = population clients."""

        trainer = self.trainer(task)
        omega = trainer.compressor.omega
        a = 1.0 if omega is None else 1 / (1 + omega)

        def init_server(x: Tensor) -> Server:
            return Server(x, x.new_zeros(x.shape), trainer.server.init(x), x.new_zeros(()))

        def init_client(x: Tensor) -> Tensor:
            return x.new_zeros(x.shape)

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            (x, c), bits = trainer.send((server.x, server.c), key)
            return vfl.Broadcast(Sent(x, c, trainer.rate(server.t)), bits)

        def client_update(
            sent: Sent, c_i: Tensor, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, Tensor, vfl.Metrics]:
            x, c, lr = sent
            shift = c - c_i
            y, metrics = trainer.train(vfl.ModelAndRate(x, lr), batches, lambda g, y: g + shift)
            delta = y - x
            if self.option == 1:
                c_new, cost = vfl.full_gradient(task.grad_fn, x, batches)
                metrics = metrics._replace(gradients=metrics.gradients + cost.gradients)
                change = c_new - c_i
            else:
                change = delta / (-lr * batches.steps) - c  # of cᵢ⁺ = cᵢ − c + (x − y)/(Kη)
            message = trainer.message(Delta(delta, change), trainer.weight(batches), key)
            return message, torch.add(c_i, message.payload.c, alpha=a), metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            delta: Delta = mean.payload
            x, opt = trainer.server_step(delta.y, server.opt, server.x, server.t)
            c = server.c + mean.clients / population * a * delta.c
            return Server(x, c, opt, server.t + 1), {}

        return trainer.aggregator.of(
            vfl.Algorithm(init_server, init_client, broadcast, client_update, server_update, late="whole")
        )
