"""A run in one call: `rounds` is the loop, `simulate` its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from vfl.base import Algorithm
from vfl.data.container import FederatedData
from vfl.distributed import Ranks
from vfl.engine import Engine, RoundMetrics, State
from vfl.evaluation import evaluate, evaluate_clients
from vfl.local import Work
from vfl.task import Task
from vfl.training import AlgorithmConfig


class Result(NamedTuple):
    """What a run leaves."""

    state: State  # after the last round
    history: list[RoundMetrics]  # one entry a round

    @property
    def x(self) -> Tensor:
        """The final model [D]."""
        return self.state.server.x


class Evaluation(NamedTuple):
    """When to evaluate what: every so many rounds (0: never), and always after the last one."""

    every: int = 1  # the global test and validation sets
    clients_every: int = 0  # the clients' own data: what was held out of it, else what they train on


def rounds(
    algorithm: Algorithm | AlgorithmConfig,
    task: Task,
    data: FederatedData,
    rounds: int,
    *,
    seed: int = 0,
    batch_size: int | None = 20,
    local_epochs: int = 1,
    local_steps: int | None = None,
    evaluation: Evaluation = Evaluation(),
    state: State | None = None,
    stop: Callable[[], bool] = lambda: False,
    **engine: Any,
) -> Iterator[tuple[State, RoundMetrics]]:
    """Plays rounds and yields (state, metrics) after each, until `rounds` are done or `stop()` is true on some rank.

    `state` continues an earlier run; every other keyword goes to `vfl.Engine` (clients_per_round, sampling, execution,
    chunk, client_state, on_nonfinite, profile, ranks). Metrics, by name: `round`; `train_loss` (mean over the examples
    that the clients visited); `test_loss`, `test_accuracy` and the like where evaluated; `bits_up`, `bits_down`,
    `gradients` (sample-gradients): cumulative; `clients` in the cohort; `dropped` for NaN; `seconds` of this round
    without evaluation; `chunk` and `execution` as chosen; `seconds_<phase>` with `profile`, for the phases of
    `vfl.profiling`. Raises UsageError, DivergedError, ClientError.
    """
    player = make_engine(
        algorithm, task, data, batch_size=batch_size, local_epochs=local_epochs, local_steps=local_steps, **engine
    )
    start = player.init(seed) if state is None else state
    yield from play(player, start, rounds, evaluation=evaluation, stop=stop)


def make_engine(
    algorithm: Algorithm | AlgorithmConfig,
    task: Task,
    data: FederatedData,
    *,
    batch_size: int | None = 20,
    local_epochs: int = 1,
    local_steps: int | None = None,
    **engine: Any,
) -> Engine:
    """The engine of an experiment; the keywords are those of `rounds`."""
    if not isinstance(algorithm, Algorithm):
        algorithm = algorithm.build(task, data.clients.population)
    return Engine(algorithm, task, data, work=Work(batch_size, local_epochs, local_steps), **engine)


def play(
    engine: Engine,
    state: State,
    rounds: int,
    *,
    evaluation: Evaluation = Evaluation(),
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[State, RoundMetrics]]:
    """`rounds` on an engine, from a state of its own."""
    while state.round < rounds:
        state, metrics = engine.play(state, rounds, stop)
        stopping = metrics.pop("stopping")
        last = stopping or state.round == rounds
        with engine.clock("evaluation"):
            found = scores(engine.task, engine.data, state, evaluation, last, engine.ranks)
        evaluating = {name: seconds for name, seconds in engine.clock.read().items() if seconds}
        yield state, metrics | evaluating | found
        if stopping:
            return


def simulate(
    algorithm: Algorithm | AlgorithmConfig, task: Task, data: FederatedData, rounds: int, **options: Any
) -> Result:
    """All the rounds at once; the options are those of `rounds`."""
    played = list(_rounds(algorithm, task, data, rounds, **options))
    if not played:
        raise ValueError(f"simulate needs at least one round to play, not {rounds}")
    return Result(played[-1][0], [metrics for _, metrics in played])


_rounds = rounds


def scores(
    task: Task, data: FederatedData, state: State, when: Evaluation, last: bool, ranks: Ranks = Ranks()
) -> dict[str, float]:
    """The evaluation metrics that are due after this round."""

    def due(every: int) -> bool:
        return every > 0 and (last or state.round % every == 0)

    x, found = state.server.x, {}
    if due(when.every):
        for split, examples in (("test", data.test), ("validation", data.validation)):
            if examples is not None:
                values = evaluate(task, x, state.buffers, examples, data.transform, ranks)
                found |= {f"{split}_{name}": value for name, value in values.items()}
    if due(when.clients_every):
        own, split = (data.clients, "train") if data.held_out is None else (data.held_out, "test")
        spreads = evaluate_clients(task, x, state.buffers, own, data.transform, ranks)
        for name, spread in spreads.items():
            found |= {f"client_{split}_{name}_{part}": value for part, value in spread._asdict().items()}
    return found
