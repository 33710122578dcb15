"""FedLabels beside its reference in papers_semi.py: the labels used, pseudo-labels, views, and what is refused."""

import math
import runpy

import numpy as np
import papers
import pytest
import torch
from helpers import (
    CLASSES,
    ROOT,
    SIZES,
    assert_same,
    federated,
    make_task,
    mlp,
    norm_and_dropout,
    packed,
    regression,
    round_keys,
    run,
)
from papers_semi import fedlabels, labelled_rows
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from algorithms.fedlabels import FedLabels
from vfl.data.container import as_stored

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "few_labels.py"))
ALL = {"clients_per_round": "all", "batch_size": 4, "execution": "vmap", "chunk": 100}
SHARE = 0.4
FEW = sum(math.ceil(SHARE * n) for n in SIZES)  # labelled examples of all clients


def model(config: vfl.LocalTraining, task: vfl.Task, data=None, rounds: int = 3, **options) -> torch.Tensor:
    return vfl.simulate(config, task, data or federated(), rounds, **ALL | options).x


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_other_options_equal_the_definition_in_numpy(weighting):
    config = FedLabels(labelled=0.3, threshold=0.6, consistency=0.0, burn_in=2, weighting=weighting, local_lr=0.2)

    def cohort(t: int) -> papers.Cohort:
        ids = vfl.sampler("uniform", 5, papers.DATA.offsets).draw(round_keys(7, t)[0]).ids.tolist()
        return papers.drawn(7, t, ids, vfl.Work(3, 2))

    task, rounds = regression(), 12
    options = {"clients_per_round": 5, "batch_size": 3, "local_epochs": 2, "seed": 7}
    found = run(config, task, federated(), rounds, evaluation=vfl.Evaluation(0), **options)
    wanted = fedlabels(config, cohort, task.x.numpy(), rounds)
    assert_same({"server.x": found["server.x"]}, {"server.x": wanted["server.x"]}, 1e-10)


def test_with_all_labels_it_is_fedavg():
    for task in (mlp(), norm_and_dropout()):
        found, wanted = (model(c, task) for c in (FedLabels(labelled=1.0), FedAvg(weighting="uniform")))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_its_burn_in_is_fedavg_on_the_labelled_part():
    data, whole = federated(), {"batch_size": None, "local_steps": 3}
    part = SCRIPT["labelled_part"](data, SHARE)
    assert part.clients.offsets[-1] == FEW
    found = model(FedLabels(labelled=SHARE, burn_in=3), mlp(), data, **whole)
    torch.testing.assert_close(found, model(FedAvg(weighting="uniform"), mlp(), part, **whole), rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, model(FedLabels(labelled=SHARE, burn_in=2, threshold=0.4), mlp(), data, **whole))


def test_the_labels_of_other_examples_are_not_used():
    data, config = federated(), FedLabels(labelled=SHARE, threshold=0.4)
    known = {row for i, n in enumerate(SIZES) if n for row in labelled_rows(i, SHARE)}
    hidden = [row for row in range(sum(SIZES)) if row not in known]
    wanted = model(config, mlp(), data)

    def changed(rows: list[int]) -> torch.Tensor:
        y = data.clients.y.clone()
        y[rows] = (y[rows] + 1) % CLASSES
        return model(config, mlp(), data._replace(clients=data.clients._replace(y=y)))

    assert torch.equal(changed(hidden), wanted)
    for row in sorted(known)[:3]:
        assert not torch.equal(changed([row]), wanted)


@pytest.mark.parametrize("share", [0.01, 0.4, 0.5, 1.0])
def test_the_labelled_share_of_each_client_is_rounded_up(share):
    history = vfl.simulate(FedLabels(labelled=share, burn_in=9), mlp(), federated(), 2, **ALL).history
    assert [m["gradients"] for m in history] == [k * sum(math.ceil(share * n) for n in SIZES) for k in (1, 2)]


def test_the_label_seed_chooses_and_the_runs_seed_does_not():
    whole = {"batch_size": None, "local_steps": 1}  # nothing else depends on the run's seed
    first, other, again = (
        model(FedLabels(labelled=SHARE, burn_in=9, label_seed=label_seed), mlp(), seed=seed, **whole)
        for label_seed, seed in ((0, 1), (1, 1), (0, 2))
    )
    torch.testing.assert_close(again, first, rtol=1e-12, atol=1e-12)
    assert (other - first).abs().max() > 1e-3


def test_pseudo_labels_are_counted_and_so_are_those_that_are_right():
    task, data = mlp(), federated()
    config = FedLabels(labelled=SHARE, threshold=0.0, local_lr=0.0)  # every one, by a model that stays as it is
    counted = vfl.simulate(config, task, data, 1, **ALL).history[0]
    known = {row for i, n in enumerate(SIZES) if n for row in labelled_rows(i, SHARE)}
    hidden = torch.tensor([row not in known for row in range(sum(SIZES))])
    batch = vfl.Batch(data.clients.x, data.clients.y, hidden, vfl.random.key(0))
    right = task.outputs(task.x, batch, ()).argmax(1) == data.clients.y
    assert counted["pseudo_labels"] == hidden.sum() == sum(SIZES) - FEW
    assert counted["pseudo_labels_right"] == (right & hidden).sum()
    assert 0 < counted["pseudo_labels_right"] < counted["pseudo_labels"]
    assert counted["gradients"] == FEW + 2 * (sum(SIZES) - FEW)


# Views


def images(size: int, key: int = 0) -> vfl.Batch:
    """Images [size, 2, 5, 4] without a zero."""
    x = torch.rand(size, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    return vfl.Batch(x, torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool), vfl.random.key(key))


def moves(x: torch.Tensor, most: int) -> list[torch.Tensor]:
    """An image [channels, H, W] shifted in each of the ways, by slices of a padded one."""
    _, H, W = x.shape
    padded = nn.functional.pad(x, (most, most, most, most))
    ways = range(2 * most + 1)
    return [padded[:, down : down + H, right : right + W] for down in ways for right in ways]


def test_an_image_is_shifted_in_every_way_and_mirrored_half_of_the_time():
    batch = images(2000)
    plain, view = FedLabels(shift=1, flip=True, noise=0.0).views(batch)
    assert torch.equal(plain.x, batch.x)
    ways = torch.stack([torch.stack(moves(x, 1) + [m.flip(-1) for m in moves(x, 1)]) for x in batch.x])
    same = (ways == view.x[:, None]).flatten(2).all(-1)  # [2000, 18]
    assert (same.sum(1) == 1).all()
    expected = 2000 / 18
    assert (same.sum(0) - expected).abs().max() < 5 * math.sqrt(expected)


def test_noise_has_its_scale_for_inputs_of_any_shape():
    for x in (images(500).x, images(500).x.flatten(1), images(500).x[:, 0]):
        batch = images(500)._replace(x=x)
        _, view = FedLabels(noise=0.3).views(batch)
        noise = view.x - x
        assert abs(noise.std() - 0.3) < 0.01
        assert noise.mean().abs() < 0.01


def test_a_view_depends_on_its_key_and_not_on_padding_or_vmap():
    config = FedLabels(shift=2, flip=True, noise=0.1)
    batch = images(3)
    _, short = config.views(batch)
    _, long = config.views(images(8)._replace(x=torch.cat([batch.x, images(5).x])))
    assert torch.equal(long.x[:3], short.x)
    keys = torch.stack([vfl.random.key(0), vfl.random.key(1)])
    mapped = torch.func.vmap(lambda key: config.views(batch._replace(key=key))[1].x)(keys)
    assert torch.equal(mapped[0], short.x)
    assert torch.equal(mapped[1], config.views(images(3, 1))[1].x)
    assert not torch.equal(mapped[0], mapped[1])


def test_images_train_under_vmap_as_in_a_loop():
    x = torch.rand(sum(SIZES), 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = packed(x, torch.arange(len(x)) % CLASSES, SIZES)
    task = make_task(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES)))
    config = FedLabels(labelled=SHARE, threshold=0.4, shift=1, flip=True)
    found, wanted = (run(config, task, data, 2, execution=e, clients_per_round=5) for e in ("vmap", "loop"))
    assert found["metric.pseudo_labels"].min() > 0
    assert_same(found, wanted, 1e-9)


# What it is for, and what it is not


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"labelled": 0.0}, "labelled must be a share above 0 and at most 1, not 0.0"),
        ({"labelled": 1.5}, "labelled must be a share above 0 and at most 1, not 1.5"),
        ({"threshold": 1.0}, "threshold must be a probability from 0 to below 1, not 1.0"),
        ({"consistency": -1.0}, "consistency must be a finite number ≥ 0, not -1.0"),
        ({"l2": math.inf}, "l2 must be a finite number ≥ 0, not inf"),
        ({"noise": math.nan}, "noise must be a finite number ≥ 0, not nan"),
        ({"burn_in": -1}, "burn-in must be at least 0, not -1"),
        ({"shift": -2}, "shift must be at least 0, not -2"),
        ({"aggregator": "median"}, "aggregator must be mean, not 'median'"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        FedLabels(**options)
    assert sentence in str(error.value)


def test_a_task_without_classes_is_refused():
    targets = federated().clients.y.to(torch.float64)
    data = federated()._replace(test=None)
    data = data._replace(clients=data.clients._replace(y=targets))
    with pytest.raises(vfl.ClientError, match=r"needs outputs \[B, classes\] .* not \[4, 1\] and \[4\]"):
        model(FedLabels(), make_task(nn.Linear(5, 1), vfl.squared_error), data)
    words = packed(torch.arange(10).reshape(5, 2), torch.arange(5) % CLASSES, [2, 3])._replace(transform=as_stored)
    reader = make_task(nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, CLASSES)))
    with pytest.raises(vfl.ClientError, match="they must be numbers, not tokens"):
        model(FedLabels(), reader, words)


def test_the_bits_are_those_of_both_models_and_a_count():
    metrics = vfl.simulate(FedLabels(), mlp(), federated(), 1, **ALL).history[0]
    D = len(mlp().x)
    assert metrics["bits_up"] == (len(SIZES) - 1) * (2 * D + 1) * 64
    assert metrics["bits_down"] == len(SIZES) * D * 64
    compressed = vfl.simulate(FedLabels(compressor="top_k:3"), mlp(), federated(), 1, **ALL).history[0]
    assert compressed["bits_up"] == (len(SIZES) - 1) * (2 * 3 * (64 + 6) + 64)  # 39 entries have positions of 6 bits
    assert np.isfinite(compressed["train_loss"])
