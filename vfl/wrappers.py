"""What changes any algorithm: options whose `wrap` takes an algorithm and gives another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vfl.base import Algorithm
from vfl.task import Task


class Wrapper(Protocol):
    """Options of a change that any algorithm can undergo; those that are off give the algorithm itself."""

    def wrap(self, algorithm: Algorithm, task: Task, population: int) -> Algorithm:
        """The changed algorithm for N = population clients. Raises UsageError where it cannot be changed so."""
        ...


def wrapped(algorithm: Algorithm, wrappers: Iterable[Wrapper], task: Task, population: int) -> Algorithm:
    """The algorithm with all the changes, the first one innermost."""
    for wrapper in wrappers:
        algorithm = wrapper.wrap(algorithm, task, population)
    return algorithm
