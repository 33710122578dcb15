"""benchmarks.convolution measures every way to compute a layer, and counts its operations."""

import json

import pytest
import torch
import tyro

from benchmarks import convolution, report
from benchmarks.convolution import LAYERS, flops, ways
from vfl.errors import UsageError


def test_every_way_is_timed_and_written_down(tmp_path, capsys):
    path = tmp_path / "convolution.json"
    options = ["--layers", "lenet-2", "--clients", "2", "--batch", "1", "--tries", "1", "--json", str(path)]
    try:
        tyro.cli(convolution.main, args=options)
    except SystemExit as exit:  # how fast it was is the clock's to say
        assert exit.code == 1
    (row,) = json.loads(path.read_text())["layers"]
    assert all(row[way] > 0 for way in ("loop", "torch", "each", "grouped", "unfold", "auto"))
    assert row["holds"] == (row["ratio"] <= convolution.ALLOWED)
    assert "lenet-2" in capsys.readouterr().out
    assert "| lenet-2 | 2 |" in report.render([path])


@pytest.mark.parametrize("name", ["lenet-1", "lenet-2"])
def test_all_ways_give_the_same_gradients(name):
    calls = ways(LAYERS[name], 2, 1)
    assert calls.pop("loop")() is None
    expected, *others = (call() for call in calls.values())
    assert len(expected) == (2 if LAYERS[name].first else 3)
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_operations_are_those_of_the_outputs_and_their_derivatives():
    once = 2 * 20 * 64 * 14 * 14 * 32 * 25  # a multiplication and an addition for each output and each of its inputs
    assert flops(LAYERS["cnn-2"], 20) == 3 * once
    assert flops(LAYERS["lenet-2"], 1) == 3 * 2 * 16 * 10 * 10 * 6 * 25
    assert flops(LAYERS["cnn-1"], 1) == 2 * 2 * 32 * 28 * 28 * 25  # nobody asks for the gradient of the images


def test_an_unknown_layer_is_a_usage_error():
    with pytest.raises(UsageError, match=r"unknown layer 'cnn-3'; did you mean 'cnn-"):
        convolution.main(layers=("cnn-3",))
