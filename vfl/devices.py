"""Simulated devices: how long each client's round takes, and clients that never answer.

A client's device has one speed for the whole run, so that computing and sending take `slowness` times what they take on
the fastest or the usual one. A round lasts as long as its slowest client that answers: a curve against this clock shows
what an algorithm would cost on such devices, whatever computes it here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vfl import random
from vfl.base import Algorithm, Broadcast, Message, Metrics, Tree
from vfl.errors import UsageError
from vfl.local import Batches, keep_where
from vfl.spec import resolve
from vfl.task import Task
from vfl.wrappers import Context

SECONDS = "simulated_seconds"  # the metric
_LOST = 0x1057  # a stream of a client's key that no algorithm uses

Slowness = Callable[[Tensor], Tensor]
"""A device's key [] → how many times as long it takes: float64 []."""


def equal() -> Slowness:
    """All devices alike."""
    return lambda key: torch.ones_like(key, dtype=torch.float64)


def uniform(low: float, high: float) -> Slowness:
    """Uniform from low to high times as long."""
    if not 0 < low <= high < math.inf:
        raise UsageError(f"device-speeds uniform: needs 0 < low ≤ high, not {low} and {high}")
    return lambda key: low + (high - low) * random.uniform(key, (), torch.float64)


def lognormal(sigma: float) -> Slowness:
    """exp(σ z) times as long, z standard normal: half of the devices are slower than 1."""
    if not 0 <= sigma < math.inf:
        raise UsageError(f"device-speeds lognormal: sigma must be a finite number ≥ 0, not {sigma}")
    return lambda key: torch.exp(sigma * random.normal(key, (), torch.float64))


def pareto(alpha: float) -> Slowness:
    """P(more than t times as long) = t^(−α) for t ≥ 1: most are fast, and a few stragglers very slow."""
    if not 0 < alpha < math.inf:
        raise UsageError(f"device-speeds pareto: alpha must be a number above 0, not {alpha}")
    return lambda key: (1 - random.uniform(key, (), torch.float64)) ** (-1 / alpha)


def classes(*slowness: float) -> Slowness:
    """One of these, each as likely: measured kinds of devices."""
    if not slowness or not all(0 < s < math.inf for s in slowness):
        raise UsageError("device-speeds classes: needs numbers above 0, like classes:1,2.5,8, "
                         f"not {', '.join(map(str, slowness)) or 'none'}")  # fmt: skip

    def draw(key: Tensor) -> Tensor:
        # Filled on the device and gathered: numbers from the host would make a GPU's queue wait.
        known = torch.stack([torch.full((), s, dtype=torch.float64, device=key.device) for s in slowness])
        return known.gather(0, random.randint(key, (1,), len(slowness)))[0]

    return draw


SPEEDS: Mapping[str, Callable[..., Slowness]] = {f.__name__: f for f in (equal, uniform, lognormal, pareto, classes)}


class Sent(NamedTuple):
    """What the server sends, and what that costs."""

    content: Tree  # the algorithm's own
    bits: Tensor  # []


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What the clients run on."""

    device_speeds: str = "none"
    """How many times as long a client's device takes, drawn once for each: equal, lognormal:0.5, uniform:1,4, pareto:2,
    classes:1,2.5,8; none: no simulated clock."""
    step_seconds: float = 0.1
    """Simulated seconds of a local step on a device of 1."""
    uplink_rate: float = 1e6
    """Bits a second that a device of 1 sends."""
    downlink_rate: float = 1e7
    """Bits a second that a device of 1 receives."""
    device_seed: int = 0
    """Seed of the devices' speeds alone."""
    client_dropout: float = 0.0
    """Probability that a client of the cohort does its work but never answers."""

    def __post_init__(self) -> None:
        for name, zero in (("step_seconds", True), ("uplink_rate", False), ("downlink_rate", False)):
            value, least = getattr(self, name), "≥ 0" if zero else "> 0"
            if not (value >= 0 and math.isfinite(value) and (zero or value > 0)):
                raise UsageError(f"{name.replace('_', '-')} must be a finite number {least}, not {value}")
        if not 0 <= self.client_dropout < 1:
            raise UsageError(f"client-dropout must be from 0 to below 1, not {self.client_dropout}")
        self.slowness()

    def slowness(self) -> Slowness | None:
        """The law of the devices' speeds; None: no clock."""
        return None if self.device_speeds == "none" else resolve(self.device_speeds, SPEEDS, "device-speeds")

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The algorithm on these devices; itself without a clock and drop-outs. Wrapped before `Delays`."""
        slowness = self.slowness()
        if slowness is not None:
            algorithm = timed(
                algorithm, slowness, self.step_seconds, self.uplink_rate, self.downlink_rate, self.device_seed
            )
        return dropping(algorithm, self.client_dropout) if self.client_dropout else algorithm


def timed(
    algorithm: Algorithm, slowness: Slowness, step_seconds: float, uplink: float, downlink: float, seed: int = 0
) -> Algorithm:
    """The algorithm with a simulated clock: the metric `simulated_seconds` of a round, that of its slowest client.

    Client i takes slownessᵢ · (steps · step_seconds + bits down / downlink + bits up / uplink), the rates in bits a
    second, its slowness a function of the seed and of where its examples lie, so the same in every round.
    """

    def broadcast(server: Any, key: Tensor) -> Broadcast:
        content, bits = algorithm.broadcast(server, key)
        return Broadcast(Sent(content, bits), bits)

    def client_update(sent: Sent, client: Tree, batches: Batches, key: Tensor) -> tuple[Message, Tree, Metrics]:
        message, client, metrics = algorithm.client_update(sent.content, client, batches, key)
        device = random.fold_in(random.key(seed, batches.start.device), batches.start)
        seconds = batches.steps * step_seconds + sent.bits / downlink + message.bits / uplink
        return message, client, metrics._replace(peaks={**metrics.peaks, SECONDS: slowness(device) * seconds})

    return algorithm._replace(broadcast=broadcast, client_update=client_update)


def dropping(algorithm: Algorithm, probability: float) -> Algorithm:
    """The algorithm with clients that work but, with this probability, never answer: the metric `unanswered`.

    Such a client's message has no weight and no bits, its state stays as it was, and no one waits for it. Its work is
    part of `train_loss` and `gradients`.
    """

    def client_update(sent: Tree, client: Tree, batches: Batches, key: Tensor) -> tuple[Message, Tree, Metrics]:
        message, after, metrics = algorithm.client_update(sent, client, batches, key)
        lost = random.bernoulli(random.fold_in(key, _LOST), probability, ())
        silent = message._replace(weight=message.weight * ~lost, bits=message.bits * ~lost)
        counts = {**metrics.counts, "unanswered": lost.to(torch.float64)}
        peaks = {name: value * ~lost if name == SECONDS else value for name, value in metrics.peaks.items()}
        return silent, keep_where(lost, client, after), metrics._replace(counts=counts, peaks=peaks)

    return algorithm._replace(client_update=client_update)
