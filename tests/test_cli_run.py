"""`vfl run`: what it writes and prints, and how it refuses what it cannot do."""

import dataclasses
import gzip
import json
import os
import re
import runpy
import signal
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import SMALL, assert_same_run, here, metrics, newest, tensors, tree, vfl

from algorithms.fedavg import FedAdam
from vfl import checkpoint, models, runs
from vfl.algorithms import algorithms, load_algorithm
from vfl.cli import _main
from vfl.cli.call import parse_run
from vfl.cli.options import ABOUT_THE_CALL, GROUPS, RunOptions, option_fields
from vfl.data import federated

__all__ = ["here"]

PROMISED = {
    "round",
    "train_loss",
    "test_loss",
    "test_accuracy",
    "bits_up",
    "bits_down",
    "gradients",
    "clients",
    "seconds",
}


# --- what a run leaves ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, str]:
    """A run on the embedded digits with everything at its default but its length: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(sys.stdout, "write", lambda text: said.append(text) or len(text))
        assert _main(["run", "fedavg", "--partition", "dirichlet:0.3", "--rounds", "4", "--out", str(folder)]) == 0
    return folder, "".join(said)


def test_a_run_leaves_its_files_and_no_others(digits):
    names = {"config.yaml", "metrics.jsonl", "model.safetensors", "curves.png", "checkpoints"}
    assert set(tree(digits[0])) == names | {"checkpoints/round-00000004.safetensors"}
    assert (digits[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_round_has_one_line_with_the_promised_numbers(digits):
    rows = metrics(digits[0])
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    D = 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
    for row in rows:
        assert row.keys() >= PROMISED
        assert row["clients"] == 10 and row["seconds"] > 0
        assert row["bits_up"] == row["bits_down"] == row["round"] * 10 * 32 * D
    gradients = [row["gradients"] for row in rows]
    assert gradients == sorted(gradients) and gradients[0] > 0
    assert rows[-1]["test_loss"] < rows[0]["test_loss"]


def test_the_saved_model_is_that_of_the_last_round_and_loads_into_the_original_module(digits):
    data = federated("digits", partition="dirichlet:0.3", clients=100)
    module = models.model("mlp", (1, 8, 8), 10)
    module.load_state_dict(tensors(digits[0] / "model.safetensors"), strict=True)
    assert data.test is not None
    outputs = module.eval()(data.transform(data.test.x, torch.float32))
    accuracy = (outputs.argmax(1) == data.test.y).double().mean().item()
    assert accuracy == pytest.approx(metrics(digits[0])[-1]["test_accuracy"], abs=1e-12)
    loss = torch.nn.functional.cross_entropy(outputs, data.test.y).item()
    assert loss == pytest.approx(metrics(digits[0])[-1]["test_loss"], rel=1e-5)


def test_a_run_says_what_it_reached_and_where_everything_is(digits):
    folder, said = digits
    last = metrics(folder)[-1]
    assert said.startswith("fedavg on digits, 100 clients\n")
    assert f"done after round 4 of 4: test loss {last['test_loss']:.4f}, test accuracy " in said
    assert f"{last['test_accuracy']:.2%}" in said
    assert said.endswith(f"run    {folder}\nplot   {folder}/curves.png\n")


def test_the_configuration_holds_every_option(digits):
    config = yaml.safe_load((digits[0] / "config.yaml").read_text())
    options = set(option_fields(load_algorithm("fedavg")))
    assert set(config) == (options - ABOUT_THE_CALL) | {"algorithm"}
    assert (config["algorithm"], config["partition"], config["rounds"]) == ("fedavg", "dirichlet:0.3", 4)


def test_a_run_reruns_from_its_configuration_to_the_same_bits(here, capsys):
    assert vfl("scaffold", *SMALL, "--rounds", 3, "--local-lr", 0.3, "--seed", 5, "--out", "a") == 0
    assert vfl("--config", "a/config.yaml", "--out", "b") == 0
    assert_same_run(Path("b"), Path("a"))
    assert (here / "a" / "config.yaml").read_bytes() == (here / "b" / "config.yaml").read_bytes()


def test_the_same_command_gives_the_same_bits_and_another_seed_others(here):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert vfl("fedadam", *SMALL, "--rounds", 3, "--seed", seed, "--out", out, "--quiet") == 0
    assert_same_run(Path("b"), Path("a"))
    with pytest.raises(AssertionError):
        assert_same_run(Path("c"), Path("a"))


def test_options_on_the_command_line_come_on_top_of_the_file(here):
    Path("mine.yaml").write_text("algorithm: fedprox\nrounds: 9\nlocal-lr: 0.5\nclients_per_round: 60%\nmu: 1e-3\n")
    assert vfl("--config", "mine.yaml", *SMALL, "--rounds", 2, "--mu", 0.2, "--out", "a", "--quiet") == 0
    config = runs.read_config(Path("a/config.yaml"))
    wanted = {"algorithm": "fedprox", "rounds": 2, "local_lr": 0.5, "clients_per_round": "6", "mu": 0.2}
    assert wanted.items() <= config.items()
    assert vfl("fedavg", "--config=mine.yaml", *SMALL, "--rounds", 2, "--out", "b") == 2  # fedavg has no mu
    assert vfl("fedprox", "--rounds", 1, *SMALL, "--config", "mine.yaml", "--out", "c", "--quiet") == 0
    config = runs.read_config(Path("c/config.yaml"))
    assert (config["rounds"], config["mu"]) == (1, 1e-3)


def test_every_kind_of_value_survives_the_configuration_file(here):
    options = ("--clip-norm", 0.5, "--local-steps", 2, "--data-root", "some/where", "--eval-every", 0)
    assert vfl("fedavg", *SMALL, *options, "--rounds", 1, "--out", "a", "--quiet") == 0
    assert vfl("--config", "a/config.yaml", "--out", "b", "--quiet") == 0
    config = runs.read_config(Path("b/config.yaml"))
    assert config == runs.read_config(Path("a/config.yaml"))
    assert (config["clip_norm"], config["local_steps"], config["data_root"]) == (0.5, 2, "some/where")
    assert config["partition"] is None


def test_evaluation_follows_its_own_schedule(here):
    options = ("--eval-every", 2, "--client-eval-every", 3, "--held-out", 0.2, "--validation", 0.2)
    assert vfl("fedavg", *SMALL, *options, "--rounds", 5, "--out", "a", "--quiet") == 0
    rows = metrics(Path("a"))
    for name in ("test_accuracy", "validation_loss"):
        assert [row["round"] for row in rows if name in row] == [2, 4, 5]
    assert [row["round"] for row in rows if "client_test_accuracy_worst" in row] == [3, 5]
    assert vfl("fedavg", *SMALL, "--eval-every", 0, "--rounds", 3, "--out", "b", "--quiet") == 0
    assert not [name for row in metrics(Path("b")) for name in row if name.startswith("test")]


def test_a_model_of_ones_own_is_found_in_the_current_folder(here):
    Path("mine.py").write_text("from torch import nn\ndef net(shape, classes): return nn.Linear(shape[0], classes)\n")
    assert vfl("fedavg", *SMALL, "--model", "mine:net", "--rounds", 1, "--out", "a", "--quiet") == 0
    assert tensors(Path("a/model.safetensors"))["weight"].shape == (3, 6)


# --- where a run lies ---


@pytest.fixture
def clock(monkeypatch) -> str:
    """Time stands still: the name that it gives."""

    class Now(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("vfl.cli.run.datetime", Now)
    return "20260102-030405"


def test_without_out_a_run_is_named_after_time_algorithm_and_data(here, clock, capsys):
    for _ in range(3):
        assert vfl("fedprox", *SMALL, "--rounds", 1) == 0
    name = f"{clock}-fedprox-synthetic"
    assert sorted(path.name for path in Path("runs").iterdir()) == [name, f"{name}-2", f"{name}-3"]
    said = capsys.readouterr().out
    assert all(f"run    runs/{folder.name}\n" in said for folder in Path("runs").iterdir())
    assert all(len(metrics(folder)) == 1 for folder in Path("runs").iterdir())


def test_a_run_is_never_overwritten_unasked(here, capsys):
    assert vfl("fedavg", *SMALL, "--rounds", 2, "--out", "a", "--quiet") == 0
    before = tree(here)
    assert vfl("fedprox", *SMALL, "--rounds", 1, "--out", "a") == 2
    assert refusal(capsys) == ("a already holds a run; continue it with --resume, replace it with --overwrite, "
                               "or name another folder with --out")  # fmt: skip
    assert tree(here) == before
    assert vfl("fedprox", *SMALL, "--rounds", 1, "--out", "a", "--overwrite", "--quiet") == 0
    assert runs.read_config(Path("a/config.yaml"))["algorithm"] == "fedprox"
    assert len(metrics(Path("a"))) == 1 and [checkpoint.round_of(p) for p in checkpoint.every(Path("a"))] == [1]


def test_a_refused_run_does_not_touch_the_one_it_would_replace(here, capsys):
    assert vfl("fedavg", *SMALL, "--rounds", 1, "--out", "a", "--quiet") == 0
    before = tree(here)
    for bad in (("--model", "nope"), ("--clients-per-round", "11"), ("--local-lr", "-1"), ("--sampling", "fixed:99")):
        assert vfl("fedavg", *SMALL, "--rounds", 1, "--out", "a", "--overwrite", *bad) == 2
    assert tree(here) == before


def test_quiet_prints_nothing(here, capfd):
    """Warnings included, here that of a model that vmap cannot take."""
    Path("mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, shape, classes): super().__init__(shape[0], classes)\n"
        "    def forward(self, x): return super().forward(x) * (1 if x.sum() > 0 else 2)\n"
    )
    options = ("fedavg", *SMALL, "--model", "mine:Net", "--out", "a")
    assert vfl(*options, "--rounds", 2, "--quiet") == 0
    assert vfl("--resume", "--out", "a", "--rounds", 3, "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert vfl("--resume", "--out", "a", "--rounds", 4) == 0
    said = capfd.readouterr()
    assert "warning: this model or algorithm cannot run under vmap" in said.out
    assert "warning: going on from round 3 of a" in said.out and said.err == ""


# --- under a launcher that restarts ---


@pytest.fixture
def launched(monkeypatch) -> None:
    """The variables of torchrun --max-restarts 1, for a single rank."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")


def test_a_restart_goes_on_with_its_own_run(here, launched, capsys):
    options = ("scaffold", *SMALL, "--checkpoint-every", 1, "--keep", 9, "--quiet", "--rounds", 4)
    assert vfl(*options, "--out", "a") == 0
    for path in checkpoint.every(Path("a"))[2:]:  # as if it had been killed in round 3
        path.unlink()
    assert vfl(*options, "--out", "a") == 0
    assert vfl(*options, "--out", "b") == 0
    assert_same_run(Path("a"), Path("b"))


def test_a_restart_does_not_go_on_with_the_run_that_its_first_attempt_was_refused(here, launched, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "yours")
    assert vfl("fedavg", *SMALL, "--rounds", 1, "--out", "a", "--quiet") == 0
    before = tree(here)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert vfl("fedavg", *SMALL, "--rounds", 2, "--out", "a") == 2
        assert "already holds a run" in refusal(capsys)
    assert tree(here) == before


def test_a_restart_that_may_overwrite_replaces_an_older_run_but_goes_on_with_its_own(here, launched, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "yours")
    options = ("fedavg", *SMALL, "--rounds", 3, "--out", "a", "--quiet", "--overwrite")
    assert vfl(*options) == 0
    old = (here / "a" / "metrics.jsonl").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert vfl(*options) == 0
    new = (here / "a" / "metrics.jsonl").read_bytes()
    assert new != old  # the seconds
    assert vfl(*options) == 0
    assert (here / "a" / "metrics.jsonl").read_bytes() == new


def test_a_launcher_that_restarts_needs_a_folder_to_find_again(here, launched, capsys):
    assert vfl("fedavg", *SMALL) == 2
    assert refusal(capsys).startswith("under torchrun --max-restarts, --out is needed")


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_one_rank_of_a_machine_speaks_for_all(rank, says, here, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert vfl("fedavg", "--model", "nope") == 2
    assert bool(capsys.readouterr().err) is says


# --- runs that fail ---

FAILING = """
import torch
from pathlib import Path
from torch import nn

class Net(nn.Linear):
    def __init__(self, shape, classes):
        super().__init__(shape[0], classes)

    def forward(self, x):
        log = Path("a/metrics.jsonl")
        if log.exists() and len(log.read_text().splitlines()) == 2:
            BAD
        return super().forward(x)
"""


def test_a_run_that_diverges_names_round_and_clients_and_leaves_what_was_good(here, capsys):
    Path("failing.py").write_text(FAILING.replace("BAD", "x = x * float('nan')"))
    options = ("scaffold", *SMALL, "--model", "failing:Net", "--sampling", "fixed:1,4,7")
    assert vfl(*options, "--rounds", 6, "--out", "a") == 1
    captured = capsys.readouterr()
    assert (
        captured.err
        == "vfl: round 3: NaN or infinity from clients 1, 4, 7; a smaller rate or gradient clipping may help\n"
    )
    assert "done" not in captured.out
    Path("a").rename("bad")
    assert vfl(*options, "--rounds", 2, "--out", "good", "--quiet") == 0
    assert_same_run(Path("bad"), Path("good"))


def test_a_rate_far_too_high_is_a_divergence_in_one_sentence(here, capsys):
    assert vfl("fedavg", "--local-lr", "1e9", "--rounds", 5, "--out", "a", "--quiet") == 1
    captured = capsys.readouterr()
    said = re.fullmatch(r"vfl: round (\d): NaN or infinity from clients? \d+(, \d+)*; .*\n", captured.err)
    assert said and captured.out == ""
    good = int(said[1]) - 1
    assert len(metrics(Path("a"))) == good == checkpoint.round_of(newest(Path("a")))
    assert all(tensor.isfinite().all() for tensor in tensors(Path("a/model.safetensors")).values())


def test_dropped_clients_are_counted_and_the_run_goes_on(here):
    Path("failing.py").write_text(FAILING.replace("BAD", "x = x * float('nan')"))
    options = ("--model", "failing:Net", "--rounds", 3, "--out", "a", "--quiet")
    assert vfl("fedavg", *SMALL, *options, "--on-nonfinite", "drop", "--eval-every", 0) == 0
    rows = metrics(Path("a"))
    assert [row["dropped"] for row in rows] == [0, 0, 6]
    assert rows[2]["train_loss"] is None and rows[2]["clients"] == 6
    assert tensors(newest(Path("a")))["server.x"].isfinite().all()


def test_infinity_is_written_as_json(here):
    Path("failing.py").write_text(FAILING.replace("BAD", "x = x * float('inf')"))
    options = ("--model", "failing:Net", "--rounds", 3, "--out", "a", "--quiet")
    assert vfl("fedavg", *SMALL, *options, "--on-nonfinite", "drop") == 0
    for line in Path("a/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_clients_failure_shows_its_stack_names_it_and_leaves_what_was_good(here, capsys):
    Path("failing.py").write_text(FAILING.replace("BAD", "raise LookupError('lost')"))
    options = ("scaffold", *SMALL, "--model", "failing:Net", "--sampling", "fixed:4,7", "--execution", "loop")
    assert vfl(*options, "--rounds", 6, "--out", "a", "--quiet") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "vfl: client 4, round 3: LookupError: lost"
    assert lines[0].startswith("Traceback") and any("failing.py" in line and "in forward" in line for line in lines)
    Path("a").rename("bad")
    assert vfl(*options, "--rounds", 2, "--out", "good", "--quiet") == 0
    assert_same_run(Path("bad"), Path("good"))


@pytest.mark.parametrize(("name", "every"), [("fedavg", 0), ("scaffold", 1)])
def test_a_run_that_breaks_down_keeps_its_traceback_and_goes_on_as_if_it_had_not(name, every, here, monkeypatch):
    """It breaks in the evaluation of round 3, when the clients' states are a round ahead of the last one reported."""
    module = sys.modules["vfl.simulate"]
    evaluate, calls = module.evaluate, []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return evaluate(*arguments)

    monkeypatch.setattr(module, "evaluate", breaks)
    options = (name, *SMALL, "--rounds", 5, "--checkpoint-every", every, "--quiet")
    with pytest.raises(ZeroDivisionError):
        vfl(*options, "--out", "a")
    assert len(metrics(Path("a"))) == checkpoint.round_of(newest(Path("a"))) == 2
    assert vfl("--resume", "--out", "a", "--quiet") == 0
    assert vfl(*options, "--out", "whole") == 0
    assert_same_run(Path("a"), Path("whole"))


def test_running_out_of_memory_is_said_in_one_sentence(here, monkeypatch, capsys):
    def full(*arguments, **options):
        raise MemoryError("cannot have 9 TB")

    monkeypatch.setattr("vfl.cli.experiment.federated", full)
    assert vfl("fedavg", *SMALL) == 1
    assert capsys.readouterr().err == "vfl: out of memory: cannot have 9 TB\n"


def test_ctrl_c_before_the_first_round_ends_without_a_traceback(here, monkeypatch, capsys):
    def pressed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vfl.cli.experiment.federated", pressed)
    assert vfl("fedavg", *SMALL) == 130
    assert capsys.readouterr().err.count("\n") == 1 and tree(here) == {}
    monkeypatch.setattr("vfl.cli.data.convert", pressed)
    assert _main(["data", "convert", "femnist", "out", "--format", "npz"]) == 130
    assert capsys.readouterr().err == "vfl: stopped\n"


def test_ctrl_c_after_the_last_round_cuts_no_report_short(here, monkeypatch, capsys):
    """A launcher's signal, that is, which comes when another rank has ended first."""
    module = sys.modules["vfl.cli.run"]
    report = module._report

    def pressed(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        report(*arguments)

    monkeypatch.setattr(module, "_report", pressed)
    assert vfl("fedavg", *SMALL, "--rounds", 1, "--out", "a") == 0
    assert "done after round 1 of 1" in capsys.readouterr().out


# --- bad input ---


def refusal(capsys) -> str:
    """The one sentence on stderr, and nothing else anywhere."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"vfl: [^\n]+\n", captured.err), captured.err
    return captured.err.removeprefix("vfl: ").removesuffix("\n")


MINE = """
from torch import nn

def few(shape, classes): return nn.Linear(shape[0], classes - 1)
def wide(shape, classes): return nn.Linear(shape[0] + 1, classes)
def flat(shape, classes): return nn.Sequential(nn.Linear(shape[0], classes), nn.Flatten(0))
def frozen(shape, classes): return nn.Linear(shape[0], classes).requires_grad_(False)
def number(shape, classes): return classes
def fails(shape, classes): raise KeyError("weights")
def three(a, b, c): return nn.Linear(6, 3)

class Pair(nn.Linear):
    def __init__(self, shape, classes): super().__init__(shape[0], classes)
    def forward(self, x): return super().forward(x), None

class Picky(Pair):
    def forward(self, x): assert x.dim() == 4, "needs images"
"""

FILES = {
    "list.yaml": "- rounds\n", "broken.yaml": "a: [", "empty.yaml": "", "unknown.yaml": "rouns: 3\n",
    "text.yaml": "rounds: many\n", "null.yaml": "rounds: null\n", "float.yaml": "rounds: 1.5\n",
    "bool.yaml": "rounds: true\n", "nested.yaml": "rounds: {a: 1}\n", "several.yaml": "rounds: [1, 2]\n",
    "negative.yaml": "local_lr: -1\n", "choice.yaml": "execution: lop\n", "quiet.yaml": "quiet: true\n",
    "out.yaml": "out: x\n", "name.yaml": "algorithm: nope\n", "number.yaml": "algorithm: 3\n", "file": "",
}  # fmt: skip

BAD = [
    # names
    ("nope", "unknown algorithm 'nope'; known: "),
    ("fedvg", "unknown algorithm 'fedvg'; did you mean 'fedavg'?"),
    ("", "vfl run needs an algorithm"),
    ("--rounds 3", "vfl run needs an algorithm"),
    ("fedavg --clients-per-round 2..5 --clip 1 --noise-multiplier 1", "2..5 is a range, and here it takes one number"),
    ("fedavg --patience 3", "validation_loss is to judge this run but is never measured"),
    ("fedavg --track tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
    ("fedavg --data digit", "unknown data set 'digit'; did you mean 'digits'?"),
    ("fedavg --data synthetic:foo=1", "which has no 'foo'"),
    ("fedavg --model mpl", "unknown model 'mpl'; did you mean 'mlp'?"),
    ("fedavg --partition dirichlt:1", "unknown partition 'dirichlt'; did you mean 'dirichlet'?"),
    ("fedavg --sampling unifrm", "unknown sampler 'unifrm'; did you mean 'uniform'?"),
    ("fedavg --local-optimizer sdg", "unknown optimizer 'sdg'; did you mean 'sgd'?"),
    ("fedavg --server-optimizer adam:b3=1", "which has no 'b3'"),
    ("fedavg --local-schedule cosin", "unknown schedule 'cosin'; did you mean 'cosine'?"),
    ("fedavg --server-schedule cosine:x", "where rounds is a whole number, not 'x'"),
    ("fedavg --lokal-lr 1", "unknown option --lokal-lr; did you mean --local-lr?"),
    ("fedavg --locallr=1", "unknown option --locallr; did you mean --local-lr?"),
    ("fedavg --round 3", "unknown option --round; did you mean --rounds?"),
    ("fedavg --mu 1", "unknown option --mu; "),
    ("fedavg --zzz", "unknown option --zzz; `vfl run fedavg --help` shows them all"),
    ("fedavg --no-quiet", "unknown option --no-quiet"),
    ("fedavg fedprox", "'fedprox' belongs to no option of `vfl run fedavg`"),
    # numbers
    ("fedavg --rounds", "--rounds needs a value"),
    ("fedavg --rounds abc", "--rounds must be a whole number, not 'abc'"),
    ("fedavg --rounds 1.5", "--rounds must be a whole number, not '1.5'"),
    ("fedavg --rounds 0", "--rounds must be at least 1, not 0"),
    ("fedavg --rounds -1", "--rounds must be at least 1, not -1"),
    ("fedavg --rounds 99999999999999999999", "--rounds must be below 2147483648, not 99999999999999999999"),
    ("fedavg --batch-size 0", "batch-size must be at least 1, not 0"),
    ("fedavg --batch-size -2", "batch-size must be at least 1, not -2"),
    ("fedavg --batch-size abc", "batch-size must be all, a whole number from 1 or a fraction (0.1 or 10%), not 'abc'"),
    ("fedavg --batch-size ²", "batch-size must be all, a whole number from 1 or a fraction (0.1 or 10%), not '²'"),
    ("fedavg --batch-size 99999999999999999999", "batch-size must be below 2147483648, not 99999999999999999999"),
    ("fedavg --batch-size 1.5", "batch-size '1.5' is a fraction outside (0, 1]; write a whole number for a count"),
    ("fedavg --batch-size 0%", "batch-size '0%' is a fraction outside (0, 1]"),
    ("fedavg --batch-size nan", "batch-size 'nan' is a fraction outside (0, 1]"),
    ("fedavg --draw nise", "expected one of 'epochs', 'nice', 'multi', 'importance'"),
    ("fedavg --draw nice --local-epochs 2", "draw nice takes steps and knows no epochs, so epochs cannot be 2"),
    ("fedavg --draw multi --reshuffle once", "draw multi draws afresh in each step, so reshuffle cannot be once"),
    ("fedavg --reshuffle once --local-steps 3", "reshuffle once visits the same minibatches in every round"),
    ("fedavg --local-epochs 0", "--local-epochs must be at least 1, not 0"),
    ("fedavg --local-epochs 99999999999999999999", "--local-epochs must be below"),
    ("fedavg --local-steps 0", "--local-steps must be at least 1, not 0"),
    ("fedavg --local-steps x", "--local-steps must be a whole number or none, not 'x'"),
    ("fedavg --local-lr -0.1", "local-lr must be a finite number ≥ 0, not -0.1"),
    ("fedavg --local-lr nan", "local-lr must be a finite number ≥ 0, not nan"),
    ("fedavg --local-lr fast", "--local-lr must be a number, not 'fast'"),
    ("fedavg --server-lr -1", "server-lr must be a finite number ≥ 0, not -1.0"),
    ("fedavg --server-lr inf", "server-lr must be a finite number ≥ 0, not inf"),
    ("fedavg --clip-norm -1", "clip-norm must be a number > 0, not -1.0"),
    ("fedavg --server-optimizer sgd:momentum=-1", "momentum"),
    ("fedprox --mu -1", "mu must be a finite number ≥ 0, not -1.0"),
    ("fedavg --seed abc", "--seed must be a whole number, not 'abc'"),
    ("fedavg --seed -1", "--seed must be a whole number from 0 to 2^63 − 1, not -1"),
    ("fedavg --seed 99999999999999999999", "--seed must be a whole number from 0 to 2^63 − 1"),
    ("fedavg --keep 0", "--keep must be at least 1, not 0"),
    ("fedavg --eval-every -1", "--eval-every must be at least 0, not -1"),
    ("fedavg --checkpoint-every -1", "--checkpoint-every must be at least 0, not -1"),
    ("fedavg --validation 1", "--validation is a fraction from 0 to below 1, not 1.0"),
    ("fedavg --validation nan", "--validation is a fraction from 0 to below 1, not nan"),
    ("fedavg --held-out -0.1", "--held-out is a fraction from 0 to below 1, not -0.1"),
    ("fedavg --corrupt-labels 1.1", "--corrupt-labels is a fraction from 0 to 1, not 1.1"),
    ("fedavg --chunk 0", "chunk must be 'auto' or a whole number of clients from 1, not '0'"),
    ("fedavg --chunk many", "chunk must be 'auto' or a whole number of clients from 1, not 'many'"),
    ("fedavg --fine-tune-steps 2", "--fine-tune-steps is for what --client-eval-every evaluates, which is 0"),
    # choices
    ("fedavg --execution lop", "invalid choice 'lop' for argument '--execution'; expected one of 'auto', 'vmap', "),
    ("fedavg --dtype float16", "invalid choice 'float16' for argument '--dtype'; expected one of 'float32', 'float64'"),
    ("fedavg --client-state disk", "invalid choice 'disk' for argument '--client-state'"),
    ("fedavg --on-nonfinite skip", "invalid choice 'skip' for argument '--on-nonfinite'; expected one of 'stop', "),
    ("fedavg --weighting bytes", "invalid choice 'bytes' for argument '--weighting'"),
    ("scaffold --option 3", "invalid choice '3' for argument '--option'; expected one of '1', '2'"),
    ("scaffold --weighting examples", "scaffold averages its clients uniformly"),
    ("fedavg --device nonsense", "device must be auto, cpu, cuda or cuda:1, not 'nonsense'"),
    ("fedavg --device meta", "device must be auto, cpu, cuda or cuda:1, not 'meta'"),
    ("fedavg --device cuda:x", "device must be auto, cpu, cuda or cuda:1, not 'cuda:x'"),
    ("fedavg --device cuda:999", "device 'cuda:999' cannot be used: "),
    # clients
    ("fedavg --clients-per-round 11", "clients-per-round is 11, above the population of 10 clients"),
    ("fedavg --clients-per-round 0", "clients-per-round must be at least 1, not 0"),
    ("fedavg --clients-per-round -3", "clients-per-round must be at least 1, not -3"),
    ("fedavg --clients-per-round 1.5", "clients-per-round '1.5' is a fraction outside (0, 1]"),
    ("fedavg --clients-per-round 120%", "clients-per-round '120%' is a fraction outside (0, 1]"),
    ("fedavg --clients-per-round few", "clients-per-round 'few' is not a count"),
    ("fedavg --clients 0", "--clients must be at least 1, not 0"),
    ("fedavg --clients x", "--clients must be a whole number or none, not 'x'"),
    ("fedavg --data digits --clients 1438 --partition iid", "1438 clients cannot share 1437 examples"),
    ("fedavg --data digits --partition natural", "natural: this data set does not say whose its examples are"),
    ("fedavg --partition shards:99", "shards"),
    ("fedavg --partition dirichlet", "missing a required argument: 'alpha'"),
    ("fedavg --partition dirichlet:-1", "alpha must be above 0"),
    ("fedavg --sampling fixed:0,10", "sampler fixed names a client outside 0 … 9: 0, 10"),
    ("fedavg --sampling fixed:-1", "sampler fixed names a client outside 0 … 9: -1"),
    ("fedavg --sampling fixed:2,2", "sampler fixed names a client twice"),
    ("fedavg --sampling fixed:x", "where ids is a whole number, not 'x'"),
    ("scaffold --sampling replacement", "keeps state on its clients, so none may be drawn twice"),
    ("scaffold --sampling weighted", "keeps state on its clients, so none may be drawn twice"),
    # data
    ("fedavg --data mnist --data-root nowhere", "is missing from nowhere/mnist and nowhere; run `vfl data get mnist`"),
    ("fedavg --data cifar10 --data-root nowhere", "is missing from nowhere/cifar10 and nowhere"),
    ("fedavg --data mnist --data-root cut", "bytes instead of the"),
    ("fedavg --data fashion_mnist --data-root cut", "train-images-idx3-ubyte.gz"),
    ("fedavg --data synthetic:examples=0", "synthetic: examples must be at least 1, not 0"),
    ("fedavg --data synthetic:examples=99999999999999999999", "are more than any memory holds"),
    ("fedavg --data synthetic --clients 2000000000 --partition natural --data synthetic:features=99999", "memory"),
    # models
    ("fedavg --model mine:few", "model 'mine:few' has 2 outputs, too few for the labels 0 to 2 of synthetic"),
    ("fedavg --model mine:wide", "model 'mine:wide' cannot take the inputs of synthetic (6): "),
    ("fedavg --model mine:Picky", "model 'mine:Picky' cannot take the inputs of synthetic (6): needs images"),
    ("fedavg --model mine:Pair", "model 'mine:Pair' has outputs that the loss of synthetic cannot take"),
    ("fedavg --model mine:flat", "model 'mine:flat'"),
    ("fedavg --model mine:frozen", "nothing to train"),
    ("fedavg --model mine:number", "must return a torch.nn.Module, not int"),
    ("fedavg --model mine:fails", "model 'mine:fails': fails failed: KeyError"),
    ("fedavg --model mine:three", "three must take (input_shape, classes), or nothing"),
    ("fedavg --model mine:nope", "mine has no function or class 'nope'"),
    ("fedavg --model nowhere:net", "no module named 'nowhere' can be imported"),
    ("fedavg --model mlp:0", "every layer must have at least 1 unit, not 0"),
    ("fedavg --model mlp:x", "where sizes is a whole number, not 'x'"),
    ("fedavg --model cnn", "cnn: needs images"),
    # files
    ("fedavg --out file", "cannot write file: File exists; name another folder with --out"),
    ("fedavg --out file/run", "cannot write file/run: Not a directory; name another folder with --out"),
    ("fedavg --out /dev/null/run", "cannot write /dev/null/run: Not a directory; name another folder with --out"),
    ("fedavg --resume", "--resume needs --out"),
    ("--resume", "--resume needs --out"),
    ("fedavg --resume --out nowhere", "--resume: there is no run in nowhere; leave --resume out to start one"),
    ("--resume --out nowhere", "--resume: there is no run in nowhere; leave --resume out to start one"),
    ("--resume --out file", "--resume: there is no run in file"),
    ("fedavg --config nowhere.yaml", "cannot read the configuration nowhere.yaml: No such file or directory"),
    ("fedavg --config .", "cannot read the configuration .: Is a directory"),
    ("fedavg --config", "--config needs a value"),
    ("fedavg --config list.yaml", "list.yaml must hold one `option: value` a line"),
    ("fedavg --config empty.yaml", "empty.yaml must hold one `option: value` a line"),
    ("fedavg --config broken.yaml", "broken.yaml is not valid YAML: "),
    ("fedavg --config unknown.yaml", "unknown.yaml: unknown option 'rouns'; did you mean 'rounds'?"),
    ("fedavg --config text.yaml", "text.yaml: --rounds must be a whole number, not 'many'"),
    ("fedavg --config null.yaml", "null.yaml: --rounds must be a whole number, not 'none'"),
    ("fedavg --config float.yaml", "float.yaml: --rounds must be a whole number, not '1.5'"),
    ("fedavg --config bool.yaml", "bool.yaml: --rounds must be a whole number, not 'True'"),
    ("fedavg --config nested.yaml", "nested.yaml: rounds must be one value, not {'a': 1}"),
    ("fedavg --config several.yaml", "several.yaml: rounds must be one value, not [1, 2]"),
    ("fedavg --config negative.yaml", "negative.yaml: local-lr must be a finite number ≥ 0, not -1.0"),
    ("fedavg --config choice.yaml", "choice.yaml: invalid choice 'lop' for argument '--execution'"),
    ("fedavg --config quiet.yaml", "quiet.yaml: quiet is no part of an experiment; give --quiet on the command line"),
    ("fedavg --config out.yaml", "out.yaml: out is no part of an experiment; give --out on the command line"),
    ("--config name.yaml", "unknown algorithm 'nope'"),
    ("--config number.yaml", "unknown algorithm '3'"),
    ("--config text.yaml", "vfl run needs an algorithm"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with everything that the bad commands need."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "mine.py").write_text(MINE)
    (folder / "cut").mkdir()
    header = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (60000, 28, 28))
    for name, content in (("mnist", header + bytes(999)), ("fashion_mnist", gzip.compress(header)[:-9])):
        (folder / "cut" / name).mkdir()
        ending = "" if name == "mnist" else ".gz"
        for split, kind in (
            ("train", "images-idx3"),
            ("train", "labels-idx1"),
            ("t10k", "images-idx3"),
            ("t10k", "labels-idx1"),
        ):
            (folder / "cut" / name / f"{split}-{kind}-ubyte{ending}").write_bytes(content)
    return folder


@pytest.mark.parametrize(("command", "says"), BAD)
def test_bad_input_is_answered_by_one_sentence_and_code_2_and_leaves_nothing(
    command, says, shelf, here, monkeypatch, capsys
):
    monkeypatch.chdir(shelf)
    before = tree(shelf)
    name, *rest = command.split(" ") if command else [""]
    at_fault = {argument.partition("=")[0] for argument in rest}
    small = [part for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] not in at_fault for part in pair]
    configured = "--config" in rest or "--resume" in rest or name.startswith("--")
    arguments = [name, *rest] if configured else [name, *small, *rest]
    assert vfl(*arguments) == 2
    assert says in refusal(capsys)
    assert tree(shelf) == before
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    "option",
    ["data", "data-root", "partition", "model", "clients-per-round", "sampling", "batch-size", "device", "chunk", "out",
     "config", "local-optimizer", "server-schedule", "rounds", "seed", "clients", "validation"],
)  # fmt: skip
def test_an_empty_value_is_refused(option, here, capsys):
    for argument in ((f"--{option}", ""), (f"--{option}=",), (f"--{option}", " ")):
        assert vfl("fedavg", *argument) == 2
        assert refusal(capsys) == f"--{option} must not be empty"
    assert tree(here) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(here, capsys):
    for device in ("cuda", "cuda:0"):
        assert vfl("fedavg", *SMALL, "--device", device) == 2
        assert refusal(capsys) == (f"device '{device}' cannot be used: torch finds no GPU here; `--device auto` takes "
                                   "what there is")  # fmt: skip
    assert tree(here) == {}


def test_resume_and_overwrite_together_are_refused(here, capsys):
    assert vfl("fedavg", *SMALL, "--rounds", 1, "--out", "a", "--quiet") == 0
    before = tree(here)
    assert vfl("--resume", "--overwrite", "--out", "a") == 2
    assert refusal(capsys) == "--resume keeps the run in --out and --overwrite replaces it; give one of them"
    (here / "a" / "config.yaml").write_text("rounds: [")
    assert vfl("--resume", "--out", "a") == 2
    assert refusal(capsys).startswith("a/config.yaml is not valid YAML")
    assert tree(here).keys() == before.keys()


@pytest.mark.parametrize("value", ["2147483647", "all", "10"])
def test_a_batch_above_every_clients_data_is_all_of_it(value, here):
    options = (*SMALL, "--rounds", 2, "--quiet")
    assert vfl("fedavg", *options, "--batch-size", "all", "--out", "all") == 0
    assert vfl("fedavg", *options, "--batch-size", value, "--out", "big") == 0
    assert_same_run(Path("big"), Path("all"))


# --- help ---


@pytest.mark.parametrize("name", algorithms())
def test_no_two_parts_of_a_run_have_an_option_of_one_name(name):
    parts = (RunOptions, *GROUPS.values(), load_algorithm(name))
    assert len(option_fields(load_algorithm(name))) == sum(len(dataclasses.fields(part)) for part in parts)


@pytest.mark.parametrize("name", algorithms())
def test_help_shows_every_option_with_its_default_at_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert vfl(name, "--help") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    boxes = re.split(r"\n[ │] ?(?=--[a-z])", shown)[1:]
    found = {
        box.split()[0].removeprefix("--").rstrip(",").replace("-", "_"): " ".join(box.replace("│", " ").split())
        for box in boxes
    }
    fields = option_fields(load_algorithm(name)).values()
    assert set(found) == {f.name for f in fields}
    for field in fields:
        text = found[field.name]
        assert re.search(r"[a-z0-9`)η]\. \(default: .+\)", text), text
        if field.default is not None:
            assert f"(default: {field.default})".replace(" ", "") in re.sub(r"[ ']", "", text)  # lines break, quotes


def test_the_program_explains_itself(capsys):
    for argv in ([], ["--help"], ["-h"], ["run", "--help"], ["run", "-h"]):
        assert _main(argv) == 0
        shown = capsys.readouterr().out
        assert "vfl run ALGORITHM [options]" in shown and max(map(len, shown.splitlines())) <= 80
    assert _main(["data", "--help"]) == 0
    assert capsys.readouterr().out in shown
    assert _main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_python_m_vfl_is_the_same_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vfl", "run", "nope"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vfl", run_name="__main__")
    assert ended.value.code == 2 and refusal(capsys).startswith("unknown algorithm 'nope'")


def test_a_configuration_serves_another_algorithm_without_the_first_ones_defaults(here):
    """SCAFFOLD's plain server step and uniform weights are no choice of the user's; its local rate here is."""
    path = here / "scaffold.yaml"
    own = {"option": 2, "weighting": "uniform", "server_optimizer": "sgd", "server_lr": 1.0, "local_lr": 0.05}
    path.write_text(yaml.safe_dump({"algorithm": "scaffold", "data": "digits", "rounds": 7, **own}), encoding="utf-8")
    call = parse_run(["fedadam", "--config", str(path)])
    assert (call.name, call.options.rounds) == ("fedadam", 7)
    assert call.algorithm == FedAdam(local_lr=0.05)
