"""`vfl run` on problems whose constants are known, and `vfl show` and `vfl data show` of them."""

from pathlib import Path

import numpy as np
import pytest
from cli_runs import here, metrics, tensors, vfl

from vfl import runs
from vfl.cli import _main
from vfl.data import federated
from vfl.problems import LinearProblem
from vfl.regularizers import Regularizer

__all__ = ["here"]

EXACT = (
    *("--clients", 6, "--clients-per-round", "all", "--batch-size", "all", "--dtype", "float64"),
    *("--execution", "vmap", "--chunk", 6),
)
QUADRATIC = ("--data", "quadratic:dim=5,L=3,mu=1,examples=4", *EXACT)


def refusal(capsys) -> str:
    """The one sentence of an error."""
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    return line.removeprefix("vfl: ")


def test_a_quadratic_brings_its_model_and_its_loss_and_the_metrics_land_in_the_log(here, capsys):
    metrics_wanted = ("objective", "grad_norm", "suboptimality", "distance")
    options = ("--metrics", ",".join(metrics_wanted), "--eval-every", 2, "--local-lr", 0.3, "--rounds", 25)
    assert vfl("fedavg", *QUADRATIC, *options, "--out", "a") == 0
    rows = metrics(Path("a"))
    assert [row["round"] for row in rows if "grad_norm" in row] == [*range(2, 25, 2), 25]
    problem = LinearProblem(federated("quadratic:dim=5,L=3,mu=1,examples=4", clients=6))
    x_star, f_star = problem.solution
    x = tensors(Path("a/model.safetensors"))["1.weight"].numpy().ravel()
    last = rows[-1]
    assert last["distance"] == pytest.approx(np.linalg.norm(x - x_star), rel=1e-9)
    assert last["suboptimality"] == pytest.approx(last["objective"] - f_star, abs=1e-12)
    assert rows[1]["suboptimality"] > 0.01 > 10 * last["suboptimality"] > 0
    assert last["grad_norm"] <= 3 * last["distance"]
    assert runs.read_config(Path("a/config.yaml"))["model"] == "linear"
    said = capsys.readouterr().out
    assert "grad norm " in said and "suboptimality " in said and "no test set" not in said


def test_a_resumed_run_goes_on_with_its_metrics_and_may_take_others(here):
    options = ("--metrics", "grad_norm", "--rounds", 4, "--local-lr", 0.1, "--quiet")
    assert vfl("fedavg", *QUADRATIC, *options, "--out", "whole") == 0
    assert vfl("fedavg", *QUADRATIC, *options, "--rounds", 2, "--out", "parts") == 0
    assert vfl("--resume", "--out", "parts", "--rounds", 3, "--quiet") == 0
    assert vfl("--resume", "--out", "parts", "--rounds", 4, "--metrics", "grad_norm,distance", "--quiet") == 0
    names = ("grad_norm", "round_bits_up", "client_bits_up", "bits_up")
    parts, whole = ([[row[name] for name in names] for row in metrics(Path(f))] for f in ("parts", "whole"))
    assert parts == whole
    assert ["distance" in row for row in metrics(Path("parts"))] == [False, False, False, True]


def test_logistic_regression_on_a_libsvm_file_with_a_regularizer(here):
    Path("libsvm").mkdir()
    draw = np.random.default_rng(0)
    rows = ["".join(f" {j}:{v:.6f}" for j, v in enumerate(draw.standard_normal(4), 1)) for _ in range(60)]
    Path("libsvm/mine").write_text("".join(f"{label}{row}\n" for label, row in zip([-1, 1] * 30, rows, strict=True)))
    Path("libsvm/mine.t").write_text("1 1:1\n-1 2:1\n")
    data = ("--data", "libsvm:mine", "--data-root", ".", "--partition", "sorted", "--regularizer", "l2:0.1")
    options = ("--metrics", "suboptimality,distance", "--rounds", 60, "--local-lr", 1, "--quiet")
    assert vfl("fedavg", *data, *EXACT, *options, "--out", "a") == 0
    row = metrics(Path("a"))[-1]
    assert row["suboptimality"] > -1e-15 and row["distance"] < 1e-3 < metrics(Path("a"))[0]["distance"]
    x = tensors(Path("a/model.safetensors"))["1.weight"].numpy().ravel()
    loss = np.log1p(np.exp([-x[0], x[1]])).mean() + 0.05 * x @ x
    assert row["test_loss"] == pytest.approx(loss, rel=1e-9), "the regularizer is part of it"
    assert row["test_accuracy"] in (0, 0.5, 1)
    problem = LinearProblem(federated("libsvm:mine", root=".", partition="sorted", clients=6), Regularizer(0.1))
    assert np.linalg.norm(x - problem.solution.x) == pytest.approx(row["distance"], rel=1e-6)


def test_another_model_on_two_classes_takes_cross_entropy(here):
    Path("mine").write_text("".join(f"{n % 2} 1:{n}\n" for n in range(20)))
    options = ("--data", "libsvm:mine", "--data-root", ".", *EXACT, "--rounds", 1, "--quiet")
    assert vfl("fedavg", *options, "--model", "mlp:3", "--metrics", "grad_norm", "--out", "a") == 0
    assert metrics(Path("a"))[0]["grad_norm"] > 0
    assert tensors(Path("a/model.safetensors"))["3.weight"].shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--metrics", "gradnorm"), "unknown metric 'gradnorm'; did you mean 'grad_norm'?"),
        (("--metrics", "grad_norm,"), "unknown metric ''; known: distance, grad_norm, objective, suboptimality"),
        (("--regularizer", "l3:1"), "unknown regularizer 'l3'; known: l2, nonconvex"),
        (("--regularizer", "l2:-1"), "l2: the strength must be a finite number ≥ 0, not -1.0"),
        (
            ("--regularizer", "nonconvex:0.1", "--metrics", "suboptimality"),
            "metric suboptimality: the minimum of an objective with a nonconvex regularizer is not known",
        ),
        (
            ("--model", "mlp:2", "--metrics", "distance"),
            "metric distance: the objective's minimum is known only for the model linear, on two classes or numbers",
        ),
        (("--data", "digits", "--model", "linear"), "linear: has one output, for regression or two classes"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_folder_is_made(arguments, sentence, here, capsys):
    assert vfl("fedavg", *QUADRATIC, *arguments, "--rounds", 1, "--out", "a") == 2
    assert refusal(capsys).startswith(sentence)
    assert not Path("a").exists()


def test_bfloat16_sends_float32(here):
    options = ("--clients", 6, "--clients-per-round", 6, "--data", "synthetic:features=6,classes=3,test=30")
    for dtype in ("float32", "bfloat16"):
        assert vfl("fedavg", *options, "--model", "mlp:5", "--rounds", 2, "--dtype", dtype, "--out", dtype) == 0
    single, half = (metrics(Path(dtype))[-1] for dtype in ("float32", "bfloat16"))
    assert half["bits_up"] == single["bits_up"]
    assert 0 < abs(half["test_loss"] - single["test_loss"]) < 0.05
    (weight, *_) = tensors(Path("bfloat16/model.safetensors")).values()
    assert str(weight.dtype) == "torch.float32"


def test_show_draws_any_metric_against_all_bits(here, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("vfl.cli.inspect.learning_curves", lambda *arguments: drawn.append(arguments) or "picture")
    for out, steps in (("a", 1), ("b", 2)):
        options = ("--metrics", "grad_norm", "--local-steps", steps, "--rounds", 3, "--quiet")
        assert vfl("fedavg", *QUADRATIC, *options, "--out", out) == 0
    assert _main(["show", "a", "b", "--metrics", "grad_norm, train_loss", "--x-axis", "bits_total", "--log"]) == 0
    (histories, path, *rest) = drawn[0]
    assert list(histories) == ["a", "b"] and str(path) == "comparison.png"
    assert rest == ["bits_total", ("grad_norm", "train_loss"), True]
    said = capsys.readouterr().out
    assert "grad" in said and f"@{3}" in said, "without a test set, runs are compared by the objective"
    assert _main(["show", "a"]) == 0 and len(drawn) == 1
    assert "grad norm" in capsys.readouterr().out


def test_data_show_gives_the_constants_of_a_linear_problem(here, capsys):
    assert _main(["data", "show", "quadratic:dim=5,L=3,mu=1", "--clients", "4"]) == 0
    problem = LinearProblem(federated("quadratic:dim=5,L=3,mu=1", clients=4))
    said = " ".join(capsys.readouterr().out.split())
    assert "L 3 L̃, √(mean Lᵢ²) " in said and "μ 1 f* " in said
    assert f"f* {problem.solution.value:.6g} ‖x*‖ {np.linalg.norm(problem.solution.x):.6g}" in said


def test_the_objective_is_measured_in_single_precision_too(here):
    options = ("--data", "quadratic:dim=4", "--clients", 3, "--clients-per-round", "all", "--batch-size", "all")
    assert vfl("fedavg", *options, "--rounds", 2, "--metrics", "grad_norm", "--dtype", "float32", "--out", "r") == 0
    assert all(row["grad_norm"] > 0 for row in metrics(here / "r"))
