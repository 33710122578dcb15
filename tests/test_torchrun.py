"""`torchrun -m vfl run` with two ranks: as one rank, also after Ctrl-C, signals to either rank, and a divergence.

All launches run side by side in one fixture: a process takes seconds to import torch.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_runs import SMALL, assert_same_run, here, metrics, newest, tensors, tree, vfl
from helpers import ROOT

from vfl import checkpoint

__all__ = ["here"]

SECONDS = 150  # after which a launch counts as hung
SCAFFOLD = ("scaffold", *SMALL, "--model", "mine:Net")
ROUNDS = 8

# A model whose processes leave a file of their id, and send themselves signals when the environment says so.
MINE = """
import os
from pathlib import Path

from torch import nn

RANK, ATTEMPT = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
SIGNALS = dict(entry.split("=") for entry in os.environ.get("SIGNALS", "").split())


class Net(nn.Linear):
    def __init__(self, shape, classes):
        super().__init__(shape[0], classes)
        Path(f"{os.getpid()}.pid").write_text(f"{RANK} {ATTEMPT}")

    def forward(self, x):
        number, _, after = SIGNALS.get(f"{ATTEMPT}/{RANK}", "").partition("@")
        log = Path("run/metrics.jsonl")
        if number and log.exists() and len(log.read_text().splitlines()) >= int(after):
            del SIGNALS[f"{ATTEMPT}/{RANK}"]
            os.kill(os.getpid(), int(number))
        return super().forward(x)
"""


class Ended(NamedTuple):
    """What a launch left."""

    folder: Path  # the run's
    code: int
    out: str
    err: str


def launch(folder: Path, *arguments: object, restarts: int = 0, **variables: str) -> subprocess.Popen:
    """torchrun with two ranks of `vfl run`, in this folder."""
    (folder / "mine.py").write_text(MINE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name need not resolve
    torchrun = ["torch.distributed.run", "--nproc_per_node", 2, "--master-addr", "127.0.0.1", "--master-port", port]
    command = [sys.executable, "-m", *torchrun, "--max-restarts", restarts, "-m", "vfl", "run", *arguments]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen([str(part) for part in command], cwd=folder, env=environment, stdout=out, stderr=err)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Iterator[dict[str, Ended]]:
    """Every launch by its name, from start to end."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("resumed", "stopped", "killed", "diverged")}
    with in_folder(folders["resumed"]):
        Path("mine.py").write_text(MINE)
        assert vfl(*SCAFFOLD, "--rounds", 3, "--out", "run", "--quiet") == 0
    # Attempt / rank = signal @ rounds on disk: kill -9 of the second rank, of the first one, SIGTERM to one alone.
    signals = {"SIGNALS": "0/1=9@3 1/0=9@5 2/1=15@6"}
    keep = ("--checkpoint-every", 2, "--out", "run")
    processes: dict[str, subprocess.Popen] = {}
    try:
        start = {
            "killed": lambda f: launch(f, *SCAFFOLD, "--rounds", ROUNDS, *keep, restarts=3, **signals),
            "stopped": lambda f: launch(f, *SCAFFOLD, "--rounds", 100000, "--out", "run", restarts=2),
            "resumed": lambda f: launch(f, "--resume", "--out", "run", "--rounds", ROUNDS),
            "diverged": lambda f: launch(f, "scaffold", *SMALL, "--rounds", 8, "--out", "run", "--local-lr", 1e200),
        }
        for name, begin in start.items():
            processes[name] = begin(folders[name])
        log = folders["stopped"] / "run" / "metrics.jsonl"
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, "the third round")
        processes["stopped"].send_signal(signal.SIGINT)
        wait_until(lambda: all(process.poll() is not None for process in processes.values()), "the end of all launches")
    finally:
        for process in processes.values():
            process.terminate()  # torchrun takes its ranks along
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
            process.wait()
        left = [pid for folder in folders.values() for pid in ranks_of(folder) if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left, f"torchrun left these ranks running: {left}"
    yield {
        name: Ended(
            folder / "run", processes[name].returncode, (folder / "out").read_text(), (folder / "err").read_text()
        )
        for name, folder in folders.items()
    }


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """This process in another folder, whose modules are forgotten in the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", ["", *sys.path])
        patch.setattr("vfl.plots.learning_curves", lambda histories, path: path)
        yield
    sys.modules.pop("mine", None)


def wait_until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come in {SECONDS} s"
        time.sleep(0.02)


def ranks_of(folder: Path) -> dict[int, str]:
    """The processes that built the model there: rank and attempt of each."""
    return {int(path.stem): path.read_text() for path in folder.glob("*.pid") if int(path.stem) != os.getpid()}


def alive(pid: int) -> bool:
    """Whether this is still a rank: its number may have gone to another process."""
    shown = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return "-m vfl run" in shown.stdout


@pytest.fixture
def alone(here) -> Callable[[int], Path]:
    """The same experiment on one rank, uninterrupted."""
    Path("mine.py").write_text(MINE)

    def play(rounds: int) -> Path:
        assert vfl(*SCAFFOLD, "--rounds", rounds, "--out", f"alone-{rounds}", "--quiet") == 0
        return here / f"alone-{rounds}"

    return play


def test_a_run_of_one_rank_goes_on_with_two_to_the_same_numbers(ended, alone):
    run = ended["resumed"]
    assert run.code == 0, run.err
    assert_same_run(run.folder, alone(ROUNDS), 1e-9)
    assert sorted(ranks_of(run.folder.parent).values()) == ["0 0", "1 0"]


def test_only_the_first_rank_prints_and_writes(ended):
    run = ended["resumed"]
    shown = [line.split()[0] for line in run.out.splitlines() if re.match(r" +\d+/8 ", line)]
    assert shown == [f"{t}/8" for t in range(4, ROUNDS + 1)]
    assert run.out.count("going on from round 3") == run.out.count("done after round 8 of 8") == 1
    assert "vfl:" not in run.err and "Traceback" not in run.err
    files = {"config.yaml", "metrics.jsonl", "model.safetensors", "curves.png", "checkpoints"}
    rounds = {f"checkpoints/{checkpoint.of_round(Path(), t).name}" for t in (3, 8)}
    assert set(tree(run.folder)) == files | rounds


def test_ctrl_c_saves_and_a_run_of_two_ranks_goes_on_with_one_to_the_same_numbers(ended, alone):
    run = ended["stopped"]
    done = len(metrics(run.folder))
    assert run.code != 0 and done >= 3
    assert run.out.count("finishing this round, then saving") == 1
    assert f"interrupted after round {done} of 100000" in run.out
    assert run.out.endswith("go on  vfl run --resume --out run\n")
    assert checkpoint.round_of(newest(run.folder)) == done
    assert sorted(ranks_of(run.folder.parent).values()) == ["0 0", "1 0"]  # nothing was restarted
    assert_same_run(run.folder, alone(done), 1e-9)
    assert vfl("--resume", "--out", run.folder, "--rounds", done + 3, "--quiet") == 0
    assert_same_run(run.folder, alone(done + 3), 1e-9)


def test_after_kill_9_of_a_rank_the_run_goes_on_from_its_checkpoint_to_the_same_numbers(ended, alone):
    run = ended["killed"]
    assert run.code == 0, run.err
    attempts = [f"{rank} {attempt}" for rank in (0, 1) for attempt in range(4)]
    assert sorted(ranks_of(run.folder.parent).values()) == attempts
    assert_same_run(run.folder, alone(ROUNDS), 1e-9)
    first, second, _ = (int(t) for t in re.findall(r"going on from round (\d) of run", run.out))
    assert 2 <= first <= second < ROUNDS and first % 2 == second % 2 == 0
    assert not [name for name in tree(run.folder) if name.endswith(".tmp")]


def test_sigterm_to_one_rank_stops_all_after_the_round_and_saves(ended):
    run = ended["killed"]
    done, again = re.findall(r"interrupted after round (\d) of 8|going on from round (\d) of run", run.out)[-2:]
    assert done[0] == again[1] and int(done[0]) >= 6
    assert "exitcode: 143" in run.err


def test_a_divergence_of_two_ranks_is_one_sentence_and_leaves_what_was_good(ended):
    run = ended["diverged"]
    assert run.code != 0
    said = re.findall(r"^vfl: round (\d): NaN or infinity from clients? \d+(?:, \d+)*; .*$", run.err, re.MULTILINE)
    assert len(said) == 1 and run.err.count("vfl: ") == 1 and "all_reduce" not in run.err
    good = int(said[0]) - 1
    assert len(metrics(run.folder)) == good == checkpoint.round_of(newest(run.folder))
    assert all(tensor.isfinite().all() for tensor in tensors(run.folder / "model.safetensors").values())
