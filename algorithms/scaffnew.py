"""Scaffnew: ProxSkip for federated learning (Mishchenko et al., arXiv 2202.09357, Algorithm 2). N clients, S a cohort.

A round is one iteration of the paper. Every client takes one local step, on one minibatch,
    x̂ᵢ = xᵢ − γ (gᵢ(xᵢ) − hᵢ),
whatever the run says of local epochs or steps: between two communications there are 1/p steps on average. The server's
coin, which comes up with probability p and goes out with the broadcast, says whether they communicate:
    xᵢ ← x = (1/N) Σ x̂ᵢ if it does, else x̂ᵢ;   hᵢ ← hᵢ + (p/γ) (xᵢ − x̂ᵢ).
Only then anything is sent. A client hears the average at the start of its next round; until then it keeps the rest of
its new hᵢ, uᵢ = hᵢ − (p/γ) x̂ᵢ, so that hᵢ = uᵢ + (p/γ) x with the server's x, the newest average.

The paper has every client in every round. In a smaller cohort a client that is away takes no step, and when the others
communicate without it, it counts at the x it last heard, and what it stepped since then is lost:
    x ← x + (1/N) Σ_S (x̂ᵢ − x).
Each missed average moves its hᵢ by p/γ times the change of x, which uᵢ + (p/γ) x makes up for whenever it returns. So
Σ hᵢ = 0 always, and the limit is the optimum. N counts the clients that have taken part so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

import vfl


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model: the newest average
    n: Tensor  # [] communications so far
    seen: Tensor  # [] N, clients that have taken part
    news: Tensor  # [] 1 when the next cohort has to be sent x, 0 when all of it stepped on from x in the last round


class Sent(NamedTuple):
    """What the server sends."""

    x: Tensor  # [D]
    n: Tensor  # [] communications so far
    coin: Tensor  # [] 1 when this round communicates, else 0


class Client(NamedTuple):
    """A client's state after its step."""

    x: Tensor  # [D] x̂ᵢ
    u: Tensor  # [D] hᵢ − (p/γ) x
    heard: Tensor  # [] communications when it took its step; −1 before it takes part


class Contribution(NamedTuple):
    """What a client sends when the coin says so."""

    z: Tensor  # [D] its term of the average
    coin: Tensor  # [] the coin once more, for the server's own step
    new: Tensor  # [] 1 when it takes part for the first time, else 0


def init_server(x: Tensor) -> Server:
    """The first round sends x⁰."""
    return Server(x, x.new_zeros(()), x.new_zeros(()), x.new_ones(()))


def toss(server: Server, key: Tensor, p: float) -> vfl.Broadcast:
    """The round's coin, and the average to those that have not heard it."""
    coin = vfl.random.bernoulli(key, p, ()).to(server.x.dtype)
    return vfl.Broadcast(Sent(server.x, server.n, coin), vfl.float_bits(server.x) * server.news)


def shifted(sent: Sent, client_u: Tensor, heard: Tensor, p_by_gamma: float) -> tuple[Tensor, Tensor]:
    """A client's uᵢ [D] and its hᵢ [D] after the last communication; hᵢ = 0 when it takes part for the first time."""
    u = torch.where(heard < 0, -p_by_gamma * sent.x, client_u)
    return u, u + p_by_gamma * sent.x


def contribute(sent: Sent, z: Tensor, heard: Tensor) -> vfl.Message:
    """The message z [D] of a round that communicates, if it does."""
    one = z.new_ones(())
    return vfl.Message(Contribution(z, sent.coin, one * (heard < 0)), one, vfl.float_bits(z) * sent.coin)


def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
    """x ← x + (1/N) Σ_S (zᵢ − x) if the round communicated."""
    z, coin, new = mean.payload
    coin, clients = coin.round(), mean.clients.to(z.dtype)  # coin: a mean of equal numbers, up to rounding
    seen = server.seen + (new * clients).round()
    x = torch.where(coin > 0, server.x + clients / seen * (z - server.x), server.x)
    n = server.n + coin
    return Server(x, n, seen, torch.where(clients < seen, 1, coin)), {"communications": n}


@dataclass(frozen=True, kw_only=True)
class Scaffnew:
    """Scaffnew (ProxSkip): one local step a round, communication with probability p (Mishchenko et al., 2202.09357)."""

    local_lr: float = 0.1
    """Step size γ > 0."""
    p: float = 0.2
    """Probability that a round communicates, above 0 and at most 1; for condition number κ, 1/√κ is best."""

    def __post_init__(self) -> None:
        if not (self.local_lr > 0 and math.isfinite(self.local_lr)):
            raise vfl.UsageError(f"local-lr must be a finite number > 0, not {self.local_lr}")
        if not 0 < self.p <= 1:
            raise vfl.UsageError(f"p must be a probability above 0 and at most 1, not {self.p}")

    def by_theory(self, setting: vfl.Setting) -> Self:
        """γ = 1/L_max and p = 1/√κ with κ = L_max/μ, for μ-strongly convex fᵢ (2202.09357, Theorem 3.6).

        Raises UsageError for a sample of the clients, and for μ = 0.
        """
        if setting.clients < setting.population:
            raise vfl.UsageError(f"scaffnew's theorem asks all {setting.population} clients, not {setting.clients}")
        L, mu = setting.smoothness.L_max, setting.smoothness.mu
        if mu <= 0:
            raise vfl.UsageError("scaffnew's theorem needs strongly convex losses: add a regularizer such as l2:0.01")
        return replace(self, local_lr=1 / L, p=math.sqrt(mu / L))

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""

        gamma, p_by_gamma = self.local_lr, self.p / self.local_lr

        def init_client(x: Tensor) -> Client:
            return Client(x.clone(), x.new_zeros(x.shape), x.new_full((), -1))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            return toss(server, key, self.p)

        def client_update(
            sent: Sent, client: Client, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, Client, vfl.Metrics]:
            x = torch.where(sent.n > client.heard, sent.x, client.x)
            u, h = shifted(sent, client.u, client.heard, p_by_gamma)
            g, aux = task.grad_fn(x, batches.at(0), batches.buffers)
            x_hat = x - gamma * (g - h)
            u = torch.where(sent.coin > 0, h - p_by_gamma * x_hat, u)
            metrics = vfl.Metrics(aux.loss, aux.examples, aux.examples, aux.buffers)
            return contribute(sent, x_hat, client.heard), Client(x_hat, u, sent.n), metrics

        return vfl.Algorithm(init_server, init_client, broadcast, client_update, server_update, late="never")
