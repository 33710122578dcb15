"""APFL (Deng et al., arXiv 2003.13461, Algorithm 1): personal models mixed with the global one, by a learned share.

Client: w ← x. In each of K steps, with the mixed model m = αᵢ vᵢ + (1 − αᵢ) w of before the step,
    w ← w − η g(w),   vᵢ ← vᵢ − η αᵢ g(m),   αᵢ ← αᵢ − η_α ⟨vᵢ − w, g(m)⟩, clipped to [0, 1],
since ∇_v f(m) = αᵢ ∇f(m). It sends Δ = w − x; vᵢ and αᵢ stay, and its own model is the mixed one.
Server: FedAvg's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import vfl
from algorithms.fedavg import Server, fedavg


class Own(NamedTuple):
    """A client's state."""

    v: Tensor  # [D] its local model
    alpha: Tensor  # [] the local model's share in the mixed one
    buffers: tuple[Tensor, ...]  # the module's, of the mixed model


def mixed(own: Own, w: Tensor) -> Tensor:
    """The mixed model [D]."""
    return own.alpha * own.v + (1 - own.alpha) * w


@dataclass(frozen=True, kw_only=True)
class APFL(vfl.LocalTraining):
    """APFL: each client mixes a local with the global model in a share that it learns (Deng et al., 2003.13461)."""

    alpha: float = 0.5
    """The local model's share α in [0, 1] to begin with."""
    alpha_lr: float = 0.1
    """Step size of a client's α; 0: it stays as it is."""

    compresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise vfl.UsageError(f"alpha must be from 0 to 1, not {self.alpha}")
        if not (self.alpha_lr >= 0 and math.isfinite(self.alpha_lr)):
            raise vfl.UsageError(f"alpha-lr must be a finite number ≥ 0, not {self.alpha_lr}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""
        trainer, plain = self.trainer(task), fedavg(self, task)

        def gradient(x: Tensor, batch: vfl.Batch, buffers: tuple[Tensor, ...]) -> tuple[Tensor, vfl.Aux]:
            g, aux = task.grad_fn(x, batch, buffers)
            return g if self.clip_norm is None else vfl.clip_norm(g, self.clip_norm), aux

        def init_client(x: Tensor) -> Own:
            return Own(x.clone(), x.new_tensor(self.alpha), tuple(b.clone() for b in task.buffers))

        def client_update(
            sent: vfl.ModelAndRate, own: Own, batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, Own, vfl.Metrics]:
            w, buffers = sent.x, batches.buffers
            opt, own_opt = trainer.local.init(w), trainer.local.init(w)
            loss = examples = w.new_zeros(())
            for k in range(batches.longest):
                batch = batches.at(k)
                g, aux = gradient(w, batch, buffers)
                g_mixed, own_aux = gradient(mixed(own, w), batch, own.buffers)
                alpha = torch.clamp(own.alpha - self.alpha_lr * ((own.v - w) @ g_mixed), 0, 1)
                v, own_opt_after = trainer.local.step(own.alpha * g_mixed, own_opt, own.v, sent.lr)
                w_after, opt_after = trainer.local.step(g, opt, w, sent.lr)
                after = w_after, opt_after, aux.buffers, Own(v, alpha, own_aux.buffers), own_opt_after
                if k >= batches.shortest:  # clients that are done stay where they are
                    after = vfl.keep_where(k < batches.steps, after, (w, opt, buffers, own, own_opt))
                w, opt, buffers, own, own_opt = after
                loss, examples = loss + aux.loss, examples + aux.examples
            message = trainer.message(w - sent.x, trainer.weight(batches), key)
            return message, own, vfl.Metrics(loss, examples, 2 * examples, buffers)

        def model(server: Server, own: Own, batches: vfl.Batches) -> vfl.Model:
            return vfl.Model(mixed(own, server.x), own.buffers)

        return plain._replace(init_client=init_client, client_update=client_update, personal=vfl.Personal(model))
