"""What a run shows in the terminal, and where it must show nothing."""

import io
import logging
import re
from typing import Any

import pytest
import torch
from rich.console import Console

import vfl
from algorithms.fedavg import FedAvg
from vfl import display
from vfl.display import Tally, progress
from vfl.terminal import duration, facts, number, section, si, sparkline, table, terminal

LOG = logging.getLogger("vfl")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def metrics(round: int, **scores: float) -> dict[str, Any]:
    """What `vfl.rounds` yields: 5 clients and 40 gradients a round, in half a second."""
    costs = {"bits_up": 1.5e6 * round, "bits_down": 3e6 * round, "gradients": 40.0 * round}
    rest = {"clients": 5, "dropped": 0, "chunk": 4, "execution": "vmap", "seconds": 0.5}
    return {"round": round, "train_loss": 1 / round, **costs, **rest, **scores}


def plain(rounds: int, history: list[dict[str, Any]], **options: Any) -> list[str]:
    """The lines shown where there is no terminal."""
    file = io.StringIO()
    with progress(rounds, console=Console(file=file, width=80), **options) as show:
        for row in history:
            show(row)
    return file.getvalue().splitlines()


def live(rounds: int, history: list[dict[str, Any]], width: int = 100, title: str = "", **options: Any) -> str:
    """All that a terminal of this width receives."""
    file = io.StringIO()
    with progress(rounds, title, console=Console(file=file, force_terminal=True, width=width), **options) as show:
        for row in history:
            show(row)
    return file.getvalue()


def last_frame(received: str) -> list[str]:
    """The lines of the terminal after the last redraw, which starts at the progress bar."""
    lines = [line.rstrip() for line in ANSI.sub("", received).replace("\r", "\n").split("\n")]
    start = max(i for i, line in enumerate(lines) if line.startswith("round "))
    return [line for line in lines[start:] if line]


def shown(received: str) -> dict[str, str]:
    """The facts of the last frame, by name; read at a width where each has a line of its own."""
    pairs = (re.split(r"\s{2,}|(?<=[a-z]) (?=[\d-])", line.strip(), maxsplit=1) for line in last_frame(received)[1:])
    return {pair[0]: pair[-1].strip() for pair in pairs}


def test_quiet_prints_nothing_not_even_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    with progress(2, "title", quiet=True) as show:
        show(metrics(1))
        LOG.warning("hidden")
        show(metrics(2, test_loss=1.0))
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_every_evaluated_round_gets_a_line_without_control_codes() -> None:
    history = [metrics(t, **({"test_loss": 2.0, "test_accuracy": 0.5} if t % 3 == 0 else {})) for t in range(1, 9)]
    lines = plain(100, history, title="fedavg on digits")
    assert lines[0] == "fedavg on digits"
    assert [line.split()[0] for line in lines[1:]] == ["round", "3/100", "6/100"]
    assert not ANSI.search("".join(lines)) and "".join(lines).isprintable()


def test_without_a_terminal_every_tenth_of_the_rounds_and_the_last_one_get_a_line() -> None:
    lines = plain(45, [metrics(t) for t in range(1, 46)])
    assert [line.split()[0] for line in lines[1:]] == [f"{t}/45" for t in [*range(4, 45, 4), 45]]


def test_plain_columns_stay_aligned_under_their_header() -> None:
    history = [metrics(t, test_loss=10.0 ** (t % 7 - 3), test_accuracy=t / 500) for t in range(1, 400)]
    lines = plain(400, history)
    ends = [[match.end() for match in re.finditer(r"\S+(?: \S+)*", line)] for line in lines]
    assert len(ends) == 400 and all(row == ends[0] for row in ends)


def test_plain_header_comes_again_when_a_column_is_new() -> None:
    lines = plain(10, [metrics(1), metrics(2), metrics(3, test_accuracy=0.25), metrics(4)])
    headers = [i for i, line in enumerate(lines) if line.split()[0] == "round"]
    assert headers == [0, 3] and "test_accuracy" not in lines[0] and "test_accuracy" in lines[3]
    accuracy = lines[3].split().index("test_accuracy")
    assert lines[4].split()[accuracy] == "0.2500"
    assert lines[5].split()[accuracy] == "-"  # round 4 measured none


def test_plain_lines_are_flushed_at_once() -> None:
    class File(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    file = File()
    with progress(3, console=Console(file=file)) as show:
        for t in (1, 2, 3):
            show(metrics(t, test_loss=1.0))
            assert f"{t}/3" in file.flushed


def test_a_terminal_shows_the_latest_and_the_best_known_scores() -> None:
    accuracies = {1: 0.5, 2: 0.75, 4: 0.625}
    history = [metrics(t, **({"test_accuracy": accuracies[t]} if t in accuracies else {})) for t in range(1, 6)]
    found = shown(live(9, history, width=34))
    assert found["train loss"] == "0.2000"
    assert found["test accuracy"] == "0.6250 @4"
    assert found["best test accuracy"] == "0.7500 @2"
    assert found["uplink"] == "7.5 Mbit" and found["downlink"] == "15 Mbit" and found["gradients"] == "200"
    assert found["clients/s"] == "10" and found["gradients/s"] == "80" and found["at once"] == "4, vmap"


def test_a_regression_run_shows_its_lowest_loss_as_the_best() -> None:
    found = shown(live(9, [metrics(t, test_loss=loss) for t, loss in enumerate((3.0, 1.0, 2.0), 1)], width=34))
    assert found["test loss"] == "2.0000" and found["best test loss"] == "1.0000 @2"


def test_a_terminal_shows_dropped_clients_and_an_algorithms_own_metrics_but_no_spreads() -> None:
    row = metrics(2, drift=0.125, client_test_accuracy_worst=0.1) | {"dropped": 2}
    found = shown(live(9, [metrics(1) | {"dropped": 1}, row], width=34))
    assert found["dropped clients"] == "3" and found["drift"] == "0.1250"
    assert not any("worst" in name for name in found)


def test_a_loss_that_is_nan_keeps_the_last_known_one() -> None:
    history = [metrics(1), metrics(2) | {"train_loss": float("nan")}]
    assert shown(live(9, history, width=34))["train loss"] == "1.0000 @1"
    assert plain(2, history)[-1].split()[1] == "-"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
def test_the_live_display_keeps_to_the_width_with_room_for_an_echoed_ctrl_c(width: int) -> None:
    history = [metrics(t, test_loss=1.0, test_accuracy=0.5, validation_accuracy=0.5) for t in (1, 2)]
    frame = last_frame(live(1000, history, width, title="a title that is too long for narrow terminals " * 2))
    assert max(map(len, frame)) <= width - 2
    assert width < 40 or frame[0].startswith("round 2/1000 ")


def test_no_color_leaves_colors_out(monkeypatch: pytest.MonkeyPatch) -> None:
    color = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d)[;m]")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert color.search(live(4, [metrics(1)]))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not color.search(live(4, [metrics(1)]))


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    received = live(4, [metrics(1, test_loss=1.0)])
    assert not ANSI.search(received) and "train_loss" in received.splitlines()[0]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_appears_once_above_the_display(terminal: bool) -> None:
    elsewhere, file = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(elsewhere)
    logging.getLogger().addHandler(handler)
    try:
        with progress(3, console=Console(file=file, force_terminal=terminal, width=60)) as show:
            show(metrics(1))
            LOG.warning("out of memory with %d clients [at once]", 64)
            LOG.info("chunk auto: 32 clients")
            show(metrics(3))
        LOG.warning("after the run")
    finally:
        logging.getLogger().removeHandler(handler)
    text = ANSI.sub("", file.getvalue())
    assert text.count("warning: out of memory with 64 clients [at once]") == 1
    assert text.index("out of memory") < text.rindex("3/3")
    assert "chunk auto" not in text
    assert elsewhere.getvalue() == "after the run\n"


def test_verbose_shows_information_too() -> None:
    file = io.StringIO()
    with progress(3, console=Console(file=file), verbose=True):
        LOG.info("chunk auto: 32 clients")
    assert "info: chunk auto: 32 clients" in file.getvalue()


def test_the_logger_is_as_before_after_an_exception() -> None:
    before = (list(LOG.handlers), LOG.level, LOG.propagate)
    with pytest.raises(vfl.UsageError), progress(3, console=Console(file=io.StringIO(), force_terminal=True)):
        raise vfl.UsageError("stop")
    assert (LOG.handlers, LOG.level, LOG.propagate) == before


def test_a_users_print_does_not_break_the_live_display(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    with progress(3, console=Console(file=file, force_terminal=True, width=60)) as show:
        show(metrics(1))
        print("a print in a client")
    assert "a print in a client" in ANSI.sub("", file.getvalue())
    assert capsys.readouterr().out == ""


def test_the_time_left_counts_only_the_rounds_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    tally = Tally(100, done=50)
    for t in range(51, 61):
        now[0] += 2.0
        tally.add(metrics(t))
    assert tally.elapsed == 20.0 and tally.left == 80.0


def test_speeds_are_those_of_the_last_rounds() -> None:
    tally = Tally(100)
    for t in range(1, 101):
        tally.add(metrics(t) | {"seconds": 100.0 if t <= 80 else 0.25})
    assert tally.speed() == (20.0, 160.0)


def test_a_resumed_runs_first_round_counts_no_earlier_gradients() -> None:
    tally = Tally(100, done=50)
    tally.add(metrics(51))
    assert all(speed != speed for speed in tally.speed())  # NaN: unknown
    tally.add(metrics(52))
    assert tally.speed() == (10.0, 80.0)


def test_the_display_takes_what_rounds_yields() -> None:
    data = vfl.data.federated("synthetic:features=4,classes=3,examples=5,test=20", clients=8)
    torch.manual_seed(0)
    task = vfl.task(vfl.models.model("softmax", (4,), 3))
    history = [m for _, m in vfl.rounds(FedAvg(), task, data, 2, clients_per_round=4)]
    assert "2/2" in live(2, history) and "2/2" in plain(2, history)[-1]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "bit", "0 bit"), (7, "", "7"), (999.4, "B", "999 B"), (999.6, "B", "1 kB"), (1234567, "bit", "1.23 Mbit"),
     (5e9, "", "5 G"), (2.5e15, "bit", "2.5 Pbit"), (float("nan"), "B", "-"), (float("inf"), "", "-")],
)  # fmt: skip
def test_si_gives_three_digits_and_a_prefix(value: float, unit: str, text: str) -> None:
    assert si(value, unit) == text


def test_numbers_keep_four_significant_digits_whatever_their_size() -> None:
    assert [number(v) for v in (0.0, 0.91239, 123.4567, 1e-5, 1e20, -2.0)] == [
        "0.0000", "0.9124", "123.4567", "1.000e-05", "1.000e+20", "-2.0000",
    ]  # fmt: skip


def test_durations_are_hours_minutes_seconds() -> None:
    assert [duration(s) for s in (0, 83.4, 3600, float("nan"))] == ["0:00:00", "0:01:23", "1:00:00", "-"]


def test_a_sparkline_spans_its_values_and_its_width() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([8.0, 8.0, 1.0, 1.0], width=2) == "█▁"
    assert sparkline([5.0, 5.0]) == "▁▁" and sparkline([]) == ""
    assert len(sparkline(range(1000), width=40)) == 40


def test_a_table_keeps_a_row_in_one_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    body = table("name", ">number")
    body.add_row("word " * 60 + "end", "1")
    section(terminal(), "[title]", body)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[title]" and len(lines) == 3 and "end" in lines[2]


def test_text_too_wide_for_the_terminal_is_folded_and_not_cut() -> None:
    file = io.StringIO()
    Console(file=file, width=30).print(facts({"path": "x" * 100}))
    assert file.getvalue().count("x") == 100 and max(map(len, file.getvalue().splitlines())) <= 30
