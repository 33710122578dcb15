"""Synthetic(α, β) of the FedProx paper: its distributions, and the authors' own file beside it."""

import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vfl.data import load
from vfl.data.partition import generator
from vfl.errors import UsageError

Array = np.ndarray


def clients(spec: str = "fedprox_synthetic", count: int = 30, seed: int = 0) -> tuple[list[Array], list[Array]]:
    """Each client's training inputs and labels."""
    data = load(spec, clients=count, seed=seed)
    assert data.offsets is not None
    cuts = data.offsets[1:-1]
    return np.split(data.train.x.double().numpy(), cuts), np.split(data.train.y.numpy(), cuts)


def noise(x: list[Array]) -> Array:
    """Each feature's variance within the clients, in units of the theoretical j^−1.2 [features]."""
    squares = sum(np.square(a - a.mean(0)).sum(0) for a in x)
    freedom = sum(len(a) - 1 for a in x)
    return squares / freedom * np.arange(1, x[0].shape[1] + 1) ** 1.2


def test_the_draws_are_the_papers_formulas_client_by_client() -> None:
    alpha, beta, N, D, C = 0.5, 2.0, 3, 4, 5
    data = load(f"fedprox_synthetic:alpha={alpha},beta={beta},features={D},classes={C}", clients=N, seed=7)
    draw = generator(7, "fedprox_synthetic")
    sizes = [50 + int(np.exp(4 + 2 * z)) for z in draw.standard_normal(N)]
    draw.standard_normal(D * C + C)  # the shared model, for `iid`
    train, test = [], []
    for n in sizes:
        u, B = draw.normal(0, np.sqrt(alpha)), draw.normal(0, np.sqrt(beta))
        W, b = draw.normal(u, 1, (D, C)), draw.normal(u, 1, C)
        v = draw.normal(B, 1, D)
        rows = [v + np.diag(np.arange(1, D + 1) ** -0.6) @ z for z in draw.standard_normal((n, D))]
        pairs = [(x, int(np.argmax(x @ W + b))) for x in rows]
        train += pairs[: int(0.9 * n)]
        test += pairs[int(0.9 * n) :]
    assert data.test is not None
    for split, wanted in ((data.train, train), (data.test, test)):
        np.testing.assert_allclose(split.x, [x for x, _ in wanted], rtol=1e-6, atol=1e-6)
        assert split.y.tolist() == [y for _, y in wanted]
    assert np.diff(data.offsets).tolist() == [int(0.9 * n) for n in sizes]
    assert (data.classes, data.model) == (C, "softmax")


def test_a_clients_inputs_scatter_by_j_to_the_minus_six_tenths_around_their_centre() -> None:
    x, _ = clients(count=20)
    n = sum(map(len, x))
    assert np.abs(noise(x) - 1).max() < 5 * np.sqrt(2 / n)


@pytest.mark.parametrize("beta", [0, 1, 9])
def test_beta_is_the_variance_of_the_clients_centres(beta: float) -> None:
    N, D = 300, 30
    x, _ = clients(f"fedprox_synthetic:beta={beta},features={D}", N)
    centres = np.stack([a.mean(0) for a in x])  # v_k, up to noise of variance below 1/45
    within = np.square(centres - centres.mean(1, keepdims=True)).sum() / (N * (D - 1))
    assert within == pytest.approx(1, abs=0.05)
    between = np.var(centres.mean(1), ddof=1)  # β + 1/D, and a relative error of √(2/N) = 8 %
    assert between == pytest.approx(beta + 1 / D, rel=0.3)


def test_sizes_are_at_least_45_of_50_and_log_normal_above() -> None:
    x, _ = clients("fedprox_synthetic:features=1", 2000)
    sizes = np.array([len(a) for a in x])
    assert sizes.min() >= 45
    assert np.median(sizes / 0.9 - 50) == pytest.approx(np.exp(4), rel=0.15)


def test_models_differ_between_clients_unless_iid() -> None:
    def spread(spec: str) -> float:
        """How much the clients' label shares differ, in total variation."""
        x, y = clients(spec, 40)
        big = [np.bincount(b, minlength=10) / len(b) for a, b in zip(x, y, strict=True) if len(b) > 200]
        return float(np.mean([np.abs(share - np.mean(big, axis=0)).sum() / 2 for share in big]))

    assert spread("fedprox_synthetic:iid=true") < 0.15 < 0.5 < spread("fedprox_synthetic:alpha=0,beta=0")
    x, _ = clients("fedprox_synthetic:iid=true")
    n = sum(map(len, x))
    assert np.abs(np.concatenate(x).mean(0)).max() < 5 / np.sqrt(n)


def test_alpha_changes_no_label_as_it_raises_all_classes_alike() -> None:
    a, b = (load(f"fedprox_synthetic:alpha={alpha}", clients=5) for alpha in (0, 1))
    assert torch.equal(a.train.x, b.train.x) and torch.equal(a.train.y, b.train.y)


def test_the_seed_decides() -> None:
    a, b, c = (load("fedprox_synthetic", clients=3, seed=seed).train for seed in (1, 1, 2))
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert a.x.shape != c.x.shape or not torch.equal(a.x, c.x)
    assert load("fedprox_synthetic").offsets.size == 31


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [("alpha=-1", "alpha must be a finite number ≥ 0, not -1.0"), ("beta=nan", "beta must be"),
     ("classes=1", "classes must be at least 2"), ("features=0", "features must be at least 1")],
)  # fmt: skip
def test_parameters_without_meaning_are_refused(spec: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"fedprox_synthetic: {sentence}"):
        load(f"fedprox_synthetic:{spec}")


@pytest.mark.skipif("VFL_DATA" not in os.environ, reason="VFL_DATA does not name a folder of data sets")
def test_the_authors_synthetic_1_1_has_the_same_scatter_and_centres() -> None:
    path = Path(os.environ["VFL_DATA"]) / "synthetic" / "fedprox_synthetic_1_1_mytest.json.xz"
    users = json.loads(lzma.decompress(path.read_bytes()))["user_data"].values()
    theirs, ours = [np.array(user["x"]) for user in users], clients()[0]
    assert theirs[0].shape[1] == ours[0].shape[1] == 60 and len(theirs) == len(ours) == 30
    for x in (theirs, ours):
        assert np.abs(noise(x) - 1).max() < 5 * np.sqrt(2 / sum(map(len, x)))
        centres = np.stack([a.mean(0) for a in x])
        within = np.square(centres - centres.mean(1, keepdims=True)).sum() / (30 * 59)
        assert within == pytest.approx(1, abs=0.2)
        assert 0.4 < np.var(centres.mean(1), ddof=1) < 2  # β = 1, of 30 draws
