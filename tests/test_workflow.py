"""The documented example of a round's seven steps runs, learns, and sends what it says."""

import runpy
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

SCRIPT = ROOT / "scripts" / "workflow.py"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def test_the_example_learns_and_rehearsal_helps_it(main, capsys):
    with_it, without = main(rounds=8), main(rounds=8, rehearsal_steps=0)
    assert with_it[-1]["test_accuracy"] > 0.8
    assert with_it[-1]["test_accuracy"] > without[-1]["test_accuracy"] + 0.02
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    bits = (64 * 32 + 32 + 32 * 10 + 10) * 32 * 10  # float32 parameters, ten clients
    assert {m["round_bits_up"] for m in with_it} == {m["round_bits_down"] for m in with_it} == {bits}
    assert f"{bits / 8e3:.0f} kB to 10 clients" in lines[0]


def test_sending_models_and_sending_changes_train_the_same_model(main):
    changes, models = main(rounds=3), main("model", rounds=3)
    for name in ("train_loss", "test_loss", "rehearsal_loss"):
        np.testing.assert_allclose([m[name] for m in models], [m[name] for m in changes], rtol=1e-3)


def test_it_runs_from_the_command_line(tmp_path):
    arguments = [sys.executable, str(SCRIPT), "--rounds", "1", "--sends", "model"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith("round  1: ")
