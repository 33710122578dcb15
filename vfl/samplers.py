"""Who takes part in a round. N population, S cohort. Drawn on the host, in time that grows with S and not with N."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vfl import random
from vfl.errors import UsageError
from vfl.spec import parse, resolve


class Cohort(NamedTuple):
    """The clients of a round."""

    ids: np.ndarray  # [S] int64
    factor: np.ndarray  # [S] float64; multiplies each client's weight (1, or the inverse of its sampling probability)


class Sampler(NamedTuple):
    """Draws cohorts from a population with the given offsets [N + 1] of its examples."""

    draw: Callable[[Tensor], Cohort]  # key [] → cohort
    distinct: bool  # no client can come twice; algorithms with client state need that
    fixed_size: bool = True  # every cohort has as many clients; replicas need that


Amount = str | int | float
"""How many clients: a count, a fraction (`0.1`, `10%`) of the population, `all`, or for `sampler` a range (`5..20`)."""


def cohort_size(amount: Amount, population: int) -> int:
    """The count that an amount means. Raises UsageError when it is no amount, below one client or above all."""
    value = _amount(amount, population)
    return max(round(value * population), 1) if isinstance(value, float) else value


def cohort_rate(amount: Amount, population: int) -> float:
    """The share q of the population that an amount means, not rounded to whole clients."""
    value = _amount(amount, population)
    return value if isinstance(value, float) else value / population


def _amount(amount: Amount, population: int) -> int | float:
    """A count (int) from 1 to the population, or a share (float) in (0, 1]."""
    text = str(amount).strip()
    if ".." in text:
        raise UsageError(f"clients-per-round {text} is a range, and here it takes one number of clients a round: a "
                         "count, a fraction (0.1 or 10%) or 'all'")  # fmt: skip
    try:
        if text == "all":
            return population
        if text.endswith("%"):
            value = float(text[:-1]) / 100
        elif isinstance(amount, float) or not text.lstrip("-").isdigit():
            value = float(text)
        else:
            value = int(text)
    except ValueError:
        raise UsageError(f"clients-per-round {text!r} is not a count, a fraction (0.1 or 10%) or 'all'") from None
    if isinstance(value, float) and not 0 < value <= 1:
        raise UsageError(f"clients-per-round {text!r} is a fraction outside (0, 1]; write a whole number for a count")
    if value < 1 and isinstance(value, int):
        raise UsageError(f"clients-per-round must be at least 1, not {value}")
    if value > population:
        raise UsageError(f"clients-per-round is {value}, above the population of {population} clients")
    return value


def uniform(*, amount: Amount, offsets: np.ndarray) -> Sampler:
    """S clients without replacement, every set equally likely."""
    population = len(offsets) - 1
    count = cohort_size(amount, population)

    def draw(key: Tensor) -> Cohort:
        if count == population:
            return _plain(np.arange(population))
        return _plain(random.generator(key).choice(population, count, replace=False, shuffle=False))

    return Sampler(draw, True)


def replacement(*, amount: Amount, offsets: np.ndarray) -> Sampler:
    """S independent uniform draws; a client drawn twice counts twice."""
    population = len(offsets) - 1
    count = cohort_size(amount, population)
    return Sampler(lambda key: _plain(random.generator(key).integers(population, size=count)), False)


def poisson(*, amount: Amount, offsets: np.ndarray) -> Sampler:
    """Every client independently with probability q = S/N, as privacy accounting assumes; a cohort may be empty.

    A fraction is q itself, not rounded to whole clients.
    """
    population = len(offsets) - 1
    q = cohort_rate(amount, population)

    def draw(key: Tensor) -> Cohort:
        # A binomial count, then a uniform set of that size: the same law as N coins, without tossing them.
        generator = random.generator(key)
        count = generator.binomial(population, q)
        return _plain(generator.choice(population, count, replace=False, shuffle=False))

    return Sampler(draw, True, False)


def fixed(*ids: int, amount: Amount, offsets: np.ndarray) -> Sampler:
    """The listed clients, every round; without a list, the first S."""
    population = len(offsets) - 1
    chosen = np.array(ids or range(cohort_size(amount, population)), dtype=np.int64)
    if len(np.unique(chosen)) < len(chosen):
        raise UsageError(f"sampler fixed names a client twice: {', '.join(map(str, ids))}")
    if chosen.min() < 0 or chosen.max() >= population:
        raise UsageError(f"sampler fixed names a client outside 0 … {population - 1}: {', '.join(map(str, ids))}")
    return Sampler(lambda key: _plain(chosen), True)


def weighted(*, amount: Amount, offsets: np.ndarray) -> Sampler:
    """S independent draws with probability pᵢ ∝ nᵢ, each client's weight divided by N·pᵢ (Li et al., 1907.02189).

    So the mean estimates the same quantity as full participation: weights nᵢ become a plain mean of the draws.
    """
    population, total = len(offsets) - 1, int(offsets[-1])
    count = cohort_size(amount, population)

    def draw(key: Tensor) -> Cohort:
        # A uniform example's owner is a client drawn by size: log N, no table beside the offsets.
        examples = random.generator(key).integers(total, size=count)
        ids = np.searchsorted(offsets, examples, side="right") - 1
        return Cohort(ids, total / (population * (offsets[ids + 1] - offsets[ids])))

    return Sampler(draw, False)


SAMPLERS = {f.__name__: f for f in (uniform, replacement, poisson, fixed, weighted)}


def sampler(spec: str, amount: Amount, offsets: np.ndarray) -> Sampler:
    """The sampler that `uniform | replacement | poisson | weighted | fixed:0,3,5` names, of `amount` clients.

    An amount `5..20` is a range: each round draws its size first, every size equally likely.
    """
    low, dots, high = str(amount).partition("..")
    if dots:
        return ranged(spec, low, high, offsets)
    return resolve(spec, SAMPLERS, "sampler", amount=amount, offsets=offsets)


def ranged(spec: str, low: Amount, high: Amount, offsets: np.ndarray) -> Sampler:
    """The named sampler with S uniform on low … high, drawn anew in each round."""
    least, most = (cohort_size(amount, len(offsets) - 1) for amount in (low, high))
    if least > most:
        raise UsageError(f"clients-per-round {low}..{high} ends below its beginning; write the smaller number first")
    if parse(spec).name in ("poisson", "fixed"):
        why = "varies by itself" if parse(spec).name == "poisson" else "is the same in every round"
        raise UsageError(f"clients-per-round {low}..{high}: a cohort of sampler {spec} {why}, so give one number")

    def of_size(count: int) -> Sampler:
        return resolve(spec, SAMPLERS, "sampler", amount=count, offsets=offsets)

    def draw(key: Tensor) -> Cohort:
        size_key, cohort_key = random.split(key).unbind(-1)
        return of_size(int(random.generator(size_key).integers(least, most + 1))).draw(cohort_key)

    return Sampler(draw, of_size(most).distinct, False)


def _plain(ids: np.ndarray) -> Cohort:
    return Cohort(np.sort(ids.astype(np.int64)), np.ones(len(ids)))
