"""DGA, dynamic gradient aggregation (Dimitriadis et al., arXiv 2106.07578; in FLUTE, arXiv 2203.13789).

Client: y ← x, then K local steps as in FedAvg; it sends Δ = y − x and a statistic s of its work: the mean training loss
over the examples it visited, or the variance, mean or root mean square (rms) over all entries of its K gradients, or of
its pseudo-gradient x − y.
Server: x ← ServerOpt(x, −Σ w Δ / Σ w, γ) with w = exp(−β s), the softmax of −β s over the cohort; β = 0 is the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

import vfl

_MOST = 60.0  # e^±60 times a change of the model is a number in single precision


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    opt: vfl.Tree  # the server optimizer's memory
    t: Tensor  # [] rounds done
    s: Tensor  # [] the last cohort's mean statistic, weighted as its changes


class Sent(NamedTuple):
    """What the server sends."""

    model: vfl.ModelAndRate
    s: Tensor  # [] from which exponents are counted; the server's own business, so not counted as sent


class Work(NamedTuple):
    """What a client sends."""

    delta: Tensor  # [D] change of the model
    s: Tensor  # [] its statistic


class Moments(NamedTuple):
    """Sums over the entries of some gradients."""

    entries: Tensor  # [] how many
    first: Tensor  # [] Σ g
    second: Tensor  # [] Σ g²

    def statistic(self, name: str) -> Tensor:
        """The variance, mean or rms [] over the entries."""
        mean, square = self.first / self.entries, self.second / self.entries
        if name == "mean":
            return mean
        return square.sqrt() if name == "rms" else (square - mean.square()).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class DGA(vfl.LocalTraining):
    """DGA: clients with a smaller loss, or gradients that vary less, weigh more (Dimitriadis et al., 2106.07578)."""

    beta: float = 1.0
    """β ≥ 0, how sharply weights exp(−β s) fall with a client's statistic s; 0 is the mean."""
    statistic: Literal["loss", "variance", "mean", "rms"] = "loss"
    """s: the mean training loss, or the variance, mean or root mean square over a gradient's entries."""
    gradient: Literal["steps", "pseudo"] = "steps"
    """Which gradients those are: the local steps', as they are descended, or the pseudo-gradient x − y."""
    weighting: Literal["examples", "uniform", "steps"] = "uniform"
    """A client's weight beside its statistic's: its number of examples, 1, or its number of local steps."""

    compresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise vfl.UsageError(f"beta must be a finite number ≥ 0, not {self.beta}")
        if self.statistic not in ("loss", "variance", "mean", "rms"):
            raise vfl.UsageError(f"statistic must be loss, variance, mean or rms, not {self.statistic!r}")
        if self.gradient not in ("steps", "pseudo"):
            raise vfl.UsageError(f"gradient must be steps or pseudo, not {self.gradient!r}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""

        trainer = self.trainer(task)

        def init_server(x: Tensor) -> Server:
            return Server(x, trainer.server.init(x), x.new_zeros(()), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            sent = trainer.broadcast(server.x, server.t, key)
            return vfl.Broadcast(Sent(sent.content, server.s), sent.bits)

        def client_update(
            sent: Sent, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            x = sent.model.x
            y, moments, metrics = observed(trainer, sent.model, batches)
            if self.gradient == "pseudo":
                g = x - y
                moments = Moments(torch.full_like(moments.entries, g.numel()), g.sum(), g.square().sum())
            s = metrics.loss / metrics.examples if self.statistic == "loss" else moments.statistic(self.statistic)
            # A softmax does not care for a constant; from the last cohort's mean on, exponents stay small.
            exponent = (-self.beta * (s - sent.s)).clamp(-_MOST, _MOST)
            weight = trainer.weight(batches) * exponent.exp()
            return trainer.message(Work(y - x, s), weight, key), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            work: Work = mean.payload
            x, opt = trainer.server_step(work.delta, server.opt, server.x, server.t)
            return Server(x, opt, server.t + 1, work.s), {"statistic": work.s}

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update)


def observed(trainer: vfl.Trainer, sent: vfl.ModelAndRate, batches: vfl.Batches) -> tuple[Tensor, Moments, vfl.Metrics]:
    """The local model y [D] as `trainer.train` gives it, and the sums over the entries of its steps' gradients."""
    zero, bound = sent.x.new_zeros(()), trainer.config.clip_norm

    def grad_fn(y: Tensor, batch: vfl.Batch, carried: tuple[Tensor, ...]) -> tuple[Tensor, vfl.Aux]:
        *buffers, first, second = carried
        g, aux = trainer.task.grad_fn(y, batch, tuple(buffers))
        g = g if bound is None else vfl.clip_norm(g, bound)
        return g, aux._replace(buffers=(*aux.buffers, first + g.sum(), second + g.square().sum()))

    # The sums travel as two more buffers, which stand still for a client that is done, as its model does.
    carrying = batches._replace(buffers=(*batches.buffers, zero, zero))
    y, metrics = vfl.descend(grad_fn, sent.x, carrying, trainer.local, sent.lr)
    *buffers, first, second = metrics.buffers
    entries = (batches.steps * sent.x.numel()).to(first.dtype)
    return y, Moments(entries, first, second), metrics._replace(buffers=tuple(buffers))
