"""The reproduction scripts play what they say, and leave plots, numbers and a table."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from matplotlib.figure import Figure

import vfl
from algorithms.marina import Marina
from vfl.data import Dataset, Examples, cast


@pytest.fixture
def script(monkeypatch) -> Iterator:
    """Imports a script by its name, as Python finds it when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield lambda name: importlib.import_module(name)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures, save = [], Figure.savefig

    def savefig(self, path, **options):
        figures.append(self)
        save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def numbers(path: Path) -> dict:
    return json.loads(path.read_text())["curves"]


def labels(figures: list[Figure]) -> set[tuple[str, str]]:
    """What the axes of the first figure are called."""
    return {(axes.get_xlabel(), axes.get_ylabel()) for axes in figures[0].axes}


BOTH_AXES = {("round", "‖∇f(x)‖"), ("bits from all clients", "")}  # the second panel shares the first one's axis


def test_figure_2_compares_compressed_scaffold_by_rounds_and_bits(script, drawn, tmp_path, capsys, monkeypatch):
    module = script("fl_pytorch_fig2")
    monkeypatch.setattr(module, "SHARES", ("100%", "20%"))
    module.main(tmp_path, rounds=3, seeds=2, step=(0.05, 0.2))
    found = numbers(tmp_path / "fig2.json")
    assert list(found) == ["one minimiser", "own minimisers"]
    for curves in found.values():
        assert len(curves) == 4
        plain, fifth = curves["K = 5, rand-k 100%"], curves["K = 5, rand-k 20%"]
        assert [row["round"] for row in plain] == [1, 2, 3]
        assert plain[-1]["grad_norm"] < curves["K = 1, rand-k 100%"][-1]["grad_norm"]
        assert plain[-1]["grad_norm_std"] < 1e-12 < fifth[-1]["grad_norm_std"]
        # Δy and Δc of 20 float64 numbers from 10 clients in 3 rounds, or 4 of each.
        assert plain[-1]["bits_up"] == 10 * 3 * 2 * 20 * 64
        assert fifth[-1]["bits_up"] == 10 * 3 * 2 * 4 * 64
    assert labels(drawn) == BOTH_AXES
    assert all((tmp_path / f"fig2.{ending}").stat().st_size > 5_000 for ending in ("png", "pdf"))
    assert "own minimisers" in capsys.readouterr().out


def test_figure_3_compares_local_steps_of_diana_and_marina(script, drawn, tmp_path):
    script("fl_pytorch_fig3").main(tmp_path, rounds=8, seeds=2)
    found = numbers(tmp_path / "fig3.json")
    same, own = found["one minimiser"], found["own minimisers"]
    assert set(same) == set(own) == {f"{name}, K = {K}" for name in ("DIANA", "MARINA") for K in (1, 5)}
    for name in ("DIANA", "MARINA"):
        assert same[f"{name}, K = 5"][-1]["grad_norm"] < same[f"{name}, K = 1"][-1]["grad_norm"] / 5
    assert own["MARINA, K = 5"][-1]["grad_norm"] > 0.5, "plain local steps end elsewhere"
    assert own["DIANA, K = 5"][-1]["grad_norm"] < 0.6
    assert labels(drawn) == BOTH_AXES


def pictures(name: str, root: Path | None) -> Dataset:
    """Random images of 10 classes."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 10
    x = torch.randn(200, 3, 16, 16, generator=draw) + y[:, None, None, None] / 3
    return Dataset(name, Examples(x, y), Examples(x[:50], y[:50]), 10, cast)


def test_figure_4_without_a_gpu_is_reduced_and_says_so(script, drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vfl.data, "load", pictures)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script("fl_pytorch_fig4").main(tmp_path, rounds=2, seeds=2)
    (curves,) = numbers(tmp_path / "fig4.json").values()
    assert set(curves) == {f"Bernoulli {p}, τ = {batch}" for p in (0.1, 0.6) for batch in ("10%", "50%", "all")}
    few, all_of_them = (curves[f"Bernoulli 0.6, τ = {batch}"][-1] for batch in ("10%", "all"))
    assert few["gradients"] < all_of_them["gradients"]
    assert 0 <= few["test_accuracy"] <= 1 and few["clients"] == 25
    assert labels(drawn) == {
        ("round", "test accuracy"), ("round", "test loss"), ("bits from all clients", "")
    }  # fmt: skip
    assert "REDUCED" in drawn[0].get_suptitle()
    assert "REDUCED" in capsys.readouterr().out


def test_images_are_averaged(script):
    small = script("fl_pytorch_fig4").shrunk(pictures("", None), 8)
    x = pictures("", None).train.x
    assert small.train.x.shape == (200, 3, 8, 8)
    torch.testing.assert_close(small.train.x[7, 2, 0, 1], x[7, 2, :2, 2:4].mean())


def test_the_compressed_methods_are_set_side_by_side(script, drawn, tmp_path, capsys):
    script("compressed_methods").converge(tmp_path, rounds=30, seeds=1, methods=("EF21", "DCGD"))
    ((title, curves),) = numbers(tmp_path / "methods.json").items()
    assert "κ = 20" in title and list(curves) == ["EF21", "DCGD"]
    first, last = curves["EF21"][0], curves["EF21"][-1]
    assert (first["round"], last["round"]) == (2, 30)
    assert last["bits_up"] == 30 * 20 * 10 * (64 + 6), "top-10 of 50 entries, each a float64 and its position"
    assert last["grad_norm"] < first["grad_norm"] / 10
    assert min(row["grad_norm"] for row in curves["DCGD"]) > 10
    assert labels(drawn) == BOTH_AXES
    assert "–" in capsys.readouterr().out, "neither is there yet"


def test_a_line_holds_rounds_bits_and_the_rate(script):
    rows = [{"round": 10 * d, "bits_up": 1e3 * d, "grad_norm": 10.0**-d} for d in range(9)]
    line = script("compressed_methods").line
    assert line("x", 1.5, 20, rows) == ["x", "20", "1.5", "60", "6 kbit", "80", "10.0", "10.0", "1e-08"]
    assert line("x", 1.5, 20, rows[:6]) == ["x", "20", "1.5", "–", "–", "–", "10.0", "–", "1e-05"]


def test_the_steps_may_be_those_of_theory(script, tmp_path, capsys):
    module = script("compressed_methods")
    module.converge(tmp_path, "theory", rounds=2, seeds=1, methods=("MARINA",))
    problem = vfl.LinearProblem(vfl.data.federated("quadratic:dim=50,L=20,mu=1", clients=20, seed=0))
    gamma = Marina().step_size(problem.smoothness, problem.task(), 20)
    assert 20 * gamma < module.METHODS["MARINA"].step
    assert f"{20 * gamma:.3g}" in capsys.readouterr().out


def test_the_time_of_a_round_is_set_beside_fl_pytorchs(script, capsys):
    script("compressed_methods").round_time(clients=4, dim=20, rounds=2, execution="vmap")
    out = capsys.readouterr().out
    assert "a DIANA round, 4 clients, D = 20, rand_k:0.2, vmap" in out
    assert all(word in out for word in ("median", "least", "processors' own", "times as long"))


def test_what_is_reached_first_is_found(script):
    module = script("reproduction")
    rows = [{"round": 1, "f": 5.0}, {"round": 2}, {"round": 3, "f": 1.0}, {"round": 4, "f": 0.5}]
    assert module.first(rows, "f", 1.0)["round"] == 3
    assert module.first(rows, "f", 0.1) is None
    assert [module.bits(n) for n in (12, 12_300, 4_560_000, 7e9)] == ["12 bit", "12.3 kbit", "4.56 Mbit", "7 Gbit"]
