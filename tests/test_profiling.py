"""Where a round's time goes: every phase is seen, none is counted twice."""

import json
import time

import torch
from cli_runs import SMALL, here, metrics
from cli_runs import vfl as run_vfl
from helpers import ALGORITHMS, federated, regression

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
        ALGORITHMS["scaffold-option=2"], regression(), federated(), 5, clients_per_round=4, profile=True
    )
    for row in history:
        seconds = {phase: row[f"seconds_{phase}"] for phase in PHASES}
        assert all(value > 0 for value in seconds.values())
        assert sum(seconds.values()) - seconds["evaluation"] <= row["seconds"]
    rows = list(zip(*(column.cells for column in summary(history).columns), strict=True))
    assert [name for name, *_ in rows] == [*PHASES, "other", "a round"]
    *parts, whole = [(float(ms), float(share.rstrip("%"))) for _, ms, share in rows]
    assert whole[1] == 100 and abs(sum(share for _, share in parts) - 100) < 0.5
    wanted = 1e3 * (history[-1]["seconds"] + history[-1]["seconds_evaluation"])  # the others warm up or are traced
    assert abs(whole[0] - wanted) < 0.01 and abs(sum(ms for ms, _ in parts) - wanted) < 0.05


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
