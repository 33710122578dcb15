"""Step sizes by theory: a configuration with those that its method's theorem gives for a problem.

L, μ and what else a theorem asks for are known for linear models (`vfl.problems`). A configuration that has a theorem
offers `by_theory(setting)`; any other is refused with the reason.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

from vfl.data.container import FederatedData
from vfl.errors import UsageError
from vfl.local import Work
from vfl.problems import Smoothness
from vfl.samplers import Amount, cohort_size
from vfl.task import Task

Config = TypeVar("Config")


class Setting(NamedTuple):
    """What theorems ask about a run."""

    smoothness: Smoothness
    task: Task
    population: int  # N
    clients: int  # S, of a round
    steps: int  # K, the most that a client takes in a round


class HasTheory(Protocol):
    """A configuration with a theorem."""

    def by_theory(self, setting: Setting, /) -> Any:
        """The configuration with its theorem's step sizes. Raises UsageError where the theorem does not hold."""
        ...


def by_theory(
    config: Config, task: Task, data: FederatedData, *, clients_per_round: Amount = 10, work: Work = Work()
) -> Config:
    """The configuration with the step sizes (and what else) of its method's theorem.

    Raises UsageError where the method has none, where its conditions do not hold, and for a task whose constants are
    not known: those of `vfl.LinearProblem.task` are.
    """
    name = type(config).__name__.lower()
    made = getattr(config, "by_theory", None)
    if made is None:
        raise UsageError(f"{name} has no step size from theory that L and μ alone decide; leave step-size at given")
    if task.problem is None:
        raise UsageError("step sizes by theory need the objective's L and μ, which are known for linear models alone: "
                         "use model linear, or leave step-size at given")  # fmt: skip
    population = data.clients.population
    steps = int(work.counts(data.clients.sizes()).max())
    clients = cohort_size(clients_per_round, population)
    return made(Setting(task.problem.smoothness, task, population, clients, steps))
