"""`vfl run --replicas` and `--grid`: several runs in one."""

import numpy as np
import pytest
from cli_runs import SMALL, here, metrics, tensors, vfl

from vfl.plots import series
from vfl.replicas import by_setting

__all__ = ["here"]


def test_each_replica_is_the_run_of_its_seed_on_the_same_data(here):
    assert vfl("fedavg", *SMALL, "--rounds", 3, "--seed", 4, "--replicas", 2, "--out", "both") == 0
    both = metrics(here / "both")
    for r in range(2):
        alone = ("--seed", 4 + r, "--data-seed", 4, "--out", f"one{r}")
        assert vfl("fedavg", *SMALL, "--rounds", 3, *alone) == 0
        for row, wanted in zip(both, metrics(here / f"one{r}"), strict=True):
            for name in ("train_loss", "test_loss", "test_accuracy", "bits_up"):
                np.testing.assert_allclose(row["replicas"][r][name], wanted[name], rtol=1e-9, err_msg=name)
        model = tensors(here / "both" / "model.safetensors")
        for name, tensor in tensors(here / f"one{r}" / "model.safetensors").items():
            np.testing.assert_allclose(model[name][r], tensor, rtol=1e-9, atol=1e-12)


def test_replicas_resume_to_the_same_numbers(here):
    options = (*SMALL, "--replicas", 2, "--grid", "server-lr=0.5,1", "--checkpoint-every", 1)
    assert vfl("scaffold", *options, "--rounds", 4, "--out", "whole") == 0
    assert vfl("scaffold", *options, "--rounds", 2, "--out", "parts") == 0
    assert vfl("scaffold", "--resume", "--rounds", 4, "--out", "parts") == 0
    for name, tensor in tensors(here / "whole" / "model.safetensors").items():
        assert (tensor == tensors(here / "parts" / "model.safetensors")[name]).all()


def test_a_grid_draws_a_curve_for_each_step_size(here, monkeypatch):
    drawn = {}
    monkeypatch.setattr("vfl.plots.learning_curves", lambda histories, path: drawn.update(histories) or path)
    assert vfl("fedavg", *SMALL, "--rounds", 2, "--grid", "server-lr=0.5,1", "--replicas", 3, "--out", "r") == 0
    assert list(drawn) == ["server_lr=0.5", "server_lr=1"]
    rows = metrics(here / "r")
    losses = [r["train_loss"] for r in rows[1]["replicas"] if r["server_lr"] == 1]
    assert len(losses) == 3
    assert series(drawn["server_lr=1"], "train_loss")[1][1] == pytest.approx(np.mean(losses))
    assert drawn["server_lr=1"][1]["train_loss_std"] == pytest.approx(np.std(losses, ddof=1))


def test_a_number_that_one_replica_does_not_have_is_missing_in_the_mean():
    rows = [{"round": 1, "replicas": [{"replica": 0, "lr": 1.0, "a": None}, {"replica": 1, "lr": 1.0, "a": 2.0}]}]
    assert np.isnan(by_setting(rows, ["lr"])["lr=1"][0]["a"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--replicas", "0"), "replicas must be at least 1, not 0"),
        (("--grid", "mu=1"), "a grid varies local-lr or server-lr, not mu"),
        (("--replicas", "2", "--sampling", "poisson"), "replicas need cohorts of one size"),
        (("--data-seed", "-1"), "--data-seed must be a whole number from 0"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(given, says, here, capsys):
    assert vfl("fedavg", *SMALL, "--rounds", 1, *given) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(here.iterdir())
