"""What earlier runs have measured about speed, in small files of the user's cache folder: one for a kind of choice."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

log = logging.getLogger("vfl")


class Choice(NamedTuple):
    """Timings of one kind of work on one device."""

    chunk: int  # clients at once under vmap
    rates: dict[str, float]  # way of computing → local steps a second
    compile_seconds: float | None  # what making a program took
    again_seconds: float | None  # what it took when the compiler's cache on disk held it from an earlier run
    programs: str | None  # that cache's folder
    steps: float  # local steps that the runs so far were to take


def folder() -> Path:
    """$VFL_CACHE, else vfl in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vfl"
    return Path(os.environ.get("VFL_CACHE") or default)


def recall(name: str) -> Choice | None:
    """What is known about this kind of work; None: nothing, or nothing that can be read."""
    try:
        entry = _entries("executions")[name]
        rates = {str(way): float(rate) for way, rate in dict(entry["rates"]).items()}
        first, again = (None if s is None else float(s) for s in (entry["compile_seconds"], entry["again_seconds"]))
        programs = None if entry["programs"] is None else str(entry["programs"])
        return Choice(int(entry["chunk"]), rates, first, again, programs, float(entry["steps"]))
    except (KeyError, TypeError, ValueError):
        return None


def remember(name: str, choice: Choice) -> None:
    """Writes down what was measured."""
    _note("executions", name, choice._asdict())


def program_folder() -> str | None:
    """The folder of torch's compiler for what it has made; None: the usual one, before the first use."""
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # which the compiler sets, too


def kept(programs: str) -> bool:
    """Whether programs that were made in this folder can still be there, and are looked for there."""
    return program_folder() in (None, programs) and Path(programs).is_dir()


def known(kind: str, name: str, ways: Collection[str]) -> str | None:
    """Which of the ways to do what `name` describes is the fastest, by earlier timings; None: none that can be read."""
    try:
        seconds = {way: float(s) for way, s in _entries(kind)[name].items() if way in ways}
        return min(seconds, key=seconds.__getitem__)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def fastest(kind: str, name: str, ways: Collection[str], measure: Callable[[], Mapping[str, float]]) -> str:
    """The same, where `measure` gives the ways' seconds if nothing is known; they are kept for later runs."""
    if (way := known(kind, name, ways)) is not None:
        return way
    seconds = dict(measure())
    _note(kind, name, seconds)
    return min(seconds, key=seconds.__getitem__)


def machine(device: torch.device) -> str:
    """What timings on a device are good for: its model, the threads that share the work, and torch's version."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds by which a computation there is timed.

    What other programs do on a processor is no part of them, as far as that can be told: where one thread computes.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@functools.cache
def processor() -> str:
    """Its model's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _note(kind: str, name: str, entry: Any) -> None:
    """Adds an entry; where the folder cannot be written, the next run measures again."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        entries = _entries(kind) | {name: entry}
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".json", delete=False) as file:
            json.dump(entries, file, indent=1)
        Path(file.name).replace(_file(kind))  # whole or not at all, whoever else writes


def _file(kind: str) -> Path:
    return folder() / f"{kind}.json"


def _entries(kind: str) -> dict[str, Any]:
    try:
        entries = json.loads(_file(kind).read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
