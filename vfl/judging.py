"""Which of a run's metrics are measured when, and whether those that judge it are measured at all."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vfl.data.container import Examples
from vfl.engine import Engine, RoundMetrics
from vfl.errors import UsageError
from vfl.evaluation import OBJECTIVE, PerClient, metric_names

if TYPE_CHECKING:
    from vfl.simulate import Evaluation

# What an evaluated metric is of. All others are every round's: client_bits_up, an algorithm's own.
_EVALUATED = re.compile(r"(test|validation)_|(client|personal)_(?:train|test)_")


def schedules(when: Evaluation) -> dict[str, int]:
    """Rounds between evaluations, by what a metric's name begins with; 0: never."""
    validation = when.every if when.validation_every is None else when.validation_every
    return {
        "test": when.every,
        "validation": validation,
        "client": when.clients_every,
        "personal": when.clients_every,
    }


def scheduled(metrics: RoundMetrics, when: Evaluation) -> RoundMetrics:
    """A round's metrics without those that were measured because the run ended there, or was interrupted.

    Nothing may be judged by these: an interrupted run would then go on otherwise than an uninterrupted one.
    """

    rounds = schedules(when)

    def due(name: str) -> bool:
        kind = _kind(name)
        every = when.every if name in when.metrics else rounds[kind] if kind else 1
        return every > 0 and metrics["round"] % every == 0

    return {name: value for name, value in metrics.items() if due(name)}


@functools.cache
def _kind(name: str) -> str | None:
    """Which of `schedules` a metric follows; None: it is there in every round."""
    found = _EVALUATED.match(name)
    return found and (found[1] or found[2])


def check_judges(judges: Sequence[str], engine: Engine, when: Evaluation) -> list[str]:
    """Those of the metrics which are to judge a run that no evaluation brings, so that its rounds must.

    Raises UsageError for one that only an evaluation could bring: what waits for it would wait for ever.
    """
    evaluated = _evaluated(engine, when) if judges else []
    missing = [name for name in judges if name not in evaluated]
    for name in missing:
        if _EVALUATED.match(name) or name in OBJECTIVE:
            hint = "; --validation sets examples aside for it" if name.startswith("validation_") else ""
            there = ", ".join(evaluated) or "nothing"
            raise UsageError(f"{name} is to judge this run but is never measured: what is evaluated is {there}{hint}")
    return missing


def _evaluated(engine: Engine, when: Evaluation) -> list[str]:
    """The names of all that is evaluated on this schedule, in whatever round."""
    task, data, every = engine.task, engine.data, schedules(when)

    def names(examples: Examples) -> list[str]:
        return metric_names(task, task.x, task.buffers, examples, data.transform)

    found = list(when.metrics) if when.every else []
    for split, examples in (("test", data.test), ("validation", data.validation)):
        if examples is not None and every[split]:
            found += [f"{split}_{name}" for name in names(examples)]
    if when.clients_every:
        own, split = (data.clients, "train") if data.held_out is None else (data.held_out, "test")
        whose = ["client"] if engine.algorithm.personal is None else ["client", "personal"]
        each = [f"{split}_{name}_{part}" for name in names(Examples(own.x, own.y)) for part in PerClient._fields]
        found += [f"{kind}_{name}" for kind in whose for name in each]
    return found
