"""Replicas: runs of several seeds, or of several step sizes, played together as one more vmap axis R."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfl.base import Algorithm, Broadcast, Mean, Message, Metrics, Tree, expecting, idled, of_inner
from vfl.errors import UsageError
from vfl.local import Batches
from vfl.training import AlgorithmConfig

STEP_SIZES = ("local_lr", "server_lr")  # what a grid may vary: numbers that only ever multiply


class Replication(NamedTuple):
    """Which runs are played together: every combination of the grid's values, each with as many seeds."""

    seeds: int = 1
    grid: Mapping[str, tuple[float, ...]] = {}  # an algorithm's option → its values

    def settings(self) -> list[dict[str, float]]:
        """What each replica is: `replica`, which added to the run's seed is its own, and its values of the grid."""
        values = itertools.product(*self.grid.values())
        return [{"replica": s, **dict(zip(self.grid, v, strict=True))} for v in values for s in range(self.seeds)]

    def check(self) -> None:
        """Raises UsageError for no seeds, a name that is no step size, or a value that is none."""
        if self.seeds < 1:
            raise UsageError(f"replicas must be at least 1, not {self.seeds}")
        for name, values in self.grid.items():
            if name not in STEP_SIZES:
                allowed = " or ".join(n.replace("_", "-") for n in STEP_SIZES)
                raise UsageError(f"a grid varies {allowed}, not {name.replace('_', '-')}")
            if not values or not all(v >= 0 and math.isfinite(v) for v in values):
                raise UsageError(f"a grid of {name.replace('_', '-')} needs finite numbers ≥ 0, not {list(values)}")


def parse_grid(text: str | None) -> dict[str, tuple[float, ...]]:
    """`server-lr=0.1,0.2;local-lr=0.01,0.1` as values by option. Raises UsageError when it is not that."""
    grid = {}
    for part in text.split(";") if text else []:
        name, equals, values = part.partition("=")
        try:
            grid[name.strip().replace("-", "_")] = tuple(float(value) for value in values.split(","))
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"grid {text!r}: {part!r} is not like server-lr=0.1,0.2,0.5")
    return grid


class Varied(NamedTuple):
    """The server's state of one replica of a grid."""

    inner: Any  # the algorithm's own
    values: dict[str, Tensor]  # [] each

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


class Sent(NamedTuple):
    """What the server of a grid's replica sends; the values are part of what clients are configured with."""

    content: Tree
    values: dict[str, Tensor]


def over_grid(
    config: AlgorithmConfig, build: Callable[[AlgorithmConfig], Algorithm], names: Sequence[str]
) -> Algorithm:
    """The configured algorithm with these options read from the server's state, so that replicas may differ in them."""

    def at(values: dict[str, Tensor]) -> Algorithm:
        varied = copy.copy(config)
        for name, value in values.items():
            object.__setattr__(varied, name, value)  # frozen, and checked before: a traced value cannot be
        return build(varied)

    for name in names:
        if not hasattr(config, name):
            raise UsageError(f"{type(config).__name__} has no option {name.replace('_', '-')} for a grid to vary")
    plain = build(config)

    def init_server(x: Tensor) -> Varied:
        return Varied(plain.init_server(x), {name: x.new_tensor(getattr(config, name)) for name in names})

    def broadcast(server: Varied, key: Tensor) -> Broadcast:
        sent = at(server.values).broadcast(server.inner, key)
        return Broadcast(Sent(sent.content, server.values), sent.bits)

    def client_update(sent: Sent, client: Tree, batches: Batches, key: Tensor) -> tuple[Message, Tree, Metrics]:
        return at(sent.values).client_update(sent.content, client, batches, key)

    def server_update(server: Varied, mean: Mean, key: Tensor) -> tuple[Varied, Mapping[str, Tensor]]:
        inner, reported = at(server.values).server_update(server.inner, mean, key)
        return Varied(inner, server.values), reported

    def idle(server: Varied, key: Tensor) -> tuple[Varied, Mapping[str, Tensor]]:
        inner, reported = idled(at(server.values), server.inner, key)
        return Varied(inner, server.values), reported

    def expect(server: Varied, payload: Tree) -> Varied:
        return Varied(expecting(at(server.values), server.inner, payload), server.values)

    return Algorithm(
        init_server, plain.init_client, broadcast, client_update, server_update,
        receive=plain.receive, combine=plain.combine, personal=of_inner(plain.personal),
        everyone=None if plain.everyone is None else lambda server: at(server.values).everyone(server.inner),  # pyright: ignore
        idle=idle if plain.idle else None, expect=expect if plain.expect else None, late=plain.late,
    )  # fmt: skip


def with_values(server: Varied, settings: Sequence[Mapping[str, float]]) -> Varied:
    """The stacked server states with each replica's own values."""
    values = {
        name: torch.tensor([s[name] for s in settings], dtype=old.dtype, device=old.device)
        for name, old in server.values.items()
    }
    return Varied(server.inner, values)


def stacked(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """One list a name, of the rows' values."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def summarized(metrics: dict[str, Any], replication: Replication) -> dict[str, Any]:
    """Metrics with a list over replicas replaced by its mean and, as `<name>_std`, its standard deviation.

    The deviation is that of a sample (n − 1), 0 for one replica; each replica's own numbers, with its setting,
    are in `replicas`.
    """
    several = {name: value for name, value in metrics.items() if isinstance(value, list)}
    summary = {name: value for name, value in metrics.items() if name not in several}
    settings = replication.settings()
    for name, values in several.items():
        summary |= _spread(name, values)
    summary["replicas"] = [
        {**setting, "clients": metrics["clients"], **{name: values[r] for name, values in several.items()}}
        for r, setting in enumerate(settings)
    ]
    return summary


def by_setting(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The rounds of each combination of a grid's values, by a label such as `server_lr=0.1`: means over its seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in history:
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for replica in row["replicas"]:
            groups.setdefault(", ".join(f"{name}={replica[name]:g}" for name in names), []).append(replica)
        for label, replicas in groups.items():
            mean = {k: v for k, v in row.items() if k != "replicas"}
            for name in replicas[0].keys() - {"replica", "clients", *names}:
                mean |= _spread(name, [replica[name] for replica in replicas])
            found.setdefault(label, []).append(mean)
    return found


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float]:
    numbers = [math.nan if v is None else v for v in values]
    return {name: float(np.mean(numbers)), f"{name}_std": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0}
