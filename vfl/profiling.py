"""Where a round's time goes: seconds by phase, and a trace of a few rounds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

PHASES = ("sampling", "data", "clients", "reduction", "server", "states", "evaluation")
"""In order: drawing the cohort; gathering minibatches' indices and client states; the clients' local work with their
sums; the all-reduce and its numbers; the server's step; writing client states; evaluation."""
_FIRST, _TRACED = 2, 3  # the first round of the trace, and how many it holds
PREFIX = "seconds_"  # of the metrics that a profiled run adds


class Clock:
    """Adds up seconds by phase; inside another, a phase's time is its own alone. Costs nothing unless `on`."""

    def __init__(self, on: bool, device: torch.device) -> None:
        self.on, self.device = on, device
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._phase: str | None = None
        self._since = 0.0

    def __call__(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """What runs inside belongs to this phase."""
        return self._timed(phase) if self.on else contextlib.nullcontext()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        outer = self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def read(self) -> dict[str, float]:
        """The seconds since the last reading, named `seconds_<phase>`; empty unless `on`."""
        if not self.on:
            return {}
        found = {PREFIX + phase: seconds for phase, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return found

    def _switch(self, phase: str | None) -> str | None:
        if self.device.type == "cuda":  # its kernels run on after the call that started them
            torch.cuda.synchronize(self.device)
        now, before = time.perf_counter(), self._phase
        if before is not None:
            self._seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before


def summary(history: Sequence[Mapping[str, Any]]) -> Table:
    """Milliseconds a round in each phase, and their share, evaluation included.

    The first rounds are left out where there are more: one warms up, and those that `traced` records take longer.
    """
    rows = [row for row in history if PREFIX + PHASES[0] in row]
    rows = rows[_FIRST + _TRACED - 1 :] or rows[1:] or rows
    count = f"{len(rows)} round{'s' * (len(rows) > 1)}"
    table = Table(title="where a round's time goes", caption=f"mean of the last {count}", min_width=36)
    table.add_column("phase")
    table.add_column("ms a round", justify="right")
    table.add_column("share", justify="right")
    mean: dict[str, float] = {phase: sum(row[PREFIX + phase] for row in rows) / max(len(rows), 1) for phase in PHASES}
    total = sum(row["seconds"] for row in rows) / max(len(rows), 1) + mean["evaluation"]
    mean["other"] = max(total - sum(mean.values()), 0.0)
    for phase, seconds in [*mean.items(), ("a round", total)]:
        table.add_row(phase, f"{1e3 * seconds:.2f}", f"{seconds / total:.1%}" if total else "")
    return table


@contextlib.contextmanager
def traced(path: Path | None) -> Iterator[Any]:
    """Yields a function to call after each round; three rounds from the second on are written as a Chrome trace.

    None as the path traces nothing.
    """
    if path is None:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wanted = torch.profiler.schedule(wait=_FIRST - 2, warmup=1, active=_TRACED, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=wanted, on_trace_ready=lambda p: p.export_chrome_trace(str(path))
    ) as profiler:
        yield profiler.step
