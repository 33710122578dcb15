"""A run in one call: `rounds` is the loop, `simulate` its result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vfl.base import Algorithm
from vfl.chunks import Memory
from vfl.data.container import FederatedData
from vfl.distributed import Ranks
from vfl.engine import Engine, RoundMetrics
from vfl.evaluation import check_metrics, evaluate, evaluate_clients, measure
from vfl.judging import check_judges, scheduled, schedules
from vfl.local import BatchSize, Draw, Reshuffle, Work
from vfl.personal import evaluate_personal
from vfl.plateau import Plateau
from vfl.replicas import Replication, over_grid, stacked, summarized
from vfl.samplers import Amount
from vfl.state import State
from vfl.stopping import Standing, Stopping
from vfl.task import Task
from vfl.training import AlgorithmConfig
from vfl.wrappers import Context, Wrapper, wrapped

log = logging.getLogger("vfl")


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

    every: int = 1  # the global test set, the validation set unless it has its own, and the metrics
    clients_every: int = 0  # the clients' own data: what was held out of it, else what they train on
    metrics: tuple[str, ...] = ()  # of the objective f: objective, grad_norm, suboptimality, distance
    validation_every: int | None = None  # the global validation set; None: as often as the test set


def rounds(
    algorithm: Algorithm | AlgorithmConfig,
    task: Task,
    data: FederatedData,
    rounds: int,
    *,
    seed: int = 0,
    batch_size: BatchSize = 20,
    local_epochs: int = 1,
    local_steps: int | None = None,
    evaluation: Evaluation = Evaluation(),
    stopping: Stopping = Stopping(),
    plateau: Plateau = Plateau(),
    state: State | None = None,
    stop: Callable[[], bool] = lambda: False,
    **engine: Any,
) -> Iterator[tuple[State, RoundMetrics]]:
    """Plays rounds and yields (state, metrics) after each, until `rounds` are done or `stop()` is true on some rank.

    `stopping` ends the run early by its metrics; `plateau` lowers a step size where one no longer improves.
    `batch_size` is a count, a share of each client's examples (`0.1`, `10%`) or None for all of them; `draw` and
    `reshuffle`, keywords too, are those of `vfl.Work`. `state` continues an earlier run; every other keyword goes to
    `vfl.Engine` (clients_per_round, sampling, execution, chunk, client_state, on_nonfinite, profile, importance,
    replicas, ranks); `importance` [M] is what the examples' probabilities are proportional to under draw importance,
    by default their inputs' squared norms. `wrappers` change the algorithm, the first one innermost. Metrics, by name:
    `round`; `train_loss` (mean over the examples that the clients visited); `test_loss`, `test_accuracy` and the like
    where evaluated, and the metrics of `evaluation`; `client_test_accuracy_mean` and the like over the clients,
    `personal_…` for their own models; `bits_up`, `bits_down`, `gradients` (sample-gradients): cumulative;
    `round_bits_up`, `round_bits_down`: of this round; `client_bits_up`, `client_bits_down`: cumulative, the mean over
    the population; `clients` in the cohort; `dropped` for NaN; `seconds` of this round without evaluation; `memory`
    where evaluated and the system tells: the most bytes in use, on a GPU since it was last reported, else by the
    process so far; `chunk` and `execution` as chosen; `seconds_<phase>` with `profile`, for the phases of
    `vfl.profiling`. With `replicas`, a count R or a `vfl.Replication`, runs of R seeds from `seed` on: each metric's
    mean, its `<name>_std`, and in `replicas` each run's own.

    Raises UsageError, DivergedError, ClientError.
    """
    player = make_engine(
        plateau.configure(algorithm),
        task,
        data,
        batch_size=batch_size,
        local_epochs=local_epochs,
        local_steps=local_steps,
        rounds=rounds,
        **engine,
    )
    start = player.init(seed) if state is None else state
    yield from play(player, start, rounds, evaluation=evaluation, stopping=stopping, plateau=plateau, stop=stop)


def make_engine(
    algorithm: Algorithm | AlgorithmConfig,
    task: Task,
    data: FederatedData,
    *,
    batch_size: BatchSize = 20,
    local_epochs: int = 1,
    local_steps: int | None = None,
    draw: Draw = "epochs",
    reshuffle: Reshuffle = "epoch",
    wrappers: Sequence[Wrapper] = (),
    rounds: int = 1,
    clients_per_round: Amount = 10,
    sampling: str = "uniform",
    **engine: Any,
) -> Engine:
    """The engine of an experiment of so many rounds in all; the keywords are those of `rounds`."""
    population, replicas = data.clients.population, engine.get("replicas")
    context = Context(population, clients_per_round, sampling, rounds, data)

    def built(config: AlgorithmConfig) -> Algorithm:
        return wrapped(config.build(task, population), wrappers, task, context)

    if isinstance(algorithm, Algorithm):
        algorithm = wrapped(algorithm, wrappers, task, context)
    elif isinstance(replicas, Replication) and replicas.grid:
        replicas.check()
        algorithm = over_grid(algorithm, built, list(replicas.grid))
    else:
        algorithm = built(algorithm)
    work = Work(batch_size, local_epochs, local_steps, draw, reshuffle)
    return Engine(algorithm, task, data, clients_per_round=clients_per_round, sampling=sampling, work=work, **engine)


def play(
    engine: Engine,
    state: State,
    rounds: int,
    *,
    evaluation: Evaluation = Evaluation(),
    stopping: Stopping = Stopping(),
    plateau: Plateau = Plateau(),
    stop: Callable[[], bool] = lambda: False,
    standing: Standing = Standing(),
) -> Iterator[tuple[State, RoundMetrics]]:
    """`rounds` on an engine, from a state of its own.

    `standing` is where `stopping` goes on from in a resumed run, the same on every rank. With a `plateau`, the engine's
    algorithm is built from the options that `plateau.configure` returns.
    """
    check_metrics(evaluation.metrics, engine.task)
    unproven = check_judges([*stopping.judges, *plateau.judges], engine, evaluation)
    memory = Memory(engine.device)
    while state.round < rounds and stopping.reason(standing) is None:
        before = state.totals
        state, metrics = engine.play(state, rounds, stop)
        for name in ("bits_up", "bits_down"):
            spent = np.asarray(metrics[name])
            metrics[f"round_{name}"] = (spent - np.asarray(getattr(before, name))).tolist()
            metrics[f"client_{name}"] = (spent / engine.data.clients.population).tolist()
        asked = metrics.pop("stopping")
        last = asked or state.round == rounds
        with engine.clock("evaluation"):
            if engine.replicas is None:
                found = scores(engine.task, engine.data, state, evaluation, last, engine.ranks)
                found |= personal_scores(engine, state, evaluation, last)
            else:
                each = [state.replica(r) for r in range(len(engine.replicas.settings()))]
                found = stacked([
                    scores(engine.task, engine.data, one, evaluation, last)
                    | personal_scores(engine, one, evaluation, last)
                    for one in each
                ])  # fmt: skip
        metrics |= {name: seconds for name, seconds in engine.clock.read().items() if seconds}
        # Asking for it takes a tenth of a millisecond, so only where an evaluation takes its time anyway.
        if _due(evaluation.every, state, last) and (peak := memory.peak()) is not None:
            metrics["memory"] = peak
            memory.used()  # on a GPU, a new measurement begins
        metrics |= found
        if engine.replicas is not None:
            metrics = summarized(metrics, engine.replicas)
        state, judged = plateau.after(state, scheduled(metrics, evaluation))
        standing = stopping.after(standing, judged)
        for name in unproven:
            if name not in metrics:
                there = ", ".join(name for name, value in metrics.items() if isinstance(value, float))
                log.warning(f"round {state.round} has no metric {name!r}, by which this run is judged; it has {there}")
        unproven = []  # said once
        yield state, metrics | judged
        if asked:
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
    x, found = state.server.x, {}
    for split, examples in (("test", data.test), ("validation", data.validation)):
        if examples is not None and _due(schedules(when)[split], state, last):
            values = evaluate(task, x, state.buffers, examples, data.transform, ranks)
            found |= {f"{split}_{name}": value for name, value in values.items()}
    if when.metrics and _due(when.every, state, last):
        found |= measure(when.metrics, task, x, state.buffers, data.clients, data.transform, ranks)
    if _due(when.clients_every, state, last):
        own, split = (data.clients, "train") if data.held_out is None else (data.held_out, "test")
        spreads = evaluate_clients(task, x, state.buffers, own, data.transform, ranks)
        for name, spread in spreads.items():
            found |= {f"client_{split}_{name}_{part}": value for part, value in spread._asdict().items()}
    return found


def personal_scores(engine: Engine, state: State, when: Evaluation, last: bool) -> dict[str, float]:
    """As the clients' scores that are due after this round, of each client's own model where the algorithm has such."""
    if engine.algorithm.personal is None or not _due(when.clients_every, state, last):
        return {}
    split = "train" if engine.data.held_out is None else "test"
    return {
        f"personal_{split}_{name}_{part}": value
        for name, values in evaluate_personal(engine, state).items()
        for part, value in values._asdict().items()
    }


def _due(every: int, state: State, last: bool) -> bool:
    return every > 0 and (last or state.round % every == 0)
