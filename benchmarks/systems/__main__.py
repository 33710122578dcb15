"""Runs one system in this process (`python -m benchmarks.systems NAME MODEL WORK`) and prints a line of JSON.

`benchmarks.throughput` starts it, with the interpreter of the system's own environment and the work as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from benchmarks.systems import SYSTEMS
from benchmarks.work import Outcome, Work, distance, parameters, peak_memory


def run(name: str, model: str, work: Work) -> tuple[Outcome, dict[str, Any]]:
    """What the system did, and the line about it."""
    module, _, function = SYSTEMS[name].target.partition(":")
    outcome = getattr(importlib.import_module(f"benchmarks.systems.{module}"), function)(model, work)
    moved = distance(outcome.model, parameters(model, work))
    said = {"execution": outcome.execution, "chunk": outcome.chunk}
    return outcome, {"seconds": outcome.seconds, "peak": outcome.peak or peak_memory(), "moved": moved, **said}


if __name__ == "__main__":
    name, model, work = sys.argv[1:]
    print("\n" + json.dumps(run(name, model, Work(**json.loads(work)))[1]), flush=True)
