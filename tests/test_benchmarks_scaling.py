"""benchmarks.roofline counts what it says, and benchmarks.scaling varies what it says."""

import functools
import json
import math
import subprocess
from dataclasses import asdict

import pytest
import torch
import tyro

import vfl
from benchmarks import measuring, report, roofline, scaling
from benchmarks.work import SHAPES, SMALL, Work
from vfl.errors import UsageError

# --- benchmarks.roofline ---

TINY = Work(clients=3, rounds=2, examples=4, batch=4)


@pytest.mark.parametrize("model", SMALL)
def test_a_clients_demand_is_that_of_its_layers(model):
    work = Work(clients=7, examples=6, batch=2, epochs=3)
    outputs = {2: 1, 4: 28 * 28}  # how often a layer's weights are used: once, or at every pixel
    products, D = 0.0, 0
    for i, shape in enumerate(SHAPES[model][::2]):
        uses = outputs[len(shape)] / (4**i if len(shape) == 4 else 1)  # pooling quarters the pixels
        # Forward, the gradient of the weights and, but for the first layer, of the inputs.
        products += (2 if i == 0 else 3) * math.prod(shape) * uses
        D += math.prod(shape) + shape[0]
    need = roofline.demand(model, work)
    assert need.flops == 2 * products * 6 * 3
    assert need.step == 2 * 4 * D and need.model == 9 * need.step
    assert need.examples == 3 * 6 * 784 * 4 and need.everyone == 7 * 6 * 784 * 4


def test_the_demand_of_a_recurrent_and_of_a_residual_network():
    work = Work(clients=7, examples=2, batch=1)
    T, H, V = 80, 256, 80
    products = 2 * 4 * H * 8 + 3 * 4 * H * (H + H + H) + 3 * V * H  # a position's; the first layer's inputs are the
    products += 4 * H * 8  # embedding's outputs, which have a gradient
    need = roofline.demand("lstm", work)
    assert need.flops == 2 * products * T * 2
    assert need.examples == 2 * T * 8 and need.everyone == 7 * need.examples
    # He et al. count 0.56 G multiplications and additions of 32×32 pixels; the first layer has no gradient of inputs.
    first = 3 * 64 * 9 * 32 * 32
    assert roofline.demand("resnet18", work).flops == pytest.approx(2 * 2 * (3 * 0.5554e9 - first), rel=1e-3)


def test_the_floor_is_the_longer_of_arithmetic_and_bytes():
    peaks = roofline.Peaks({"slow": 10.0, "fast": 100.0}, {1: 80.0, 4: 50.0, 16: 60.0, 64: 5.0})
    assert [peaks.bandwidth(size) for size in (1, 2, 4, 16, 17, 1000)] == [80, 60, 60, 60, 5, 5]
    need = roofline.Demand(flops=200, model=120, step=3, examples=10, everyone=1000)
    assert need.seconds(peaks) == (2.0, 2.0 + 2.0)
    rows = roofline.rows_of({"mlp": need}, {("mlp", "vmap"): [0.1, 0.05, 0.2]}, peaks)
    assert rows[0]["clients_per_s"] == 0.1 and rows[0]["fraction"] == pytest.approx(0.4)
    again = roofline.Peaks({"slow": 20.0, "fast": 30.0}, {1: 1.0, 4: 90.0, 16: 0.0, 64: 9.0})
    assert roofline.better(peaks, again) == ({"slow": 20.0, "fast": 100.0}, {1: 80.0, 4: 90.0, 16: 60.0, 64: 9.0})


def test_the_roofline_is_written_and_rendered(tmp_path, monkeypatch):
    few = functools.partial(roofline.measure_peaks, sides=(16,), copies=(2**12, 2**16), tries=2)
    monkeypatch.setattr(roofline, "measure_peaks", few)
    path = tmp_path / "roofline.json"
    sizes = [f"--{key}={value}" for key, value in asdict(TINY).items() if value is not False]
    threads = torch.get_num_threads()
    tyro.cli(roofline.main, args=[*sizes, "--model=softmax", "--execution", "vmap", "loop", "--json", str(path)])
    assert torch.get_num_threads() == threads == 1
    found = json.loads(path.read_text())
    assert [(row["execution"], len(row["runs"])) for row in found["rows"]] == [("vmap", 3), ("loop", 3)]
    assert all(row["fraction"] > 0 for row in found["rows"])
    assert set(found["peaks"]["products"]) >= {"torch.mm"}
    assert all(rate > 0 for rates in found["peaks"].values() for rate in rates.values())
    assert "## Roofline" in report.render([path]) and "| softmax | vmap |" in report.render([path])


# --- benchmarks.scaling ---

FEW = scaling.Case(population=4, cohort=2, rounds=2, examples=3, features=3)


def test_a_dimension_is_a_model_of_about_as_many_parameters():
    for D in scaling.AXES["dimension"].values:
        case = scaling.AXES["dimension"].at(scaling.Case(), D)
        with torch.device("meta"):
            made = vfl.models.model(case.model, (case.features,), case.classes)
        assert sum(p.numel() for p in made.parameters()) == pytest.approx(D, rel=0.05)


def test_the_overhead_is_that_of_one_step_of_ten_parameters():
    for execution in ("vmap", "compile", "loop"):
        case = scaling.AXES["overhead"].at(FEW, execution)
        assert (case.execution, case.cohort, case.steps) == (execution, 1, 1)
    found = scaling.measure(case)
    assert found["parameters"] == 10
    assert found["rounds"] == FEW.rounds


def test_replicas_are_played_at_once():
    found = scaling.measure(scaling.AXES["replicas"].at(FEW, 3))
    assert found["parameters"] == 20
    assert found["rounds"] == FEW.rounds


def test_a_case_ends_when_its_time_is_over_but_not_before_three_rounds(capsys):
    arguments = [f"--case.{key}={value}" for key, value in (asdict(FEW) | {"rounds": 40, "seconds": 0.0}).items()]
    tyro.cli(scaling.main, args=["--what", "case", *arguments])
    assert json.loads(capsys.readouterr().out)["rounds"] == scaling.FEWEST == 3


@pytest.mark.parametrize("what", ["population", "steps", "ranks", "replicas", "overhead"])
def test_an_axis_is_measured_written_drawn_and_rendered(what, tmp_path, monkeypatch):
    measured = []

    def pretended(case):
        measured.append(case)
        s = 0.001 * (2 if case.execution == "vmap" else 3)
        return {"s_per_round": s, "rounds": 2, "parameters": 10, "data_mb": 1.0, "beside_mb": 9.0}

    monkeypatch.setattr(scaling, "measured_apart", pretended)
    path = tmp_path / f"scaling_{what}.json"
    tyro.cli(scaling.main, args=["--what", what, "--case.examples=3", "--repeats=2", "--json", str(path)])
    assert measured == [scaling.AXES[what].at(scaling.Case(examples=3), v) for v in scaling.AXES[what].values] * 2
    found, text = json.loads(path.read_text()), report.render([path])
    if what == "overhead":
        assert found["plot"] is None
        assert "| vmap | 10 | 2 | 1 | 500 | 1 | 9 | ✓ |" in text and "| loop | 10 | 3 | 1.5 | 333 | 1 | 9 | ✗ |" in text
    else:
        assert (tmp_path / found["plot"]).read_bytes().startswith(b"\x89PNG")
        assert f"](results/scaling_{what}.png)" in text
        assert what not in found["same"]
    assert f"## Scaling: {what}" in text


def test_ranks_are_processes_of_one_thread_and_a_failure_is_a_sentence(monkeypatch):
    ran = []

    def run(command, env, **options):
        ran.append((command, env))
        done = functools.partial(subprocess.CompletedProcess, command)
        return done(0, stdout='hello\n{"s_per_round": 1.5}\n') if len(ran) < 3 else done(1, "", "OSError: no\nlast\n")

    monkeypatch.setattr(measuring.subprocess, "run", run)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for ranks in (1, 2):
        assert scaling.measured_apart(scaling.AXES["ranks"].at(FEW, ranks)) == {"s_per_round": 1.5}
    (alone, _), (both, environment) = ran
    assert "torch.distributed.run" not in alone and "--case.ranks=1" in alone
    assert both[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert environment["OMP_NUM_THREADS"] == "1"
    with pytest.raises(UsageError, match="could not be measured: OSError: no"):
        scaling.measured_apart(FEW)
