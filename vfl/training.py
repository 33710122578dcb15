"""The options that every local-update method shares, and what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from vfl import random
from vfl.base import Algorithm, Broadcast, Message, Metrics, Tree, filled, leaves
from vfl.compressors import Compressor, compressor
from vfl.errors import UsageError
from vfl.local import Batches, Direction, descend, float_bits
from vfl.optimizers import Optimizer, optimizer
from vfl.robust import Aggregator, aggregator, mean
from vfl.schedules import Schedule, schedule
from vfl.task import Task

IDENTITY = "identity"


class AlgorithmConfig(Protocol):
    """What an entry point of `vfl.algorithms` names: a dataclass of options that builds the algorithm."""

    def build(self, task: Task, population: int) -> Algorithm:
        """The algorithm for this task and N = population clients."""
        ...


class ModelAndRate(NamedTuple):
    """What the server of a local-update method sends."""

    x: Tensor  # [D] the model
    lr: Tensor  # [] this round's client step size


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Clients take local steps, the server takes a step along their mean change."""

    local_lr: float = 0.1
    """Client step size η."""
    local_optimizer: str = "sgd"
    """Client optimizer, fresh each round: sgd, sgd:momentum=0.9, adam, adamw, yogi, adagrad, rmsprop, lamb, lars."""
    local_schedule: str = "constant"
    """Factor on the client step size, by round: constant, step:30, multistep:50,80, cosine:100, exponential:0.99,
    linear:5 (warm-up), ramp:5,20,50 (up, keep, decay); a + joins two (`vfl list schedules`)."""
    clip_norm: float | None = None
    """Largest norm of a local gradient; longer ones are scaled down to it."""
    weighting: Literal["examples", "uniform", "steps"] = "examples"
    """A client's weight in the mean: its number of examples, 1, or its number of local steps."""
    server_lr: float = 1.0
    """Server step size γ; 1 with plain sgd takes the clients' weighted mean as the new model."""
    server_optimizer: str = "sgd"
    """Server optimizer on the pseudo-gradient (see local-optimizer for the names)."""
    server_schedule: str = "constant"
    """Factor on the server step size, by round (see local-schedule)."""
    compressor: str = "identity"
    """How clients compress what they send: identity, top_k:5%, natural, ... (see `vfl list compressors`)."""
    downlink: str = "identity"
    """How the server compresses what it sends, without memory (see compressor)."""
    aggregator: str = "mean"
    """What the server makes of the messages: mean, median, trimmed_mean:0.1, krum:f=2, ... (`vfl list aggregators`)."""

    compresses: ClassVar[bool] = False
    """Whether the algorithm sends by way of its trainer, which compresses; others refuse these two options."""
    aggregates: ClassVar[bool] = False
    """Whether clients send changes of vectors, of which other averages make sense; others refuse an aggregator."""

    def __post_init__(self) -> None:
        for name in ("local_lr", "server_lr"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"{name.replace('_', '-')} must be a finite number ≥ 0, not {value}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"clip-norm must be a number > 0, not {self.clip_norm}")
        if self.weighting not in ("examples", "uniform", "steps"):
            raise UsageError(f"weighting must be examples, uniform or steps, not {self.weighting!r}")
        for spec in (self.local_optimizer, self.server_optimizer):
            optimizer(spec)
        for spec in (self.local_schedule, self.server_schedule):
            schedule(spec)
        for spec in (self.compressor, self.downlink):
            compressor(spec, [(2**20, 2**20)])  # large enough for any count
            if spec != IDENTITY and not self.compresses:
                raise UsageError(
                    f"{type(self).__name__.lower()} does not compress what it sends: compressor and downlink must be "
                    f"{IDENTITY}, not {spec!r}"
                )
        if aggregator(self.aggregator) != mean() and not self.aggregates:
            raise UsageError(
                f"{type(self).__name__.lower()} needs the weighted mean of its messages: aggregator must be mean, "
                f"not {self.aggregator!r}"
            )

    def trainer(self, task: Task) -> Trainer:
        """These options at work on a task."""
        return Trainer(
            self,
            task,
            optimizer(self.local_optimizer, task.sizes),
            schedule(self.local_schedule),
            optimizer(self.server_optimizer, task.sizes),
            schedule(self.server_schedule),
            compressor(self.compressor, task.shapes, task.x.dtype),
            compressor(self.downlink, task.shapes, task.x.dtype),
            aggregator(self.aggregator),
        )


class Trainer(NamedTuple):
    """The steps of a local-update method: what an algorithm calls."""

    config: LocalTraining
    task: Task
    local: Optimizer
    local_schedule: Schedule
    server: Optimizer
    server_schedule: Schedule
    compressor: Compressor
    downlink: Compressor
    aggregator: Aggregator

    def broadcast(self, x: Tensor, t: Tensor, key: Tensor | None = None) -> Broadcast:
        """Sends the model x [D] with the step size of round t []; the model alone counts as downlink.

        A downlink compressor draws from the key. Raises UsageError where there is one and no key.
        """
        x, bits = self.send(x, key)
        return Broadcast(ModelAndRate(x, self.rate(t)), bits)

    def rate(self, t: Tensor) -> Tensor:
        """η [], the client step size of round t []."""
        return self.config.local_lr * self.local_schedule(t).to(self.task.x.dtype)

    def send(self, content: Tree, key: Tensor | None) -> tuple[Tree, Tensor]:
        """What clients decode of the server's content, whose leaves [D] the downlink compresses, and its bits []."""
        if key is None and self.downlink.name != IDENTITY:
            raise UsageError(f"this algorithm does not compress what its server sends, so downlink must be {IDENTITY}")
        return _compressed(self.downlink, content, self.task.x.shape, key)

    def message(self, payload: Tree, weight: Tensor, key: Tensor) -> Message:
        """The message whose payload's leaves [D] the compressor compresses, each with a key of its own."""
        value, bits = _compressed(self.compressor, payload, self.task.x.shape, key)
        return Message(value, weight, bits)

    def train(self, sent: ModelAndRate, batches: Batches, direction: Direction | None = None) -> tuple[Tensor, Metrics]:
        """The local model y [D] after the client's steps from sent.x, and their metrics."""
        return descend(
            self.task.grad_fn, sent.x, batches, self.local, sent.lr, direction=direction, max_norm=self.config.clip_norm
        )

    def weight(self, batches: Batches) -> Tensor:
        """The client's weight [] in the mean."""
        one = torch.ones((), dtype=batches.dtype, device=batches.steps.device)
        return one * {"examples": batches.examples, "steps": batches.steps, "uniform": 1}[self.config.weighting]

    def server_step(self, delta: Tensor, opt: Tree, x: Tensor, t: Tensor) -> tuple[Tensor, Tree]:
        """One step of the server optimizer on the pseudo-gradient −delta [D] (Reddi et al., 2003.00295): x⁺, state⁺."""
        return self.server.step(-delta, opt, x, self.config.server_lr * self.server_schedule(t).to(x.dtype))


def _compressed(c: Compressor, tree: Tree, shape: torch.Size, key: Tensor | None) -> tuple[Tree, Tensor]:
    """The tree with C applied to its leaves of this shape, the n-th with the n-th key, and the bits [] of it all."""
    if c.name == IDENTITY or key is None:
        return tree, float_bits(tree)
    sent = [
        c.compress(leaf, random.fold_in(key, n)) if leaf.shape == shape else (leaf, float_bits(leaf))
        for n, leaf in enumerate(leaves(tree))
    ]
    return filled(tree, [value for value, _ in sent]), torch.stack([bits for _, bits in sent]).sum()
