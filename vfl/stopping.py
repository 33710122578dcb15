"""When a run has learnt enough, and which of its models was the best: folds over the rounds' metrics.

A standing is a function of the metrics alone, so a resumed run has it from the rounds it recorded, and all ranks agree.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vfl.distributed import Ranks
from vfl.errors import UsageError
from vfl.evaluation import OBJECTIVE

# Of a model's own evaluation or its spread over the clients; whoever adds a metric says what is better.
_KNOWN = re.compile(
    r"(?:train|test|validation)_(loss|accuracy)|(?:client|personal)_(?:train|test)_(loss|accuracy)_(?:mean|p10|worst)"
)
_OF_THE_MACHINE = frozenset({"seconds", "memory", "chunk", "execution", "round", "replicas"})


class Criterion(NamedTuple):
    """A metric to judge models by."""

    metric: str
    low: bool  # whether lower is better

    def better(self, value: float, than: float | None) -> bool:
        """Whether the value is better; NaN never is, and any other is better than none."""
        if math.isnan(value):
            return False
        return than is None or (value < than if self.low else value > than)


def criterion(text: str) -> Criterion:
    """`test_accuracy`, whose direction is known, or any metric with its own: `arrived:max`, `test_perplexity:min`.

    Raises UsageError for a metric whose direction is neither known nor given, and for one that differs between ranks
    or machines, as times do.
    """
    name, colon, direction = (part.strip() for part in text.partition(":"))
    if not name or name in _OF_THE_MACHINE or name.startswith("seconds_"):
        raise UsageError(f"{name or 'nothing'!r} cannot judge a model: name a metric of the run, such as test_accuracy")
    if colon and direction not in ("min", "max"):
        raise UsageError(f"metric {text!r}: after the colon comes min or max, not {direction!r}")
    known = _KNOWN.fullmatch(name)
    if not colon and known is None and name not in OBJECTIVE:
        raise UsageError(f"metric {name!r}: say whether lower or higher is better, as {name}:min or {name}:max")
    return Criterion(name, direction == "min" if colon else known is None or "loss" in known.groups())


class Target(NamedTuple):
    """A value to reach."""

    of: Criterion
    value: float


def target(text: str) -> Target:
    """`test_accuracy=0.9`, `validation_loss=0.1`. Raises UsageError when it is not that."""
    name, equals, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not equals or not math.isfinite(value):
        raise UsageError(f"stop-at {text!r} is not like test_accuracy=0.9: a metric, = and the number to reach")
    return Target(criterion(name), value)


class Standing(NamedTuple):
    """How a run stands after some rounds."""

    best: float | None = None  # the best value of the metric that judges
    round: int = 0  # after which that was measured
    since: int = 0  # measurements since then
    reached: int | None = None  # the round that met the target


def agreed(standing: Standing, ranks: Ranks, device: torch.device) -> Standing:
    """The first rank's standing, on every rank; what others read of a shared folder may be older."""
    best, round, since, reached = standing if ranks.first else Standing()
    given = [best is not None, best or 0, round, since, reached or 0]
    known, value, *counts = ranks.all_reduce(torch.tensor(given, dtype=torch.float64, device=device)).tolist()
    round, since, reached = map(int, counts)
    return Standing(value if known else None, round, since, reached or None)


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When to stop before all rounds are played, and what says which model is best."""

    best_by: str | None = None
    """Metric that says which round's model is the best, kept as best.safetensors: validation_loss, test_accuracy, or
    any other with its direction, as NAME:min or NAME:max."""
    patience: int | None = None
    """Stop after so many measurements in a row without a better --best-by (validation_loss if that is not given)."""
    stop_at: str | None = None
    """Stop when a metric reaches a value: test_accuracy=0.9 (at least), test_loss=0.3 (at most)."""

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"patience must be at least 1, not {self.patience}")
        if self.best_by is not None:
            criterion(self.best_by)
        if self.stop_at is not None:
            target(self.stop_at)

    @property
    def criterion(self) -> Criterion | None:
        """What says which model is the best; None: nothing needs to."""
        if self.best_by is None and self.patience is None:
            return None
        return criterion(self.best_by or "validation_loss")

    @property
    def judges(self) -> list[str]:
        """The metrics that it looks at."""
        found = [] if self.criterion is None else [self.criterion.metric]
        return found if self.stop_at is None else [*found, target(self.stop_at).of.metric]

    def standing(self, history: Iterable[Mapping[str, Any]] = ()) -> Standing:
        """How a run of these rounds stands."""
        return functools.reduce(self.after, history, Standing())

    def after(self, standing: Standing, metrics: Mapping[str, Any]) -> Standing:
        """How it stands after one more round; a round that measured nothing counts for nothing."""
        if self.criterion is not None and self.criterion.metric in metrics:
            value = _number(metrics[self.criterion.metric])
            if self.criterion.better(value, standing.best):
                standing = standing._replace(best=value, round=metrics["round"], since=0)
            else:
                standing = standing._replace(since=standing.since + 1)
        if self.stop_at is not None and standing.reached is None:
            wanted = target(self.stop_at)
            value = _number(metrics.get(wanted.of.metric))
            if value == wanted.value or wanted.of.better(value, wanted.value):
                standing = standing._replace(reached=metrics["round"])
        return standing

    def reason(self, standing: Standing) -> str | None:
        """Why the run ends here, as a sentence; None: it goes on."""
        if standing.reached is not None:
            return f"reached {self.stop_at} in round {standing.reached}"
        if self.patience is not None and self.criterion is not None and standing.since >= self.patience:
            best = "none" if standing.best is None else f"{standing.best:g} of round {standing.round}"
            return f"no better {self.criterion.metric} in {standing.since} measurements (best: {best})"
        return None


def _number(value: Any) -> float:
    """A metric's value; NaN for one that was not measured or, in a file, was not finite."""
    return float(value) if isinstance(value, int | float) else math.nan
