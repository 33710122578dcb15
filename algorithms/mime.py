"""Mime and MimeLite (Karimireddy et al., arXiv 2008.03606): clients step as the server's optimizer would. S the cohort.

The base optimizer is an update U(g, s) and a rule V(g, s) for its statistics s = (m, v), which stay as the server sent
them during local work:
    sgd:      U = (1−β₁) g + β₁ m                    V: m ← (1−β₁) g + β₁ m
    rmsprop:  U = g / (√v + ε)                       V: v ← (1−β₂) g² + β₂ v
    adam:     U = ((1−β₁) g + β₁ m) / (√v + ε)       V: both
Client: y ← x, then K steps y ← y − η U(gₖ, s), where gₖ is the minibatch gradient at y (MimeLite), or that at y less
that at x plus c = mean_S ∇fᵢ(x) (Mime). Server: x ← x + γ mean_S (y − x),   s ← V(mean_S ∇fᵢ(x), s).

Mime needs c before the local steps, so one of its rounds is two exchanges, and two rounds here: the clients of the
first send ∇fᵢ(x), those of the second work from x. With everyone in both this is the paper's algorithm; else c comes
from a cohort drawn independently of those who use it, where the paper asks the same clients twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import vfl


class Statistics(NamedTuple):
    """What the base optimizer remembers."""

    m: vfl.Tree  # [D] running mean of g; () for rmsprop
    v: vfl.Tree  # [D] running mean of g²; () for sgd


class Server(NamedTuple):
    """The server's state."""

    x: Tensor  # [D] the model
    s: Statistics  # the base optimizer's
    c: vfl.Tree  # [D] mean gradient at x, asked for in every other round; () for MimeLite
    t: Tensor  # [] rounds done


class Request(NamedTuple):
    """What Mime's server sends for the gradient at x."""

    x: Tensor  # [D]


class Sent(NamedTuple):
    """What the server sends for local work."""

    x: Tensor  # [D]
    s: Statistics
    c: vfl.Tree  # [D]; () for MimeLite
    lr: Tensor  # [] η of this round


class Gradient(NamedTuple):
    """The answer to a request."""

    g: Tensor  # [D] ∇fᵢ(x)


class Change(NamedTuple):
    """What Mime's clients send after local work."""

    y: Tensor  # [D] change of the model


class ChangeAndGradient(NamedTuple):
    """What MimeLite's clients send."""

    y: Tensor  # [D] change of the model
    g: Tensor  # [D] ∇fᵢ(x)


@dataclass(frozen=True, kw_only=True)
class MimeOptions(vfl.LocalTraining):
    """What Mime and MimeLite share: the optimizer to mimic."""

    base: Literal["sgd", "rmsprop", "adam"] = "sgd"
    """Optimizer to mimic, whose statistics the clients use and only the server renews."""
    b1: float = 0.9
    """Its momentum β₁ (sgd, adam); 0 for none."""
    b2: float = 0.99
    """Its decay β₂ of the squared gradients (rmsprop, adam)."""
    eps: float = 1e-3
    """Its ε beside the root of the squared gradients (rmsprop, adam)."""
    weighting: Literal["examples", "uniform", "steps"] = "uniform"
    """A client's weight in the means."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in ("sgd", "rmsprop", "adam"):
            raise vfl.UsageError(f"base must be sgd, rmsprop or adam, not {self.base!r}")
        for name, value in (("b1", self.b1), ("b2", self.b2)):
            if not 0 <= value < 1:
                raise vfl.UsageError(f"{name} must be at least 0 and below 1, not {value}")
        if not 0 < self.eps < float("inf"):
            raise vfl.UsageError(f"eps must be a finite number > 0, not {self.eps}")
        for name in ("local_optimizer", "server_optimizer"):
            if getattr(self, name) != "sgd":
                raise vfl.UsageError(
                    f"mime and mimelite take their optimizer from base, b1, b2 and eps, so {name.replace('_', '-')} "
                    f"must stay sgd, not {getattr(self, name)!r}"
                )

    def statistics(self, x: Tensor) -> Statistics:
        """s before the first round."""
        m = () if self.base == "rmsprop" else torch.zeros_like(x)
        return Statistics(m, () if self.base == "sgd" else torch.zeros_like(x))

    def update(self, g: Tensor, s: Statistics) -> Tensor:
        """U(g, s) [D]."""
        u = g if self.base == "rmsprop" else torch.lerp(s.m, g, 1 - self.b1)
        return u if self.base == "sgd" else u / (s.v.sqrt() + self.eps)

    def track(self, g: Tensor, s: Statistics) -> Statistics:
        """V(g, s)."""
        m = () if self.base == "rmsprop" else torch.lerp(s.m, g, 1 - self.b1)
        return Statistics(m, () if self.base == "sgd" else torch.lerp(s.v, g * g, 1 - self.b2))

    def work(self, trainer: vfl.Trainer, sent: Sent, batches: vfl.Batches) -> tuple[Tensor, vfl.Metrics]:
        """The local model y [D] after steps along U."""
        frozen = vfl.Optimizer(lambda x: (), lambda g, _, y, lr: (y - lr * self.update(g, sent.s), ()))
        return trainer._replace(local=frozen).train(vfl.ModelAndRate(sent.x, sent.lr), batches)


@dataclass(frozen=True, kw_only=True)
class Mime(MimeOptions):
    """Mime: the server's optimizer, frozen, and control variates in local steps (Karimireddy et al., 2008.03606)."""

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task. Raises UsageError for one with private gradients of single examples."""

        task.refuse_private("mime")
        trainer = self.trainer(task)

        def init_server(x: Tensor) -> Server:
            return Server(x, self.statistics(x), x.new_zeros(x.shape), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            (x, lr), bits = trainer.broadcast(server.x, server.t)
            if int(server.t) % 2 == 0:
                return vfl.Broadcast(Request(x), bits)
            return vfl.Broadcast(Sent(x, server.s, server.c, lr), vfl.float_bits((x, server.s, server.c)))

        def client_update(
            sent: Request | Sent, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            if isinstance(sent, Request):
                g, metrics = vfl.full_gradient(task.grad_fn, sent.x, batches)
                return vfl.message(Gradient(g), trainer.weight(batches)), client, metrics

            def corrected(y: Tensor, batch: vfl.Batch, buffers: tuple[Tensor, ...]) -> tuple[Tensor, vfl.Aux]:
                g, aux = task.grad_fn(y, batch, buffers)
                g_at_x, _ = task.grad_fn(sent.x, batch, buffers)
                return g - g_at_x + sent.c, aux

            y, metrics = self.work(trainer._replace(task=task._replace(grad_fn=corrected)), sent, batches)
            metrics = metrics._replace(gradients=2 * metrics.gradients)
            return vfl.message(Change(y - sent.x), trainer.weight(batches)), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            if isinstance(mean.payload, Gradient):
                return server._replace(c=mean.payload.g, t=server.t + 1), {}
            x, _ = trainer.server_step(mean.payload.y, (), server.x, server.t)
            return Server(x, self.track(server.c, server.s), server.c, server.t + 1), {}

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update, late="never")


@dataclass(frozen=True, kw_only=True)
class MimeLite(MimeOptions):
    """MimeLite: the server's optimizer, frozen in local steps; no control variates (Karimireddy et al., 2008.03606)."""

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""

        trainer = self.trainer(task)

        def init_server(x: Tensor) -> Server:
            return Server(x, self.statistics(x), (), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            (x, lr), _ = trainer.broadcast(server.x, server.t)
            return vfl.Broadcast(Sent(x, server.s, (), lr), vfl.float_bits((x, server.s)))

        def client_update(
            sent: Sent, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            y, metrics = self.work(trainer, sent, batches)
            g, cost = vfl.full_gradient(task.grad_fn, sent.x, batches)
            metrics = metrics._replace(gradients=metrics.gradients + cost.gradients)
            return vfl.message(ChangeAndGradient(y - sent.x, g), trainer.weight(batches)), client, metrics

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            change: ChangeAndGradient = mean.payload
            x, _ = trainer.server_step(change.y, (), server.x, server.t)
            return Server(x, self.track(change.g, server.s), (), server.t + 1), {}

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update)
