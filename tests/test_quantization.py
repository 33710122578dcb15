"""FLUTE's quantization around an algorithm: the compressor's numbers, a threshold that anneals, exact bits."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import PARTIAL, assert_same, federated, make_task, mlp, numbers_of, run
from torch import nn
from torch.func import vmap

import vfl
from algorithms.fedavg import FedAvg, FedAvgM
from algorithms.scaffold import Scaffold
from vfl.compressors.base import Layout
from vfl.compressors.quantize import quantized
from vfl.quantization import Quantization

SIZES = [20, 7, 1]
D = sum(SIZES)
LAYOUT = Layout(tuple((size,) for size in SIZES), torch.float64)


def reference(v: np.ndarray, bits: int, threshold: float) -> tuple[np.ndarray, float]:
    """The values and the bits, from the definition."""
    found, entries = [], 0
    for part in np.split(v, np.cumsum(SIZES)[:-1]):
        levels = np.linspace(part.min(), part.max(), 2**bits)
        nearest = levels[np.abs(part[:, None] - levels).argmin(1)]
        kept = np.abs(part) >= np.quantile(np.abs(part), threshold)
        found.append(np.where(kept, nearest, 0))
        entries += kept.sum()
    return np.concatenate(found), 2 * 64 * len(SIZES) + entries * (bits + 5)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 0.95])
def test_a_threshold_in_a_tensor_is_the_same_map_with_the_same_bits(threshold: float) -> None:
    v = np.random.default_rng(0).standard_normal((6, D))
    for T in (threshold, torch.tensor(threshold, dtype=torch.float64)):

        def compress(row: torch.Tensor, T: Any = T) -> tuple[torch.Tensor, torch.Tensor]:
            value, code = quantized(row, 3, T, LAYOUT)
            return value, code.bits(row.device)

        values, bits = vmap(compress)(torch.from_numpy(v))
        for row, value, size in zip(v, values, bits.expand(6), strict=True):
            wanted, wanted_bits = reference(row, 3, threshold)
            np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-14)
            if isinstance(T, torch.Tensor) or threshold:
                assert size == wanted_bits
            else:  # no positions where nothing is left out
                assert size == 2 * 64 * len(SIZES) + 3 * D


def test_the_thresholds_of_several_replicas_differ() -> None:
    v = torch.from_numpy(np.random.default_rng(1).standard_normal(D))
    thresholds = torch.tensor([0.2, 0.8], dtype=torch.float64)
    values = vmap(lambda t: quantized(v, 4, t, LAYOUT)[0])(thresholds)
    for value, threshold in zip(values, thresholds.tolist(), strict=True):
        np.testing.assert_allclose(value, reference(v.numpy(), 4, threshold)[0], rtol=1e-12, atol=1e-14)


def test_layers_above_2_to_the_24_entries_have_their_quantile() -> None:
    size = 2**24 + 1000
    layout = Layout(((size,),), torch.float32)
    v = (torch.arange(size) % 1000 - 500).float()
    value, code = quantized(v, 8, 0.99, layout)
    kept = value != 0
    assert torch.equal(kept, v.abs() >= 495) and code.entries == kept.sum()  # of 1000 sizes 0, 1, 1, …, 499, 499, 500


@pytest.mark.parametrize("inner", [FedAvg(), FedAvgM()], ids=lambda inner: type(inner).__name__)
def test_without_annealing_the_wrapper_is_the_compressor(inner: Any) -> None:
    around = Quantization(quant_bits=4, quant_threshold=0.6)
    compressed = type(inner)(compressor="quantize:4,threshold=0.6")
    options = PARTIAL | {"chunk": 4}
    found = run(inner, mlp(), federated(), 3, wrappers=[around], **options)
    wanted = run(compressed, mlp(), federated(), 3, **options)
    assert found.pop("server.t") == 3
    found = {name.replace("server.inner.", "server."): value for name, value in found.items()}
    assert_same(found, wanted, 1e-12)
    plain = run(inner, mlp(), federated(), 3, **options)
    assert np.abs(found["server.x"] - plain["server.x"]).max() > 1e-3
    assert found["metric.bits_up"][-1] < plain["metric.bits_up"][-1]


def test_the_threshold_anneals_round_by_round() -> None:
    """One client on one example: its change is g, and the model the sum of quantized changes."""
    around = Quantization(quant_bits=6, quant_threshold=0.9, quant_anneal=0.5)
    task = make_task(nn.Linear(5, 3))
    options: dict[str, Any] = {"batch_size": None, "local_steps": 2, "sampling": "fixed:0", "chunk": 1}
    state, x, kept = None, task.x, []
    for t in range(4):
        raw, _ = vfl.simulate(FedAvg(), task._replace(x=x), federated(), 1, execution="vmap", **options)
        change = raw.server.x - x
        layout = Layout(task.shapes, torch.float64)
        wanted, code = quantized(change, 6, 0.9 * 0.5**t, layout)
        kept.append(int(code.entries))
        state, _ = vfl.simulate(FedAvg(), task, federated(), t + 1, wrappers=[around], execution="vmap", **options)
        torch.testing.assert_close(state.server.x, x + wanted, rtol=1e-12, atol=1e-12)
        x = state.server.x
    assert kept == sorted(set(kept))


def test_chunks_loops_and_a_resume_give_the_same_numbers() -> None:
    around = Quantization(quant_bits=4, quant_threshold=0.6, quant_anneal=0.8)
    given: dict[str, Any] = PARTIAL | {"wrappers": [around]}
    wanted = run(FedAvgM(), mlp(), federated(), 4, chunk=100, **given)
    assert_same(run(FedAvgM(), mlp(), federated(), 4, chunk=2, **given), wanted, 1e-12)
    assert_same(run(FedAvgM(), mlp(), federated(), 4, execution="loop", **given), wanted, 1e-12)
    state, first = vfl.simulate(FedAvgM(), mlp(), federated(), 2, execution="vmap", chunk=100, **given)
    state, rest = vfl.simulate(FedAvgM(), mlp(), federated(), 4, state=state, execution="vmap", chunk=100, **given)
    assert_same(numbers_of(state, [*first, *rest]), wanted, 1e-12)


def test_without_bits_it_is_the_algorithm_itself() -> None:
    algorithm = FedAvg().build(mlp(), 8)
    assert Quantization().wrap(algorithm, mlp(), 8) is algorithm


def test_clients_that_remember_what_they_sent_are_refused() -> None:
    with pytest.raises(vfl.UsageError, match=r"use compressor quantize:4,threshold=0.5 instead"):
        vfl.simulate(Scaffold(), mlp(), federated(), 1, wrappers=[Quantization(quant_bits=4, quant_threshold=0.5)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quant_bits": 0}, "takes from 1 to 16 bits"),
        ({"quant_bits": 8, "quant_threshold": 1.0}, "a quantile from 0 to below 1, not 1.0"),
        ({"quant_bits": 8, "quant_anneal": 0.0}, "quant-anneal is a factor above 0 and at most 1, not 0.0"),
        ({"quant_bits": 8, "quant_anneal": 1.5}, "quant-anneal is a factor above 0 and at most 1, not 1.5"),
        ({"quant_threshold": 0.5}, "give quant-bits"),
        ({"quant_anneal": 0.5}, "give quant-bits"),
        ({"quant_bits": 8, "quant_anneal": 0.5}, "quant-threshold, which is 0"),
    ],
)
def test_an_option_without_meaning_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(vfl.UsageError, match=sentence):
        Quantization(**options)
