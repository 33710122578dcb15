"""GradSkip (Maranjyan et al., arXiv 2210.16402, Algorithm 1): Scaffnew whose clients may stop computing gradients.

A round is one iteration, and the server tosses a coin for communication, as in scaffnew.py. Every client tosses one
of its own, ηᵢ = 1 with probability q, and takes
    ĥᵢ = ηᵢ hᵢ + (1 − ηᵢ) gᵢ(xᵢ),   x̂ᵢ = xᵢ − γ (gᵢ(xᵢ) − ĥᵢ);
in a communication x = (1/N) Σ (x̂ᵢ − (γ/p) ĥᵢ), xᵢ ← x and hᵢ ← ĥᵢ + (p/γ) (x − x̂ᵢ), otherwise xᵢ ← x̂ᵢ and hᵢ ← ĥᵢ.
After ηᵢ = 0 a client stands still with hᵢ its gradient, so that all further steps before the next communication change
nothing: it rests until then and computes no gradient (with minibatches, too, where the paper has full gradients).

The paper gives every client a qᵢ of its own, less the better conditioned its loss is; here all have the same q.
Σ hᵢ = 0 after a communication, so a client sends x̂ᵢ − (γ/p) (ĥᵢ − hᵢ) with the hᵢ it had then, and the others count as
in scaffnew.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

import vfl
from algorithms.scaffnew import Scaffnew, Sent, Server, contribute, init_server, server_update, shifted, toss


class Client(NamedTuple):
    """A client's state after its step."""

    x: Tensor  # [D] x̂ᵢ
    h: Tensor  # [D] ĥᵢ
    u: Tensor  # [D] its h after the last communication, less (p/γ) x
    heard: Tensor  # [] communications when it took its step; −1 before it takes part
    rests: Tensor  # [] 1 when it computes no gradient until the next communication, else 0


@dataclass(frozen=True, kw_only=True)
class GradSkip(Scaffnew):
    """GradSkip: Scaffnew whose clients skip gradients as well (Maranjyan et al., 2210.16402)."""

    q: float = 0.9
    """Probability of going on after a local step, from 0 to 1; 1 is scaffnew. The paper bounds the step size by
    (1/L) p² / (1 − q (1 − p²))."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.q <= 1:
            raise vfl.UsageError(f"q must be a probability from 0 to 1, not {self.q}")

    def by_theory(self, setting: vfl.Setting) -> Self:
        """Scaffnew's p, and γ = p² / (L_max (1 − q (1 − p²))) for the q given (2210.16402, Theorem 3.5)."""
        scaffnew = super().by_theory(setting)
        p2 = scaffnew.p**2
        return replace(scaffnew, local_lr=scaffnew.local_lr * p2 / (1 - self.q * (1 - p2)))

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""

        gamma, p_by_gamma = self.local_lr, self.p / self.local_lr

        def init_client(x: Tensor) -> Client:
            return Client(x.clone(), torch.zeros_like(x), torch.zeros_like(x), x.new_full((), -1), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            return toss(server, key, self.p)

        def client_update(
            sent: Sent, client: Client, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, Client, vfl.Metrics]:
            news = sent.n > client.heard
            u, synced = shifted(sent, client.u, client.heard, p_by_gamma)
            x, h = torch.where(news, sent.x, client.x), torch.where(news, synced, client.h)
            steps = news | (client.rests == 0)
            goes_on = vfl.random.bernoulli(key, self.q, ())
            g, aux = task.grad_fn(x, batches.at(0), batches.buffers)
            h_hat = torch.where(steps & ~goes_on, g, h)
            x_hat = torch.where(steps, x - gamma * (g - h_hat), x)
            z = x_hat - (h_hat - synced) / p_by_gamma
            u = torch.where(sent.coin > 0, h_hat - p_by_gamma * x_hat, u)
            rests = torch.where(steps & goes_on, 0, client.rests.new_ones(()))
            # Under vmap every client computes; those at rest do not use it, and do not count it.
            loss, examples = (torch.where(steps, n, 0) for n in (aux.loss, aux.examples))
            buffers = tuple(torch.where(steps, new, old) for new, old in zip(aux.buffers, batches.buffers, strict=True))
            metrics = vfl.Metrics(loss, examples, examples, buffers)
            return contribute(sent, z, client.heard), Client(x_hat, h_hat, u, sent.n, rests), metrics

        return vfl.Algorithm(init_server, init_client, broadcast, client_update, server_update, late="never")
