"""What the benchmarks share: clocks, and what a result is written down with."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vfl.errors import UsageError, unknown


def seconds(call: Callable[[], object], tries: int) -> list[float]:
    """How long each of some calls takes, after one that warms up."""
    call()
    return [_timed(call) for _ in range(tries)]


def in_turn(first: Callable[[], object], second: Callable[[], object], tries: int) -> tuple[list[float], list[float]]:
    """How long each of two calls takes, by turns, so that whatever slows the machine down slows both."""
    a, b = by_turns([first, second], tries)
    return a, b


def by_turns(
    calls: Sequence[Callable[[], object]], tries: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """The same for any number of calls, by a clock of one's choice."""
    for call in calls:
        call()
    rounds = [[_timed(call, clock) for call in calls] for _ in range(tries)]
    return [list(each) for each in zip(*rounds, strict=True)]


def layer_cases(
    layers: Sequence[str], known: Sequence[str], clients: Sequence[int], batch: int, tries: int
) -> list[tuple[str, int]]:
    """Each chosen layer (all: those known) with each number of clients.

    Raises UsageError for a layer that is not known, and for numbers below 1.
    """
    names = known if "all" in layers else layers
    for name in names:
        if name not in known:
            raise unknown("layer", name, [*known, "all"])
    if min((*clients, batch, tries)) < 1:
        raise UsageError(f"clients, batch and tries must be at least 1, not {min((*clients, batch, tries))}")
    return list(product(names, clients))


def _timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    call()
    return clock() - started


def apart(arguments: Sequence[str], what: object, **variables: str) -> dict[str, Any]:
    """What `python arguments` prints as a line of JSON, in a process of its own with these environment variables.

    It has one thread unless OMP_NUM_THREADS says otherwise. Raises UsageError, naming `what`, where it fails.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        why = next((line for line in reversed(said) if "Error" in line), said[-1])
        raise UsageError(f"{what} could not be measured: {why.strip()}")
    return json.loads(lines[0])


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def result(benchmark: str, **found: Any) -> dict[str, Any]:
    """A benchmark's findings with what the report says of every one: where and when."""
    return {"benchmark": benchmark, "date": datetime.date.today().isoformat(), "machine": machine(), **found}


def save(found: dict[str, Any], path: Path) -> None:
    """Writes a result as `benchmarks.report` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
