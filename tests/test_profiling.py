"""Where a round's time goes: every phase is seen, none is counted twice."""

import json
import time

import torch
from cli_runs import SMALL, here, metrics
from cli_runs import vfl as run_vfl
from helpers import ALGORITHMS, federated, regression
from rich.console import Console

import vfl
from vfl.profiling import PHASES, Clock, summary

__all__ = ["here"]

CPU = torch.device("cpu")


def test_a_phase_inside_another_counts_for_itself_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(True, CPU)
    with clock("clients"):
        now[0] += 1
        with clock("data"):
            now[0] += 10
        now[0] += 100
    now[0] += 1000
    read = clock.read()
    assert (read["seconds_clients"], read["seconds_data"]) == (101, 10)
    assert sum(read.values()) == 111
    assert set(clock.read().values()) == {0.0}


def test_a_profiled_run_says_where_its_rounds_time_went():
    _, history = vfl.simulate(
        ALGORITHMS["scaffold-option=2"], regression(), federated(), 4, clients_per_round=4, profile=True
    )
    for row in history:
        seconds = {phase: row[f"seconds_{phase}"] for phase in PHASES}
        assert all(value > 0 for value in seconds.values())
        assert sum(seconds.values()) - seconds["evaluation"] <= row["seconds"]
    console = Console(width=100, record=True)
    console.print(summary(history))
    shown = console.export_text()
    assert all(phase in shown for phase in (*PHASES, "other"))


def test_a_run_that_is_not_profiled_measures_no_phase():
    _, history = vfl.simulate(ALGORITHMS["fedavg"], regression(), federated(), 1, clients_per_round=4)
    assert not [name for name in history[0] if name.startswith("seconds_")]


def test_profile_shows_a_table_and_writes_a_trace(here, capsys):
    assert run_vfl("fedavg", *SMALL, "--rounds", 5, "--out", "r", "--profile") == 0
    shown = capsys.readouterr().out
    assert all("seconds_data" in row for row in metrics(here / "r"))
    assert "where a round's time goes" in shown and "reduction" in shown
    events = json.loads((here / "r" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::index" for event in events)
