"""What changes any algorithm: options whose `wrap` takes an algorithm and gives another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from vfl.base import Algorithm
from vfl.data.container import Examples, FederatedData, Transform
from vfl.errors import UsageError
from vfl.samplers import Amount, cohort_rate, cohort_size
from vfl.spec import parse
from vfl.task import Task


class Context(NamedTuple):
    """What a run consists of beside its algorithm."""

    population: int  # N
    clients_per_round: Amount
    sampling: str  # the sampler, as on the command line
    rounds: int  # of the whole run, those before a resume included
    data: FederatedData | None = None

    @property
    def cohort(self) -> float:
        """The expected number of clients in a round."""
        if parse(self.sampling).name == "poisson":
            return cohort_rate(self.clients_per_round, self.population) * self.population
        listed = parse(self.sampling).args
        return len(listed) if listed else cohort_size(self.clients_per_round, self.population)

    def server_examples(self, need: str) -> tuple[Examples, Transform]:
        """The examples that the server holds, the global validation set, and how the model takes them.

        Raises UsageError where there is no such set; `need` says, as the sentence's beginning, who needs it.
        """
        if self.data is None or self.data.validation is None:
            raise UsageError(f"{need}, and there is no validation set: validation 0.1 sets a tenth of the training "
                             "examples aside")  # fmt: skip
        return self.data.validation, self.data.transform


class Wrapper(Protocol):
    """Options of a change that any algorithm can undergo; those that are off give the algorithm itself."""

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The changed algorithm. Raises UsageError where it cannot be changed so."""
        ...


def wrapped(algorithm: Algorithm, wrappers: Iterable[Wrapper], task: Task, context: Context) -> Algorithm:
    """The algorithm with all the changes, the first one innermost."""
    for wrapper in wrappers:
        algorithm = wrapper.wrap(algorithm, task, context)
    return algorithm
