"""Reduce-on-plateau: a step size that falls when a metric stops improving, and the best model to fall back to.

The best value, the measurements since then, the step size in force and, to fall back to it, the best model are part of
the server's state: a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from vfl.base import Algorithm, Tree, nested, tree_map, with_model
from vfl.engine import RoundMetrics
from vfl.errors import UsageError, unknown
from vfl.replicas import Varied, over_grid
from vfl.state import State
from vfl.stopping import criterion
from vfl.task import Task
from vfl.training import AlgorithmConfig

Rate = Literal["local_lr", "server_lr"]


class Steered(NamedTuple):
    """The server's state, with what the plateau is judged by."""

    inner: Varied  # the algorithm's own, and the step size in force
    best: Tensor  # [] float64, NaN at first
    since: Tensor  # [] int64 measurements since the best
    kept: Tree  # the best model [D] and the module's buffers then; () without falling back

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


class SteeredConfig(NamedTuple):
    """An algorithm's options, and what may change of them while it runs."""

    config: AlgorithmConfig
    plateau: Plateau

    def build(self, task: Task, population: int) -> Algorithm:
        """The algorithm for this task."""
        over = over_grid(self.config, lambda config: config.build(task, population), [self.plateau.plateau_rate])
        return _steered(over, task, self.plateau)


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """A step size that falls when a metric stops improving."""

    plateau_patience: int = 0
    """Lower a step size after so many measurements of --plateau-metric in a row without a better one; 0: never."""
    plateau_metric: str = "validation_loss"
    """What has to improve: a metric whose direction is known, or any with its own, as NAME:min or NAME:max."""
    plateau_factor: float = 0.1
    """What the step size is multiplied by."""
    plateau_rate: Rate = "local_lr"
    """Which step size: the clients' (local_lr) or the server's (server_lr)."""
    fall_back: bool = False
    """Go back to the best model, too, whenever the step size falls."""

    def __post_init__(self) -> None:
        if self.plateau_patience < 0:
            raise UsageError(f"plateau-patience must be at least 0, not {self.plateau_patience}")
        criterion(self.plateau_metric)
        if not 0 < self.plateau_factor < 1:
            raise UsageError(f"plateau-factor must be above 0 and below 1, not {self.plateau_factor}")
        if self.plateau_rate not in get_args(Rate):
            raise unknown("plateau-rate", str(self.plateau_rate), get_args(Rate))
        if self.fall_back and not self.plateau_patience:
            raise UsageError("fall-back goes back when a metric stops improving: give plateau-patience, 1 at least")

    @property
    def judges(self) -> list[str]:
        """The metrics that it looks at."""
        return [criterion(self.plateau_metric).metric] if self.plateau_patience else []

    def configure(self, config: Algorithm | AlgorithmConfig) -> Algorithm | AlgorithmConfig:
        """The options of an algorithm whose step size this may lower; as they are when it never does.

        Raises UsageError for an algorithm that is built already, which has no options left.
        """
        if not self.plateau_patience:
            return config
        if isinstance(config, Algorithm):
            raise UsageError("a plateau lowers a step size among an algorithm's options: give these, not an Algorithm")
        return SteeredConfig(config, self)

    def after(self, state: State, metrics: RoundMetrics) -> tuple[State, RoundMetrics]:
        """The state to go on from after a round with these metrics, which then say the step size of the next one."""
        if not self.plateau_patience:
            return state, metrics
        of, server = criterion(self.plateau_metric), _find(state.server)
        if "replicas" in metrics or server.best.dim():
            raise UsageError("a plateau lowers the step size of one run: give no replicas and no grid")
        if of.metric in metrics:
            value = torch.tensor(float(metrics[of.metric]), dtype=torch.float64, device=server.best.device)
            than = float(server.best)
            if of.better(float(value), None if than != than else than):
                kept = _copy((server.x, state.buffers)) if self.fall_back else ()
                server = server._replace(best=value, since=torch.zeros_like(server.since), kept=kept)
            else:
                server = server._replace(since=server.since + 1)
            if int(server.since) >= self.plateau_patience:
                state, server = self._lower(state, server)
            state = state._replace(server=_within(state.server, lambda _: server))
        return state, {**metrics, self.plateau_rate: float(server.inner.values[self.plateau_rate])}

    def _lower(self, state: State, server: Steered) -> tuple[State, Steered]:
        """The step size falls; with `fall_back`, the best model returns."""
        inner = server.inner._replace(
            values={name: value * self.plateau_factor for name, value in server.inner.values.items()}
        )
        if self.fall_back:
            x, buffers = _copy(server.kept)
            inner, state = with_model(inner, x), state._replace(buffers=buffers)
        return state, server._replace(inner=inner, since=torch.zeros_like(server.since))


def _steered(algorithm: Algorithm, task: Task, plateau: Plateau) -> Algorithm:
    """The algorithm whose server remembers what its plateau is judged by."""

    def init_server(x: Tensor) -> Steered:
        best = torch.full((), torch.nan, dtype=torch.float64, device=x.device)
        kept = _copy((x, task.buffers)) if plateau.fall_back else ()
        return Steered(algorithm.init_server(x), best, torch.zeros_like(best, dtype=torch.int64), kept)

    if algorithm.idle or algorithm.expect:
        raise UsageError(
            "a plateau goes inside of delays: configure the algorithm's options, then wrap what they build"
        )
    return nested(algorithm)._replace(init_server=init_server)


def _copy(tree: Tree) -> Tree:
    """In memory of its own, as checkpoints need it."""
    return tree_map(torch.clone, tree)


def _find(server: Any) -> Steered:
    """The steered state inside of wrappers' states."""
    while not isinstance(server, Steered):
        if not hasattr(server, "inner"):
            raise UsageError("a plateau needs the algorithm that its `configure` returns")
        server = server.inner
    return server


def _within(server: Any, change: Callable[[Steered], Steered]) -> Any:
    """The same wrappers' states around a changed steered one."""
    if isinstance(server, Steered):
        return change(server)
    return cast(Any, server)._replace(inner=_within(server.inner, change))
