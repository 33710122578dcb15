"""benchmarks.layers measures what it says: the same gradients by a loop, by torch's vmap and by vfl."""

import json
import warnings

import pytest
import torch
import tyro
from torch import nn

from benchmarks import layers
from benchmarks.layers import Layer, SelfAttention, apart, ways
from benchmarks.report import render
from vfl.errors import UsageError

SMALL = {
    "embedding": Layer(lambda: nn.Embedding(7, 3), (5,), 7),
    "lstm": Layer(lambda: nn.LSTM(3, 4, 2, batch_first=True), (5, 3)),
    "attention": Layer(lambda: SelfAttention(8, 2), (5, 8)),
    "layer-norm": Layer(lambda: nn.LayerNorm(64), (64, 64)),  # large enough for the fused calls
    "group-norm": Layer(lambda: nn.GroupNorm(2, 8), (8, 32, 32)),
    "batch-norm": Layer(lambda: nn.BatchNorm2d(8), (8, 32, 32)),
}


@pytest.mark.parametrize("name", SMALL)
def test_all_ways_give_the_same_gradients(name):
    batch = 20 if name == "layer-norm" else 3
    calls = ways(SMALL[name], 2, batch, torch.float64)
    expected = calls["loop"]()
    assert len(expected) == len(list(SMALL[name].make().parameters())) + (name != "embedding")
    assert apart(calls["vfl"](), expected) <= 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's slow fallbacks
        assert apart(calls["torch"](), expected) <= 1e-12


def test_every_way_is_timed_and_the_report_has_the_table(tmp_path, capsys):
    path = tmp_path / "layers.json"
    options = ["--layers", "embedding-90", "--clients", "2", "--batch", "1", "--tries", "1", "--json", str(path)]
    tyro.cli(layers.main, args=options)
    (row,) = json.loads(path.read_text())["layers"]
    assert set(row["seconds"]) == {"loop", "torch", "vfl"} and min(row["seconds"].values()) > 0
    assert row["holds"] == (row["ratio"] <= layers.ALLOWED)
    assert "embedding-90" in capsys.readouterr().out
    assert "| embedding-90 | 2 |" in render([path])


def test_wrong_gradients_are_a_failure(monkeypatch):
    monkeypatch.setattr(layers, "apart", lambda found, expected: apart(tuple(1.01 * g for g in found), expected))
    with pytest.raises(SystemExit) as exit:
        layers.main(layers=("embedding-90",), clients=(2,), batch=1, tries=1)
    assert exit.value.code == 1


def test_an_unknown_layer_is_a_usage_error():
    with pytest.raises(UsageError, match=r"unknown layer 'layernorm'; did you mean 'layer-norm"):
        layers.main(layers=("layernorm",))
