"""Algorithms by name: whatever the installed packages offer under the entry-point group `vfl.algorithms`."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeGuard

from vfl.errors import UsageError, unknown
from vfl.training import AlgorithmConfig

GROUP = "vfl.algorithms"


def algorithms() -> dict[str, EntryPoint]:
    """The algorithms on offer, by name in alphabetic order; none of them is imported."""
    return {name: points[0] for name, points in sorted(_offers().items())}


def origin(point: EntryPoint) -> str:
    """The package an entry point comes from, with its version: `vfl 0.1.0`."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.module


def load_algorithm(name: str) -> type[AlgorithmConfig]:
    """The dataclass of options that the entry point of this name refers to, or `module:Class` itself.

    Raises UsageError for an unknown name, for one that two packages define, and for an entry point that cannot be
    imported or is not a dataclass with a `build` method.
    """
    if ":" in name:
        if "" not in sys.path:
            sys.path.insert(0, "")  # the module may lie in the current folder
        return _load(name, EntryPoint(name, name, GROUP))
    offers = _offers()
    if not offers:
        raise UsageError("no algorithms are installed, vfl's own included; install it with pip (`pip install -e .`)")
    if name not in offers:
        raise unknown("algorithm", name, offers)
    point, *others = offers[name]
    if others:
        packages = " and ".join(sorted(origin(p) for p in offers[name]))
        raise UsageError(f"algorithm {name!r} is defined by {packages}; uninstall all but one of them")
    return _load(f"{name!r} ({point.value} of {origin(point)})", point)


def _load(said: str, point: EntryPoint) -> type[AlgorithmConfig]:
    where = f"algorithm {said}"
    try:
        config = point.load()
    except Exception as error:  # whatever else the module does on import
        raise UsageError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not _is_config(config):
        raise UsageError(f"{where} must be a dataclass with a method build(task, population), as vfl.LocalTraining has")
    return config


def _is_config(found: Any) -> TypeGuard[type[AlgorithmConfig]]:
    return isinstance(found, type) and dataclasses.is_dataclass(found) and callable(getattr(found, "build", None))


def _offers() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found
