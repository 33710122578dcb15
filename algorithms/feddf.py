"""FedDF (Lin et al., arXiv 2006.07242, Algorithms 1 and 3): ensemble distillation. P public inputs, S the cohort.

Client: FedAvg's local steps to y; it sends y − x, and the logits of y on P inputs that everyone holds.
Server: x ← FedAvg's step; then minibatch steps on KL(p ‖ softmax(f(x))), where p = softmax(mean_S of the logits), the
clients counting alike in that mean.
Or clients send their logits alone, and the server distils them into the model it has.
The public inputs need no labels, and count for no bits: they are there before the first round.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

import vfl
from algorithms.fedavg import Server

PIECE = 100  # public inputs whose logits are computed at once


class Payload(NamedTuple):
    """What a client sends."""

    delta: vfl.Tree  # [D] change of the model; () where logits are sent alone
    logits: Tensor  # [P, ..., classes] of its model, over its weight: so that clients count alike in their mean


class Public(NamedTuple):
    """Inputs that the server and all clients hold."""

    x: Tensor  # [P, ...] as stored
    transform: vfl.data.Transform


@functools.lru_cache(maxsize=4)
def public_inputs(spec: str, count: int) -> Public:
    """`count` inputs, or all, of a data set's training examples, the same in every run. Raises UsageError."""
    dataset = vfl.data.load(spec)
    rows = vfl.random.choice(vfl.random.key(0), len(dataset.train.y), min(count, len(dataset.train.y)))
    return Public(dataset.train.x[rows], dataset.transform)


@dataclass(frozen=True, kw_only=True)
class FedDF(vfl.LocalTraining):
    """FedDF: the server distils the clients' mean logits on public inputs (Lin et al., 2006.07242)."""

    public: str = "digits"
    """Data set whose training inputs are the public ones; their labels are not used (see `vfl list data`)."""
    public_examples: int = 500
    """How many public inputs P there are, at most."""
    sends: Literal["model+logits", "logits"] = "model+logits"
    """What a client sends: the change of its model and its logits, or its logits alone."""
    distill_steps: int = 20
    """Steps of distillation a round."""
    distill_lr: float = 1e-3
    """Step size of distillation."""
    distill_schedule: str = "constant"
    """Factor on it by step of the round; the paper: cosine:STEPS (see local-schedule)."""
    distill_optimizer: str = "adam"
    """Optimizer of distillation, fresh each round (see local-optimizer for the names)."""
    distill_batch_size: int = 100
    """Public inputs a step, drawn without replacement."""

    compresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("public_examples", "distill_batch_size"):
            if getattr(self, name) < 1:
                raise vfl.UsageError(f"{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.distill_steps < 0:
            raise vfl.UsageError(f"distill-steps must be at least 0, not {self.distill_steps}")
        if not (self.distill_lr >= 0 and math.isfinite(self.distill_lr)):
            raise vfl.UsageError(f"distill-lr must be a finite number ≥ 0, not {self.distill_lr}")
        if self.sends not in ("model+logits", "logits"):
            raise vfl.UsageError(f"sends must be model+logits or logits, not {self.sends!r}")
        if self.sends == "logits" and self.compressor != "identity":
            raise vfl.UsageError(f"feddf compresses models, not logits: compressor must be identity, "
                                 f"not {self.compressor!r}")  # fmt: skip
        vfl.optimizer(self.distill_optimizer)
        vfl.schedule(self.distill_schedule)

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task. Raises UsageError for public inputs that the model cannot take."""
        return feddf(self, task, public_inputs(self.public, self.public_examples))


def feddf(config: FedDF, task: vfl.Task, public: Public) -> vfl.Algorithm:
    """FedDF on these public inputs, in the place of those that the options name."""
    trainer, device = config.trainer(task), task.x.device
    inputs = public.transform(public.x.to(device), task.x.dtype)
    P = len(inputs)
    size = min(config.distill_batch_size, P)
    distiller = vfl.optimizer(config.distill_optimizer, task.sizes)
    rate = vfl.schedule(config.distill_schedule)
    models = config.sends == "model+logits"
    no_key = torch.zeros((), dtype=torch.int64, device=device)

    def batch(x: Tensor, key: Tensor) -> vfl.Batch:
        count = len(x)
        return vfl.Batch(x, torch.zeros(count, device=device), torch.ones(count, dtype=torch.bool, device=device), key)

    def logits_of(y: Tensor, buffers: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([task.outputs(y, batch(some, no_key), buffers) for some in inputs.split(PIECE)])

    try:
        task.outputs(task.x, batch(inputs[:1], no_key), task.buffers)
    except RuntimeError as error:
        shape = "×".join(map(str, inputs.shape[1:]))
        raise vfl.UsageError(
            f"the model cannot take the public inputs ({shape}): {str(error).splitlines()[0]}"
        ) from None

    def init_server(x: Tensor) -> Server:
        return Server(x, trainer.server.init(x) if models else (), x.new_zeros(()))

    def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
        return trainer.broadcast(server.x, server.t, key)

    def client_update(
        sent: vfl.ModelAndRate, client: tuple[()], batches: vfl.Batches, key: Tensor
    ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
        y, metrics = trainer.train(sent, batches)
        weight = trainer.weight(batches)
        logits = logits_of(y, metrics.buffers) / weight.clamp(min=1)  # who has no data has no weight
        payload = Payload(y - sent.x if models else (), logits)
        return trainer.message(payload, weight, key), client, metrics

    def divergence(x: Tensor, p: Tensor, some: vfl.Batch) -> Tensor:
        q = torch.log_softmax(task.outputs(x, some, task.buffers, training=True), -1)
        return (torch.xlogy(p, p) - p * q).sum(-1).mean()

    gradient = torch.func.grad_and_value(divergence)

    def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
        x, opt = server.x, server.opt
        if models:
            x, opt = trainer.server_step(mean.payload.delta, opt, x, server.t)
        teacher = torch.softmax(mean.payload.logits * (mean.weight / mean.clients), -1)  # Σ over |S|, not over Σ w
        memory, total = distiller.init(x), x.new_zeros(())
        for k in range(config.distill_steps):
            draw, noise = vfl.random.split(vfl.random.fold_in(key, k)).unbind(-1)
            rows = vfl.random.choice(draw, P, size)
            g, value = gradient(x, teacher[rows], batch(inputs[rows], noise))
            x, memory = distiller.step(g, memory, x, config.distill_lr * rate(x.new_tensor(k)))
            total = total + value
        reported = {"distill_loss": total / config.distill_steps} if config.distill_steps else {}
        return Server(x, opt, server.t + 1), reported

    return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update, late="whole")
