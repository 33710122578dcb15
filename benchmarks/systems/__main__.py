"""Runs one system in this process (`python -m benchmarks.systems NAME MODEL WORK`) and prints a line of JSON.

`benchmarks.throughput` starts it, with the interpreter of the system's own environment and the work as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version

from benchmarks.systems import SYSTEMS
from benchmarks.work import Work, distance, parameters, peak_memory


def main(name: str, model: str, work: Work) -> None:
    """Prints what the system did."""
    module, _, function = SYSTEMS[name].target.partition(":")
    outcome = getattr(importlib.import_module(f"benchmarks.systems.{module}"), function)(model, work)
    line = {
        "seconds": outcome.seconds,
        "peak_rss": outcome.peak_memory or peak_memory(),
        "moved": distance(outcome.model, parameters(model, work)),
        "version": f"{SYSTEMS[name].package} {version(SYSTEMS[name].package)}",
        "execution": outcome.execution,
        "chunk": outcome.chunk,
    }
    print("\n" + json.dumps(line), flush=True)  # a line of its own, whatever the system has left unfinished


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Work(**json.loads(sys.argv[3])))
