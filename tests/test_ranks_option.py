"""`vfl run --ranks N`: as one rank, also after signals and the death of a rank; and no process is left behind.

The launcher's own logic is tested with small scripts in the place of the ranks: a real one takes seconds to start.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_runs import SMALL, assert_same_run, here, metrics, newest, vfl
from helpers import ROOT

from vfl import checkpoint
from vfl.cli import launch as launching
from vfl.cli import signals
from vfl.cli.launch import LAUNCHER, cores, follow_launcher, launch, rank_count
from vfl.errors import RankLostError, UsageError

__all__ = ["here"]

SECONDS = 100  # after which a run counts as hung
SCAFFOLD = ("scaffold", *SMALL, "--checkpoint-every", 2)


def wait_until(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come in {SECONDS} s"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process is there, and not just waiting for its parent to notice its end."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(shown.stdout.strip()) and not shown.stdout.startswith("Z")


# --- the real thing ---


@pytest.fixture
def run(here) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `vfl run --ranks 2 --out run` in a terminal's stead: with a process group of its own."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "vfl", "run", *map(str, arguments), "--out", "run", "--ranks", "2"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (here / "out").open("w") as out, (here / "err").open("w") as err:
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The process ids of its ranks, in order."""
    shown = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True, check=True)
    pairs = [line.split() for line in shown.stdout.splitlines()]
    return sorted(int(pid) for parent, pid in pairs if int(parent) == launcher.pid)


def rounds_done(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_two_ranks_give_one_ranks_numbers_after_kill_9_of_one_and_after_ctrl_c(run, here):
    launcher = run(*SCAFFOLD, "--rounds", 100000)
    wait_until(lambda: rounds_done(here / "run") >= 3, "the third round")
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(SECONDS) == 3
    assert not any(map(alive, ranks))
    *_, last = (here / "err").read_text().splitlines()
    assert last == ("vfl: rank 1 was ended by SIGKILL, perhaps for lack of memory; the run goes on from its newest "
                    "checkpoint with --resume")  # fmt: skip
    assert "Traceback" not in (here / "err").read_text()
    saved = checkpoint.round_of(newest(here / "run"))

    launcher = run("--resume")
    wait_until(lambda: f"{saved + 3}/100000" in (here / "out").read_text(), "three rounds more")
    ranks = ranks_of(launcher)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does: the ranks are sent one, too
    assert launcher.wait(SECONDS) == 130
    assert not any(map(alive, ranks))
    out, done = (here / "out").read_text(), len(metrics(here / "run"))
    shown = [int(t) for t in re.findall(r"^ +(\d+)/100000 ", out, re.MULTILINE)]
    assert shown == sorted(set(shown)), "only the first rank prints"
    assert set(shown) <= set(range(saved + 1, done + 1)), "what was played; rounds that follow fast share a line"
    assert out.count("finishing this round, then saving") == 1
    assert f"interrupted after round {done} of 100000" in out
    assert (here / "err").read_text() == ""

    assert vfl(*SCAFFOLD, "--rounds", done, "--out", "alone", "--quiet") == 0
    assert_same_run(here / "run", here / "alone", 1e-9)


# --- the launcher, with small scripts for ranks ---

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path

RANK = int(os.environ["RANK"])
Path(f"{RANK}.pid").write_text(str(os.getpid()))

def stays():
    Path(f"{RANK}.ready").touch()
    time.sleep(1000)

def exits(code):
    return lambda *signal: sys.exit(code)

"""


@pytest.fixture
def scripted(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Puts a script in the place of the ranks' Python; the folder it runs in."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "rank"
    path.touch(0o755)
    python = f"#!{sys.executable} -IS\n"
    monkeypatch.setattr(sys, "executable", str(path))

    def write(script: str) -> Path:
        path.write_text(python + PREAMBLE + script)
        return tmp_path

    return write


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("*.pid")]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exits(0)()", 0),
        ("exits(2)()", 2),
        ("exits(143)()", 143),
        ("exits(2 if RANK == 0 else 3)()", 2),
        ("exits(1 if RANK == 1 else 3)()", "rank 1 failed (exit code 1), so the others could not go on"),
        ("exits(2 * RANK)()", "rank 1 failed (exit code 2)"),
        (
            "if RANK == 1: os.kill(os.getpid(), 9)\nexits(3)()",
            "rank 1 was ended by SIGKILL, perhaps for lack of memory",
        ),
        ("if RANK == 0: os.kill(os.getpid(), 11)\nexits(3)()", "rank 0 was ended by SIGSEGV; the run goes on from"),
    ],
)
def test_the_code_is_the_ranks_and_a_rank_that_fails_alone_is_named(scripted, script, code):
    scripted(script)
    if isinstance(code, int):
        assert launch(["fedavg"], 2) == code
        return
    with pytest.raises(RankLostError, match="^" + re.escape(code)):
        launch(["fedavg"], 2)


def test_ranks_that_do_not_follow_a_failed_one_are_killed(scripted, monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 0.3)
    folder = scripted("signal.signal(15, signal.SIG_IGN)\nif RANK < 2: stays()\nexits(1)()")
    with pytest.raises(RankLostError, match="rank 2 failed"):
        launch(["fedavg"], 3)
    assert len(pids(folder)) == 3 and not any(map(alive, pids(folder)))


def test_a_rank_is_told_its_place_and_shares_the_cores(scripted, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launching, "cores", lambda: 7)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    folder = scripted(f"said = [*(os.environ[n] for n in {names}), *sys.argv[1:]]\n"
                      "Path(f'{RANK}.said').write_text(' '.join(said))")  # fmt: skip
    assert launch(["fedavg", "--rounds", "3", "--ranks=3"], 3) == 0
    for rank in range(3):
        said = (folder / f"{rank}.said").read_text()
        assert said == f"{rank} {rank} 3 127.0.0.1 2 -P -m vfl run fedavg --rounds 3 --ranks=3 --ranks 1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch(["fedavg"], 2) == 0
    assert (folder / "0.said").read_text().startswith("0 0 2 127.0.0.1 5 ")


@contextlib.contextmanager
def signals_to(folder: Path, *numbers: int, terminal: bool) -> Iterator[None]:
    """Sends this process signals when two ranks are ready; a terminal's go to the ranks, too."""

    def send() -> None:
        wait_until(lambda: len(list(folder.glob("*.ready"))) == 2, "both ranks")
        for number in numbers:
            for pid in [*pids(folder) * terminal, os.getpid()]:
                os.kill(pid, number)
            time.sleep(2 * signals.AGAIN * (len(numbers) - 1))

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()
    assert not any(map(alive, pids(folder)))


def test_ctrl_c_asks_each_rank_once_to_stop(scripted):
    folder = scripted("signal.signal(2, exits(99))\nsignal.signal(15, exits(143))\nstays()")
    with signals_to(folder, signal.SIGINT, terminal=True):
        assert launch(["fedavg"], 2) == 130


def test_sigterm_of_the_launcher_asks_all_ranks_to_stop(scripted):
    folder = scripted("signal.signal(15, exits(143))\nstays()")
    with signals_to(folder, signal.SIGTERM, terminal=False):
        assert launch(["fedavg"], 2) == 143


def test_ranks_that_have_not_begun_just_end(scripted):
    folder = scripted("stays()")
    with signals_to(folder, signal.SIGTERM, terminal=False):
        assert launch(["fedavg"], 2) == 143
    for path in folder.glob("*.ready"):
        path.unlink()
    with signals_to(folder, signal.SIGINT, terminal=True), pytest.raises(KeyboardInterrupt):
        launch(["fedavg"], 2)


def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(scripted, monkeypatch):
    monkeypatch.setattr(signals, "AGAIN", 0.2)
    folder = scripted("signal.signal(15, signal.SIG_IGN)\nstays()")
    with signals_to(folder, signal.SIGINT, signal.SIGINT, terminal=True), pytest.raises(KeyboardInterrupt):
        launch(["fedavg"], 2)


def test_a_rank_stops_in_order_when_its_launcher_is_gone(monkeypatch):
    with signals.first_signal() as signalled:
        follow_launcher()  # without a launcher: nothing
        time.sleep(0.1)
        assert signalled() is None
        monkeypatch.setenv(LAUNCHER, str(2**30))  # above any process id
        follow_launcher()
        wait_until(signalled, "the signal")
        assert signalled() == signal.SIGTERM


# --- how many ---


@pytest.fixture
def machine(tmp_path, monkeypatch) -> None:
    """Six hardware threads, 0 to 5, of three cores; this process may use five of them."""
    for cpu in range(6):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 3},{cpu % 3 + 3}\n")
    monkeypatch.setattr(launching, "CPUS", tmp_path)
    monkeypatch.setattr(launching, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 3, 4, 2}, raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("quota", "count"), [(None, 3), ("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 3)]
)
def test_auto_is_one_rank_a_core_that_this_process_may_use(machine, tmp_path, quota, count):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert cores() == rank_count(None, "cpu") == count


def test_hardware_threads_count_where_nobody_says_whose_they_are(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "CPUS", tmp_path / "none")
    assert cores() == 5


@pytest.mark.parametrize(("device", "count"), [("auto", 4), ("cuda", 4), ("cuda:2", 1), ("cpu", 3)])
def test_auto_is_one_rank_a_gpu(machine, monkeypatch, device, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert rank_count(None, device) == count
    if device != "cpu":
        assert rank_count(count, device) == count
        with pytest.raises(UsageError, match=f"--ranks {count + 1} needs as many GPUs, and --device {device} means"):
            rank_count(count + 1, device)
    else:
        assert rank_count(50, device) == 50


@pytest.mark.parametrize("ranks", ["auto", "2"])
def test_ranks_are_refused_under_another_launcher(ranks, here, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert vfl("fedavg", *SMALL, "--ranks", ranks) == 2
    assert capsys.readouterr().err.startswith("vfl: --ranks starts ranks, but this process is itself a launcher's rank")
    assert vfl("fedavg", *SMALL, "--ranks", 1, "--rounds", 1, "--out", "a", "--quiet") == 0


@pytest.mark.parametrize(
    ("value", "bound"),
    [("0", "from 1"), ("-1", "from 1"), ("1.5", "from 1"), ("many", "from 1"), ("1025", "up to 1024")],
)
def test_what_is_no_number_of_ranks_is_refused(value, bound, here, capsys):
    assert vfl("fedavg", *SMALL, f"--ranks={value}") == 2
    assert capsys.readouterr().err == f"vfl: --ranks must be auto or a whole number {bound}, not '{value}'\n"
    assert list(here.iterdir()) == []
