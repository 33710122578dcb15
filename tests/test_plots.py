"""Learning curves: what is drawn, against what, and what is left out."""

import math
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from vfl import UsageError
from vfl.plots import XAxis, learning_curves, score, series

pytest.importorskip("matplotlib", reason="plots are an extra: pip install vfl[plots]")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HISTORY: list[dict[str, Any]] = [
    {"round": 1, "train_loss": 4.0, "bits_up": 10.0, "bits_down": 20.0, "gradients": 5.0, "seconds": 2.0},
    {"round": 2, "train_loss": 3.0, "test_loss": 3.5, "test_accuracy": 0.5, "bits_up": 20.0, "bits_down": 40.0,
     "gradients": 10.0, "seconds": 1.0},
    {"round": 3, "train_loss": None, "bits_up": 30.0, "bits_down": 60.0, "gradients": 15.0, "seconds": 1.5},
    {"round": 4, "train_loss": 1.0, "test_loss": math.inf, "test_accuracy": 0.75, "bits_up": 40.0, "bits_down": 80.0,
     "gradients": 20.0, "seconds": 1.0},
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved, in order; they are written all the same."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """(x, y) of every line."""
    pairs = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.get_lines()]
    return [(x.tolist(), y.tolist()) for x, y in pairs]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_metrics_name_says_split_and_quantity() -> None:
    assert score("test_loss") == ("test", "loss")
    assert score("validation_top5_accuracy") == ("validation", "top5_accuracy")
    names = ("bits_up", "client_test_loss_mean", "loss", "test", "latest_loss", "test_loss\n")
    assert [score(name) for name in names] == [None] * len(names)


@pytest.mark.parametrize(
    ("x_axis", "x"),
    [("round", [1, 2, 4]), ("bits_up", [10, 20, 40]), ("bits_down", [20, 40, 80]), ("bits_total", [30, 60, 120]),
     ("gradients", [5, 10, 20]), ("seconds", [2, 3, 5.5])],
)  # fmt: skip
def test_a_series_leaves_out_what_is_missing_and_sums_the_seconds_of_all_rounds(x_axis: XAxis, x: list[float]) -> None:
    assert series(HISTORY, "train_loss", x_axis) == (x, [4.0, 3.0, 1.0])


def test_a_series_needs_both_coordinates_finite() -> None:
    assert series(HISTORY, "test_loss") == ([2.0], [3.5])
    rows = [{"round": 1, "train_loss": 1.0, "bits_up": None}, {"round": 2, "train_loss": 2.0, "bits_up": 7.0}]
    assert series(rows, "train_loss", "bits_up") == ([7.0], [2.0])
    assert series(rows, "train_loss", "bits_total") == ([], [])
    assert series(rows, "test_accuracy") == ([], [])
    timed = [{"train_loss": 1.0, "seconds": None}, {"train_loss": 2.0}, {"train_loss": 3.0, "seconds": 4.0}]
    assert series(timed, "train_loss", "seconds") == ([0.0, 0.0, 4.0], [1.0, 2.0, 3.0])


def test_a_classification_run_gets_a_loss_and_an_accuracy_panel(tmp_path: Path, figures: list[Figure]) -> None:
    path = learning_curves({"fedavg": HISTORY}, tmp_path / "new" / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    loss, accuracy = figures[0].axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy")
    assert lines(loss) == [([1, 2, 4], [4, 3, 1]), ([2], [3.5])]
    assert lines(accuracy) == [([2, 4], [0.5, 0.75])]
    assert legend(figures[0]) == ["train", "test"]
    assert figures[0].get_suptitle() == "fedavg"


def test_a_single_evaluation_is_a_visible_point(tmp_path: Path, figures: list[Figure]) -> None:
    learning_curves({"run": HISTORY[:2]}, tmp_path / "curves.png")
    (line,) = figures[0].axes[1].get_lines()
    assert lines(figures[0].axes[1]) == [([2], [0.5])] and line.get_marker() == "o"


def test_a_regression_run_gets_the_loss_panel_alone(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [{k: v for k, v in row.items() if k != "test_accuracy"} for row in HISTORY]
    learning_curves({"linear": rows}, tmp_path / "curves.png")
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["loss"]


def test_other_quantities_get_panels_after_loss_and_accuracy(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [{"round": 1, "test_f1": 0.5, "test_accuracy": 0.5, "test_loss": 1.0, "test_auc": 0.5}]
    learning_curves({"run": rows}, tmp_path / "curves.png")
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["loss", "accuracy", "auc", "f1"]


def test_several_runs_share_a_plot_and_differ_in_colour(tmp_path: Path, figures: list[Figure]) -> None:
    labels = [f"run {i}" for i in range(12)]
    learning_curves(dict.fromkeys(labels, HISTORY), tmp_path / "curves.png", "gradients")
    accuracy = figures[0].axes[1]
    assert lines(accuracy) == [([10, 20], [0.5, 0.75])] * 12
    assert len({str(line.get_color()) for line in accuracy.get_lines()}) == 12
    assert legend(figures[0]) == [*labels, "train", "test"]


def test_several_runs_show_the_validation_set_only_without_a_test_set(tmp_path: Path, figures: list[Figure]) -> None:
    validated = [{"round": 1, "test_loss": 1.0, "validation_loss": 1.0, "validation_f1": 0.5}]
    untested = [{"round": 1, "train_loss": 1.0, "validation_loss": 1.0}]
    learning_curves({"one": validated}, tmp_path / "curves.png")
    learning_curves({"one": validated, "two": validated}, tmp_path / "curves.png")
    learning_curves({"one": untested, "two": untested}, tmp_path / "curves.png")
    assert legend(figures[0]) == ["test", "validation"]
    assert legend(figures[1]) == ["one", "two", "test"] and len(figures[1].axes) == 1
    assert legend(figures[2]) == ["one", "two", "train", "validation"]


@pytest.mark.parametrize(
    ("x_axis", "label", "tick"),
    [("bits_up", "uplink, all clients", "20 Mbit"), ("bits_down", "downlink, all clients", "20 Mbit"),
     ("gradients", "sample-gradients", "20 M")],
)  # fmt: skip
def test_costs_are_labelled_with_their_units(
    x_axis: XAxis, label: str, tick: str, tmp_path: Path, figures: list[Figure]
) -> None:
    rows = [{"train_loss": 1.0, x_axis: 1e6 * t} for t in range(1, 101)]
    learning_curves({"run": rows}, tmp_path / "curves.png", x_axis)
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == label and tick in [text.get_text() for text in axes.get_xticklabels()]


def test_rounds_have_whole_ticks_even_when_few(tmp_path: Path, figures: list[Figure]) -> None:
    learning_curves({"run": HISTORY[:2]}, tmp_path / "curves.png")
    ticks = figures[0].axes[0].get_xticks()
    assert len(ticks) and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize(("smallest", "scale"), [(0.5, "linear"), (0.001, "log"), (0.0, "linear")])
def test_losses_over_many_orders_of_magnitude_get_a_logarithmic_axis(
    smallest: float, scale: str, tmp_path: Path, figures: list[Figure]
) -> None:
    rows = [{"round": 1, "train_loss": 1.0, "test_accuracy": 0.001}, {"round": 2, "train_loss": smallest}]
    learning_curves({"run": [*rows, {"round": 3, "test_accuracy": 0.9}]}, tmp_path / "curves.png")
    assert [axes.get_yscale() for axes in figures[0].axes] == [scale, "linear"]


DESCENT: list[dict[str, Any]] = [
    {"round": t, "train_loss": 1.0, "grad_norm": 10.0**-t, "suboptimality": 100.0**-t if t < 9 else -1e-18,
     "bits_up": 10.0 * t, "bits_down": 5.0 * t, "mine": float(t)} for t in range(1, 10)
]  # fmt: skip


def test_metrics_of_the_objective_get_panels_of_their_own_and_logarithmic_axes(
    tmp_path: Path, figures: list[Figure]
) -> None:
    learning_curves({"run": DESCENT}, tmp_path / "curves.png", "bits_total")
    loss, norm, gap = figures[0].axes
    assert [axes.get_ylabel() for axes in (norm, gap)] == ["‖∇f(x)‖", "f(x) − f*"]
    assert [axes.get_yscale() for axes in (loss, norm, gap)] == ["linear", "log", "log"]
    assert lines(norm) == [([15.0 * t for t in range(1, 10)], [10.0**-t for t in range(1, 10)])]
    assert norm.get_xlabel() == "uplink and downlink, all clients"
    assert legend(figures[0]) == ["train"], "f is of all examples, and no split"
    assert score("grad_norm") == ("", "grad_norm")


def test_any_metric_can_be_drawn_alone_in_the_order_asked_for(tmp_path: Path, figures: list[Figure]) -> None:
    learning_curves({"a": DESCENT, "b": DESCENT}, tmp_path / "curves.png", metrics=("mine", "grad_norm"))
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["mine", "‖∇f(x)‖"]
    assert lines(figures[0].axes[0]) == [(list(range(1, 10)), list(range(1, 10)))] * 2
    assert legend(figures[0]) == ["a", "b"]
    learning_curves({"a": DESCENT}, tmp_path / "alone.png", metrics=("grad_norm",))
    assert not figures[1].legends
    with pytest.raises(UsageError, match="no round has both yours and round"):
        learning_curves({"a": DESCENT}, tmp_path / "curves.png", metrics=("mine", "yours"))


@pytest.mark.parametrize(("log", "scales"), [(None, ["log", "linear"]), (True, ["log"] * 2), (False, ["linear"] * 2)])
def test_the_axes_scale_may_be_given(
    log: bool | None, scales: list[str], tmp_path: Path, figures: list[Figure]
) -> None:
    learning_curves({"run": DESCENT}, tmp_path / "curves.png", metrics=("grad_norm", "mine"), log=log)
    assert [axes.get_yscale() for axes in figures[0].axes] == scales


def test_a_logarithmic_axis_needs_a_value_above_zero(tmp_path: Path) -> None:
    rows = [{"round": 1, "mine": 0.0}, {"round": 2, "mine": -1.0}]
    with pytest.raises(UsageError, match="mine has no value above 0, which a logarithmic axis needs"):
        learning_curves({"run": rows}, tmp_path / "curves.png", metrics=("mine",), log=True)


def test_labels_with_signs_of_matplotlibs_own_are_shown_as_they_are(tmp_path: Path, figures: list[Figure]) -> None:
    learning_curves({"_lr=$1$": HISTORY, "a_b ^ $x": HISTORY}, tmp_path / "curves.png")
    shown = [label.replace("\u200b", "").replace(r"\$", "$") for label in legend(figures[0])]
    assert shown[:2] == ["_lr=$1$", "a_b ^ $x"]


@pytest.mark.parametrize("histories", [{}, {"run": []}, {"run": [{"round": 1, "train_loss": None, "bits_up": 1.0}]}])
def test_nothing_to_draw_is_an_error(histories: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        learning_curves(histories, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"curves\.foo cannot be drawn.*'foo' is not supported"):
        learning_curves({"run": HISTORY}, tmp_path / "curves.foo")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be drawn"):
        learning_curves({"run": HISTORY}, tmp_path / "file" / "curves.png")


def test_an_unknown_x_axis_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x-axis must be one of round, .*'epoch'"):
        learning_curves({"run": HISTORY}, tmp_path / "curves.png", cast(Any, "epoch"))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install vfl\[plots\]"):
        learning_curves({"run": HISTORY}, tmp_path / "curves.png")


def test_plots_do_without_pyplots_global_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    assert learning_curves({"run": HISTORY}, tmp_path / "curves.png").exists()
