"""Checkpoints: a run that stops and goes on, by whatever way, ends where an uninterrupted one does."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_runs import SMALL, assert_same_run, here, metrics, newest, tensors, tree, vfl
from helpers import ALGORITHMS, ROOT, assert_same, federated, mlp, norm_and_dropout, state_numbers

from vfl import Engine, UsageError, checkpoint

__all__ = ["here"]

CONFIG = {"algorithm": "x", "local_lr": 0.1, "model": "mlp"}
STATEFUL = ("fedavg", "fedadam", "scaffold")  # without any memory, with the server's, with the clients' too


def folder_of(name: str, *options: object, rounds: int = 6, out: str = "whole") -> Path:
    """A small run from beginning to end."""
    assert vfl(name, *SMALL, "--quiet", "--rounds", rounds, "--out", out, *options) == 0
    return Path(out)


# --- states ---


def engine_of(name: str, **options) -> Engine:
    problem = norm_and_dropout() if name == "fedadam" else mlp()
    data = federated()
    algorithm = ALGORITHMS[name].build(problem, data.clients.population)
    return Engine(algorithm, problem, data, clients_per_round=6, chunk=3, execution="vmap", **options)


def play(engine: Engine, state, rounds: int):
    for _ in range(rounds):
        state, _ = engine.play(state)
    return state


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_loaded_state_is_the_saved_one_and_goes_on_as_it(name, tmp_path):
    engine = engine_of(name)
    state = play(engine, engine.init(3), 2)
    checkpoint.save(tmp_path, state, CONFIG, keep=1)
    saved = state_numbers(state)
    fresh = engine_of(name)
    loaded = checkpoint.load(checkpoint.of_round(tmp_path, 2), fresh.init(3), CONFIG)
    assert loaded.round == 2 and loaded.totals == state.totals and torch.equal(loaded.key, state.key)
    assert_same(state_numbers(loaded), saved, 0)
    ended, wanted = play(fresh, loaded, 2), play(engine, state, 2)
    assert_same(state_numbers(ended), state_numbers(wanted), 0)
    assert ended.totals == wanted.totals


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_first_state_can_be_saved_though_its_parts_may_be_one_tensor(name, tmp_path):
    engine = engine_of(name)
    state = engine.init(3)
    checkpoint.save(tmp_path, state, CONFIG, keep=1)
    loaded = checkpoint.load(checkpoint.of_round(tmp_path, 0), engine.init(4), CONFIG)
    assert_same(state_numbers(loaded), state_numbers(state), 0)


@pytest.mark.parametrize("place", ["device", "host"])
def test_saving_changes_nothing(place, tmp_path):
    engine = engine_of("scaffold-option=2", client_state=place)
    state = play(engine, engine.init(3), 2)
    before = state_numbers(state)
    checkpoint.save(tmp_path, state, CONFIG, keep=1)
    assert_same(state_numbers(state), before, 0)


def test_the_newest_checkpoints_are_kept_and_found_in_order(tmp_path):
    engine = engine_of("fedavg")
    state = engine.init(0)
    for t in range(5):
        checkpoint.save(tmp_path, state._replace(round=t), CONFIG, keep=3)
    (tmp_path / "checkpoints" / ".round-00000009.safetensors.12.tmp").write_bytes(b"half")
    assert [checkpoint.round_of(path) for path in checkpoint.every(tmp_path)] == [2, 3, 4]
    checkpoint.save(tmp_path, state._replace(round=123456789), CONFIG, keep=2)
    assert [checkpoint.round_of(path) for path in checkpoint.every(tmp_path)] == [4, 123456789]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    engine, other = engine_of("fedavg"), engine_of("fedadam")
    checkpoint.save(tmp_path, engine.init(0), CONFIG, keep=1)
    with pytest.raises(UsageError, match=r"belongs to another configuration: server\.x is \[\d+\] torch.float64 there"):
        checkpoint.load(checkpoint.of_round(tmp_path, 0), other.init(0), CONFIG)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    from vfl import runs

    runs.write_tensors(tmp_path / "x.safetensors", {"server.x": torch.zeros(3)}, {"format": "pt"})
    with pytest.raises(UsageError, match=r"x\.safetensors is no checkpoint that this version reads"):
        checkpoint.load(tmp_path / "x.safetensors", engine_of("fedavg").init(0), CONFIG)


# --- runs ---


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(name, here):
    whole = folder_of(name)
    parts = folder_of(name, rounds=2, out="parts")
    assert [row["round"] for row in metrics(parts)] == [1, 2]
    for rounds in (3, 6):
        assert vfl("--resume", "--out", "parts", "--rounds", rounds, "--quiet") == 0
    assert_same_run(parts, whole)


def test_a_resumed_run_with_minibatch_noise_in_the_model_equals_an_uninterrupted_one(here):
    Path("noisy.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))\n"
    )
    whole = folder_of("fedavg", "--model", "noisy:net", "--validation", 0.1, "--client-eval-every", 2)
    options = ("--model", "noisy:net", "--validation", 0.1, "--client-eval-every", 2)
    parts = folder_of("fedavg", *options, rounds=2, out="parts")
    assert vfl("--resume", "--out", "parts", "--rounds", 6, "--quiet") == 0
    assert_same_run(parts, whole)
    assert any("running_var" in name for name in tensors(parts / "model.safetensors"))


def test_going_on_from_an_older_checkpoint_plays_the_rounds_since_again(here):
    """What a crash leaves: metrics and a model newer than the newest checkpoint, half a line, half a file."""
    whole = folder_of("scaffold", out="whole")
    crashed = folder_of("scaffold", "--checkpoint-every", 2, "--keep", 3, rounds=5, out="crashed")
    assert [checkpoint.round_of(path) for path in checkpoint.every(crashed)] == [2, 4, 5]
    newest(crashed).unlink()
    with (crashed / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "train')
    (crashed / "checkpoints" / ".round-00000006.safetensors.12345.tmp").write_bytes(b"half")
    (crashed / ".metrics.jsonl.12345.tmp").write_bytes(b"half")
    assert vfl("--resume", "--out", crashed, "--rounds", 6, "--quiet") == 0
    assert_same_run(crashed, whole)
    assert not [name for name in tree(crashed) if name.endswith(".tmp")]


def test_a_run_without_a_checkpoint_starts_again(here):
    whole = folder_of("scaffold", out="whole")
    crashed = folder_of("scaffold", out="crashed")
    newest(crashed).unlink()
    assert vfl("--resume", "--out", crashed, "--quiet") == 0
    assert_same_run(crashed, whole)


def test_resuming_a_run_that_is_done_leaves_its_results(here):
    whole = folder_of("scaffold", out="whole")
    again = Path(shutil.copytree(whole, "again"))
    assert vfl("--resume", "--out", again, "--quiet") == 0
    assert_same_run(again, whole)
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (again / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()


def test_asking_for_fewer_rounds_than_are_done_is_refused(here, capsys):
    whole = folder_of("fedavg")
    before = tree(whole)
    assert vfl("--resume", "--out", whole, "--rounds", 3) == 2
    assert capsys.readouterr().err == (
        "vfl: the run in whole has done 6 rounds, more than --rounds 3; ask for more or leave --rounds out\n"
    )
    assert tree(whole) == before


def test_checkpoints_come_when_asked_for_and_the_newest_are_kept(here):
    def kept(*options: object) -> list[int]:
        return [checkpoint.round_of(path) for path in checkpoint.every(folder_of("fedavg", *options, "--overwrite"))]

    assert kept() == [6]
    assert kept("--checkpoint-every", 0) == [6]
    assert kept("--checkpoint-every", 2) == [4, 6]
    assert kept("--checkpoint-every", 2, "--keep", 9) == [2, 4, 6]
    assert kept("--checkpoint-every", 4, "--keep", 1) == [6]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(step, here, monkeypatch, capsys):
    whole = folder_of("scaffold", out="whole")
    original = getattr(os, step)

    def fails(*arguments):
        if list(Path("full/checkpoints").glob(".round-00000004*")):  # it is being written
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, step, fails)
    code = vfl("scaffold", *SMALL, "--rounds", 6, "--checkpoint-every", 2, "--out", "full", "--quiet")
    monkeypatch.setattr(os, step, original)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith("vfl: cannot write full/checkpoints/round-00000004.safetensors: No space left")
    assert captured.err.count("\n") == 1
    assert [path.name for path in (here / "full" / "checkpoints").iterdir()] == ["round-00000002.safetensors"]
    assert vfl("--resume", "--out", "full", "--quiet") == 0
    assert_same_run(Path("full"), whole)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(damage, here, capsys):
    whole = folder_of("scaffold", out="whole")
    parts = folder_of("scaffold", "--checkpoint-every", 2, rounds=3, out="parts")
    damaged = newest(parts)
    content = damaged.read_bytes()
    damaged.write_bytes({"truncated": content[:-9], "empty": b"", "garbage": b"\xff" * 99}[damage])
    before = tree(parts)
    assert vfl("--resume", "--out", parts, "--rounds", 6) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vfl: {damaged} cannot be read (") and error.count("\n") == 1
    assert error.endswith("; delete it to go on from the one before\n")
    assert tree(parts) == before
    damaged.unlink()
    assert vfl("--resume", "--out", parts, "--rounds", 6, "--quiet") == 0
    assert_same_run(parts, whole)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run after two of its six rounds."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert vfl("scaffold", *SMALL, "--quiet", "--rounds", 2, "--out", folder) == 0
    return folder


@pytest.mark.parametrize(
    "option",
    ["local-lr 0.2", "server-lr 0.5", "seed 1", "data synthetic:features=6,classes=3,examples=11,test=30", "clients 9",
     "clients-per-round 5", "sampling fixed", "partition iid", "model mlp:4", "model softmax", "batch-size 5",
     "local-epochs 2", "local-steps 3", "dtype float32", "option 1", "local-schedule cosine:9", "clip-norm 1",
     "server-optimizer adam", "validation 0.1", "held-out 0.1", "on-nonfinite drop"],
)  # fmt: skip
def test_a_checkpoint_of_another_configuration_is_refused_by_the_options_name(option, stopped, capsys):
    name, value = option.split()
    before = tree(stopped)
    assert vfl("--resume", "--out", stopped, "--rounds", 6, f"--{name}", value) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert f"belongs to another configuration: {name} was " in captured.err
    assert value in captured.err and "resume with the same options" in captured.err
    assert tree(stopped) == before


def test_a_checkpoint_of_another_algorithm_is_refused(stopped, capsys):
    assert vfl("fedavg", *SMALL, "--resume", "--out", stopped, "--config", "/dev/stdin") == 2
    capsys.readouterr()
    other = stopped.parent / "fedavg.yaml"
    other.write_text("algorithm: fedavg\n")
    assert vfl("fedavg", *SMALL, "--config", other, "--resume", "--out", stopped) == 2
    assert "algorithm was 'scaffold' there and is 'fedavg' now" in capsys.readouterr().err


def test_options_that_change_no_result_may_change_on_the_way(here):
    whole = folder_of("scaffold")
    parts = folder_of("scaffold", rounds=2, out="parts")
    changed = ("--execution", "loop", "--client-state", "host", "--checkpoint-every", 3, "--keep", 1, "--device", "cpu")
    assert vfl("--resume", "--out", parts, "--rounds", 4, "--quiet", *changed) == 0
    assert vfl("--resume", "--out", parts, "--rounds", 6, "--quiet", "--execution", "vmap", "--chunk", 5) == 0
    assert_same_run(parts, whole, 1e-9)


def test_the_best_model_and_an_early_stop_are_those_of_an_uninterrupted_run(here, capsys):
    judged = ("--best-by", "test_loss", "--patience", "2", "--local-lr", "2", "--keep", "50", "--checkpoint-every", "1")
    assert vfl("fedavg", *SMALL, *judged, "--rounds", 50, "--out", "whole") == 0
    losses = [row["test_loss"] for row in metrics(here / "whole")]
    best = losses.index(min(losses)) + 1
    assert 1 < best < len(losses) == best + 2, "it stops two rounds after its best one"
    said = capsys.readouterr().out
    assert f"stopped early: no better test_loss in 2 measurements (best: {min(losses):g} of round {best})" in said
    assert f"best   test loss {min(losses):.4f} in round {best}: whole/best.safetensors" in said
    wanted = tensors(here / "whole" / "best.safetensors")
    state = tensors(here / "whole" / "checkpoints" / f"round-{best:08d}.safetensors")
    assert torch.equal(torch.cat([t.reshape(-1) for t in wanted.values()]).sort()[0], state["server.x"].sort()[0])
    # Killed after a round whose checkpoint was not written, the best one or the one after it.
    for done in (best - 1, best, best + 1):
        shutil.rmtree(here / "parts", ignore_errors=True)
        shutil.copytree(here / "whole", here / "parts")
        for path in checkpoint.every(here / "parts"):
            if checkpoint.round_of(path) > done:
                path.unlink()
        assert vfl("--resume", "--out", "parts") == 0
        assert "was not kept" not in capsys.readouterr().out
        assert_same_run(here / "parts", here / "whole")
        assert all(torch.equal(t, wanted[n]) for n, t in tensors(here / "parts" / "best.safetensors").items())
    assert vfl("--resume", "--out", "whole", "--best-by", "train_loss") == 0
    assert "the best model by train_loss so far, that of round" in capsys.readouterr().out


# --- signals ---


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Iterator[dict[str, tuple[Path, int, str, str]]]:
    """Runs of real processes ended by a signal in their midst: folder, exit code, stdout, stderr."""
    folder = tmp_path_factory.mktemp("interrupted")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = {}
    for name in ("SIGTERM", "SIGINT"):
        command = [sys.executable, "-m", "vfl", "run", "scaffold", *SMALL, "--rounds", "100000", "--out", name]
        processes[name] = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    found = {}
    try:
        for name, process in processes.items():
            wait_for_round(folder / name, 3, process)
            process.send_signal(getattr(signal, name))
        for name, process in processes.items():
            out, err = process.communicate(timeout=60)
            found[name] = (folder / name, process.returncode, out, err)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    yield found


def wait_for_round(folder: Path, round: int, process: subprocess.Popen) -> None:
    """Until this round of a run is on disk."""
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(metrics_lines(folder)) < round:
        assert process.poll() is None and time.monotonic() < deadline, f"{folder.name} did not get to round {round}"
        time.sleep(0.02)


def metrics_lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_round_and_it_goes_on_to_the_same_numbers(
    name, code, interrupted, here, monkeypatch
):
    folder, ended, out, err = interrupted[name]
    rows = metrics(folder)
    done = len(rows)
    assert ended == code and "Traceback" not in err and "vfl:" not in err
    assert "warning: finishing this round, then saving" in out
    assert f"interrupted after round {done} of 100000" in out and "\nrun    " in out and "\nplot   " in out
    assert out.endswith(f"go on  vfl run --resume --out {name}\n")
    assert [checkpoint.round_of(path) for path in checkpoint.every(folder)][-1] == done
    assert "test_accuracy" in rows[-1] and (folder / "model.safetensors").exists()
    copy = shutil.copytree(folder, "parts")
    assert vfl("--resume", "--out", copy, "--rounds", done + 3, "--quiet") == 0
    whole = folder_of("scaffold", rounds=done + 3)
    assert_same_run(Path(copy), whole)


SIGNALLING = """
import signal
from pathlib import Path
from torch import nn

sent = []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        log = Path("run/metrics.jsonl")
        if log.exists() and len(log.read_text().splitlines()) == 2 and len(sent) < TIMES:
            sent.append(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return self.layer(x)
"""


def test_ctrl_c_twice_at_once_as_torchrun_passes_it_on_still_saves(here):
    Path("signalling.py").write_text(SIGNALLING.replace("TIMES", "2"))
    assert vfl("fedavg", *SMALL, "--model", "signalling:Net", "--rounds", 9, "--out", "run", "--quiet") == 130
    assert len(metrics(Path("run"))) == checkpoint.round_of(newest(Path("run"))) == 3


def test_ctrl_c_again_later_stops_at_once_and_the_run_goes_on_from_its_newest_checkpoint(here, monkeypatch, capsys):
    class Hours:
        now = 0.0

        def monotonic(self) -> float:
            self.now += 3600
            return self.now

    monkeypatch.setattr("vfl.cli.signals.time", Hours())
    Path("signalling.py").write_text(SIGNALLING.replace("TIMES", "2"))
    options = ("fedavg", *SMALL, "--model", "signalling:Net", "--checkpoint-every", 1)
    assert vfl(*options, "--rounds", 5, "--out", "run", "--quiet") == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("vfl: stopped; ") and captured.err.count("\n") == 1
    assert len(metrics(Path("run"))) == checkpoint.round_of(newest(Path("run"))) == 2
    assert vfl("--resume", "--out", "run", "--quiet") == 0
    assert vfl(*options, "--rounds", 5, "--out", "whole", "--quiet") == 0
    assert_same_run(Path("run"), Path("whole"))


def test_the_signal_handlers_of_before_are_put_back(here):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    folder_of("fedavg", rounds=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
