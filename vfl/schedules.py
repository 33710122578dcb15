"""Schedules of a rate over the rounds: pure functions from the round t [] to a factor [] of the base rate.

t counts from 0 and may be an integer or float tensor; the factor has t's dtype, torch's default one for integers. They
are written as specs (`SCHEDULES`), and `+` between specs multiplies their factors: `linear:5+cosine:100` warms up for 5
rounds while the cosine runs over rounds 0 to 100.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vfl.errors import UsageError
from vfl.spec import resolve

Schedule = Callable[[Tensor], Tensor]
"""Round t [] → factor [] of the base rate."""


def constant() -> Schedule:
    """1 in every round."""
    return lambda t: torch.ones_like(_float(t))


def step(every: int, factor: float = 0.1) -> Schedule:
    """factor^⌊t / every⌋, as torch's StepLR."""
    _whole("step", every=every)
    _above_zero("step", factor=factor)
    return lambda t: factor ** torch.div(_float(t), every, rounding_mode="floor")


def multistep(*milestones: int, factor: float = 0.1) -> Schedule:
    """factor^(how many milestones are ≤ t), as torch's MultiStepLR; the milestones rise from 1 on."""
    if not milestones or milestones[0] < 1 or any(a >= b for a, b in itertools.pairwise(milestones)):
        shown = ",".join(map(str, milestones)) or "an empty list"
        raise UsageError(f"multistep: needs rounds of at least 1 in rising order, like multistep:50,80, not {shown}")
    _above_zero("multistep", factor=factor)

    def schedule(t: Tensor) -> Tensor:
        t = _float(t)
        passed = torch.zeros_like(t)
        for milestone in milestones:
            passed = passed + (t >= milestone)
        return factor**passed

    return schedule


def cosine(rounds: int, final: float = 0.0) -> Schedule:
    """From 1 at t = 0 along half a cosine to `final` at t = rounds (Loshchilov & Hutter 1608.03983, eq. 5).

    Equals torch's CosineAnnealingLR up to there; afterwards it stays at `final` where torch's climbs again.
    """
    _whole("cosine", rounds=rounds)
    if not 0 <= final <= 1:
        raise UsageError(f"cosine: final is a factor of the base rate from 0 to 1, not {final}")
    return lambda t: final + (1 - final) * (1 + torch.cos(math.pi * _progress(t, rounds))) / 2


def exponential(gamma: float) -> Schedule:
    """gamma^t, as torch's ExponentialLR."""
    _above_zero("exponential", gamma=gamma)
    return lambda t: gamma ** _float(t)


def linear(warmup: int, start: float | None = None) -> Schedule:
    """Warm-up: a straight line from `start` at t = 0 to 1 at t = warmup, then 1, as torch's LinearLR.

    Without `start` the line begins at 1/(warmup + 1), so that no round is spent at rate 0.
    """
    _whole("linear", warmup=warmup)
    first = 1 / (warmup + 1) if start is None else start
    if not 0 < first <= 1:
        raise UsageError(f"linear: start is a factor of the base rate above 0 and at most 1, not {first}")
    return lambda t: first + (1 - first) * _progress(t, warmup)


def ramp(up: int, keep: int, decay: int, final: float = 0.01) -> Schedule:
    """Ramp up, keep, decay, keep: a line to 1 at t = up (as `linear`), 1 for `keep` rounds, then final^(s / decay) in
    the s-th round after these, down to `final`, which stays.
    """
    _whole("ramp", decay=decay)
    if up < 0 or keep < 0:
        raise UsageError(f"ramp: up and keep are numbers of rounds ≥ 0, not {up} and {keep}")
    if not 0 < final <= 1:
        raise UsageError(f"ramp: final is a factor of the base rate above 0 and at most 1, not {final}")
    rise = linear(up) if up else constant()
    return lambda t: rise(t) * final ** _progress((_float(t) - up - keep).clamp(min=0), decay)


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "constant": constant,
    "step": step,
    "multistep": multistep,
    "cosine": cosine,
    "exponential": exponential,
    "linear": linear,
    "ramp": ramp,
}


def schedule(spec: str) -> Schedule:
    """The schedule written as `cosine:100`, or as the product `linear:5+cosine:100`.

    Raises UsageError for an unknown name or a bad argument.
    """
    # A plus before a digit is an exponent's (1e+3); before anything else it joins two schedules.
    return product(*(resolve(part, SCHEDULES, "schedule") for part in re.split(r"\+(?!\d)", spec)))


def product(*schedules: Schedule) -> Schedule:
    """The schedule whose factor is the product of the others' factors, all of them at the same t."""

    def schedule(t: Tensor) -> Tensor:
        factor = torch.ones_like(_float(t))
        for one in schedules:
            factor = factor * one(t)
        return factor

    return schedule


def _float(t: Tensor) -> Tensor:
    return t if t.is_floating_point() else t.to(torch.get_default_dtype())


def _progress(t: Tensor, rounds: int) -> Tensor:
    """t / rounds, at most 1."""
    return (_float(t) / rounds).clamp(max=1)


def _whole(who: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{who}: {name} must be at least 1 round, not {value}")


def _above_zero(who: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UsageError(f"{who}: {name} must be a number above 0, not {value}")
