"""Rounds: cohorts of any size, schedules of evaluation, early stops, plateaus, the best model, a pretrained start."""

import math
from typing import NamedTuple

import numpy as np
import papers
import pytest
import torch
from helpers import SIZES, N, assert_same, federated, mlp, norm_and_dropout, regression, round_keys, run, state_numbers
from papers import DATA, drawn
from torch.optim import lr_scheduler

import vfl
from algorithms.fedavg import FedAvg, FedAvgM
from algorithms.marina import Marina
from algorithms.scaffold import Scaffold
from vfl import checkpoint, judging, random, runs
from vfl.data.container import Examples
from vfl.delays import Delays
from vfl.plateau import Plateau
from vfl.pretrained import pretrained
from vfl.schedules import schedule
from vfl.simulate import play
from vfl.stopping import Standing, Stopping, agreed, criterion

SEED = 7
OPTIONS = {"clients_per_round": 5, "batch_size": 4, "seed": SEED, "chunk": 3, "execution": "vmap"}


def validated() -> vfl.data.FederatedData:
    """The small data with a validation set."""
    draw = np.random.default_rng(5)
    x, y = draw.standard_normal((9, DATA.x.shape[1])), draw.integers(3, size=9)
    return federated()._replace(validation=Examples(torch.from_numpy(x), torch.from_numpy(y)))


# Cohorts of a range of sizes


def cohorts(spec: str, amount: str, rounds: int = 1500) -> list[np.ndarray]:
    sampler = vfl.sampler(spec, amount, 2 * np.arange(11))
    return [sampler.draw(key).ids for key in random.split(random.key(0), rounds)]


@pytest.mark.parametrize("spec", ["uniform", "replacement", "weighted"])
def test_a_range_draws_every_size_as_often_and_every_client_too(spec):
    found = cohorts(spec, "2..5")
    sizes = np.bincount([len(ids) for ids in found], minlength=7)[2:6] / len(found)
    assert sum(sizes) == 1
    assert (np.abs(sizes - 0.25) < 4 * math.sqrt(0.1875 / len(found))).all()
    shares = np.bincount(np.concatenate(found), minlength=10) / sum(map(len, found))
    assert (np.abs(shares - 0.1) < 4 * math.sqrt(0.09 / sum(map(len, found)))).all()
    if spec == "uniform":
        assert all(len(set(ids.tolist())) == len(ids) for ids in found)


def test_a_range_may_be_of_shares_and_up_to_all():
    assert {len(ids) for ids in cohorts("uniform", "20%..0.4", 200)} == {2, 3, 4}
    assert {len(ids) for ids in cohorts("uniform", "9..all", 100)} == {9, 10}


@pytest.mark.parametrize(
    ("spec", "amount", "sentence"),
    [
        ("uniform", "5..2", "5..2 ends below its beginning"),
        ("uniform", "0..2", "must be at least 1, not 0"),
        ("uniform", "2..11", "is 11, above the population of 10"),
        ("uniform", "2..", "'' is not a count"),
        ("poisson", "2..5", "varies by itself, so give one number"),
        ("fixed:0,1", "2..5", "is the same in every round, so give one number"),
    ],
)
def test_a_range_without_meaning_is_refused(spec, amount, sentence):
    with pytest.raises(vfl.UsageError) as error:
        vfl.sampler(spec, amount, 2 * np.arange(11))
    assert sentence in str(error.value)


def test_an_algorithm_with_client_state_takes_cohorts_of_a_range():
    options = OPTIONS | {"clients_per_round": "2..6"}
    found = run(Scaffold(), mlp(), federated(), 6, **options)
    assert len(set(found["metric.clients"])) > 2
    assert_same(run(Scaffold(), mlp(), federated(), 6, **options | {"execution": "loop"}), found, 1e-9)
    with pytest.raises(vfl.UsageError, match="replicas need cohorts of one size"):
        vfl.simulate(FedAvg(), mlp(), federated([3, 3]), 1, clients_per_round="1..2", replicas=2)


# Schedules


def test_ramp_rises_keeps_falls_and_keeps():
    t = torch.arange(14, dtype=torch.float64)
    found = schedule("ramp:2,3,4,final=0.0016")(t)
    wanted = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.2, 0.04, 0.008, 0.0016, 0.0016, 0.0016, 0.0016, 0.0016]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose(schedule("ramp:0,0,10,0.5")(t[:11]), 0.5 ** (np.arange(11) / 10), rtol=1e-12)


@pytest.mark.parametrize("spec", ["ramp:1,2,0", "ramp:-1,2,3", "ramp:1,-2,3", "ramp:1,2,3,0", "ramp:1,2,3,2"])
def test_a_ramp_without_meaning_is_refused(spec):
    with pytest.raises(vfl.UsageError, match="ramp: "):
        schedule(spec)


@pytest.mark.parametrize(("when", "test", "validation"), [
    (vfl.Evaluation(2, validation_every=3), [2, 4, 6, 7], [3, 6, 7]),
    (vfl.Evaluation(0, validation_every=3), [], [3, 6, 7]),
    (vfl.Evaluation(3, validation_every=0), [3, 6, 7], []),
    (vfl.Evaluation(3), [3, 6, 7], [3, 6, 7]),
])  # fmt: skip
def test_validation_and_test_have_schedules_of_their_own(when, test, validation):
    _, history = vfl.simulate(FedAvg(), regression(), validated(), 7, evaluation=when, **OPTIONS)
    assert [m["round"] for m in history if "test_loss" in m] == test
    assert [m["round"] for m in history if "validation_loss" in m] == validation


# Early stops and the best model


def rows(**values):
    """Rounds with these metrics; None: not measured."""
    length = len(next(iter(values.values())))
    each = [{k: v[t] for k, v in values.items() if v[t] is not None} for t in range(length)]
    return [{"round": t, **row} for t, row in enumerate(each, 1)]


def stopped(stopping, history):
    """After how many rounds, and why."""
    standing = stopping.standing()
    for row in history:
        standing = stopping.after(standing, row)
        if reason := stopping.reason(standing):
            return row["round"], reason
    return None


@pytest.mark.parametrize(
    ("options", "history", "wanted"),
    [
        ({"stop_at": "test_accuracy=0.9"}, rows(test_accuracy=[0.5, 0.89, 0.9, 0.2]), 3),
        ({"stop_at": "test_loss=0.3"}, rows(test_loss=[0.5, None, 0.2, 0.2]), 3),
        ({"stop_at": "late:max=4"}, rows(late=[5.0, 1.0]), 1),
        ({"stop_at": "test_loss=0.3"}, rows(test_loss=[0.5, math.nan, 0.31]), None),
        ({"patience": 2}, rows(validation_loss=[3, 2, 2, None, 2.5, 1]), 5),
        ({"patience": 2}, rows(validation_loss=[3, 2, 2.5, 1.9, 2.5, 1.8]), None),
        ({"patience": 2, "best_by": "test_accuracy"}, rows(test_accuracy=[0.1, 0.2, 0.2, 0.1]), 4),
        ({"patience": 2}, rows(validation_loss=[None, math.nan, math.nan, 1.0]), 3),
        ({"patience": 3, "best_by": "late:min"}, rows(late=[1, 2, 3, 4, 0]), 4),
        ({}, rows(test_loss=[1, 2, 3]), None),
    ],
)
def test_a_run_stops_where_it_should(options, history, wanted):
    found = stopped(Stopping(**options), history)
    assert (found and found[0]) == wanted
    if found:
        assert "\n" not in found[1]


def test_the_standing_is_that_of_the_whole_history_wherever_it_was_cut():
    history = rows(validation_loss=[3, 2, 2.5, None, 1.5, 1.6], test_accuracy=[0.1, 0.2, 0.6, 0.7, 0.4, 0.8])
    stopping = Stopping(patience=5, stop_at="test_accuracy=0.65")
    whole = stopping.standing(history)
    assert whole == (1.5, 5, 1, 4)
    for cut in range(7):
        standing = stopping.standing(history[:cut])
        for row in history[cut:]:
            standing = stopping.after(standing, row)
        assert standing == whole


@pytest.mark.parametrize("standing", [Standing(), Standing(-0.25, 7, 3, None), Standing(0.0, 2, 0, 9)])
def test_the_standing_is_the_first_ranks(standing):
    class Others(NamedTuple):
        first: bool

        def all_reduce(self, flat):
            return flat + torch.tensor([standing[0] is not None, standing[0] or 0, *standing[1:3], standing[3] or 0])

    assert agreed(standing, vfl.Ranks(), torch.device("cpu")) == standing
    assert agreed(Standing(1.0, 1, 1, 1), Others(False), torch.device("cpu")) == standing


def test_an_early_stop_ends_the_run_and_a_resumed_one_does_not_go_on():
    options = OPTIONS | {"evaluation": vfl.Evaluation(1)}
    _, history = vfl.simulate(FedAvg(), regression(), federated(), 12, **options)
    accuracies = [m["test_accuracy"] for m in history]
    assert max(accuracies) > accuracies[0]
    first = next(t for t, a in enumerate(accuracies, 1) if a >= max(accuracies))
    assert 1 < first < 12
    stopping = Stopping(stop_at=f"test_accuracy={max(accuracies)}")
    state, short = vfl.simulate(FedAvg(), regression(), federated(), 12, stopping=stopping, **options)
    assert [m["test_accuracy"] for m in short] == accuracies[:first] and state.round == first
    task = regression()
    engine = vfl.Engine(FedAvg().build(task, N), task, federated(), clients_per_round=5)
    assert list(play(engine, state, 12, stopping=stopping, standing=stopping.standing(short))) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"stop_at": "test_accuracy"}, "is not like test_accuracy=0.9"),
        ({"stop_at": "test_accuracy=high"}, "is not like test_accuracy=0.9"),
        ({"stop_at": "late=3"}, "say whether lower or higher is better, as late:min or late:max"),
        ({"best_by": "late:up"}, "after the colon comes min or max, not 'up'"),
        ({"best_by": "seconds:min"}, "'seconds' cannot judge a model"),
        ({"best_by": "memory"}, "'memory' cannot judge a model"),
        ({"best_by": ""}, "'nothing' cannot judge a model"),
    ],
)
def test_a_stop_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        Stopping(**options)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_directions_are_known_where_they_can_be():
    assert criterion("test_accuracy") == ("test_accuracy", False)
    assert criterion("validation_loss") == ("validation_loss", True)
    assert criterion("grad_norm") == ("grad_norm", True)
    assert criterion("validation_loss:max") == ("validation_loss", False)
    assert criterion("client_test_accuracy_mean") == ("client_test_accuracy_mean", False)
    assert criterion("personal_train_loss_worst") == ("personal_train_loss_worst", True)
    for name in ("test_perplexity", "client_test_loss_std", "train_accuracy_std", "bits_up"):
        with pytest.raises(vfl.UsageError, match="say whether lower or higher is better"):
            criterion(name)


@pytest.mark.parametrize(
    ("judge", "when"),
    [
        (Stopping(patience=2), {}),  # there is no validation set
        (Stopping(best_by="test_accuracy"), {"every": 0}),
        (Stopping(stop_at="test_f1:max=1"), {}),
        (Stopping(best_by="client_test_loss_mean"), {"clients_every": 1}),  # nothing was held out
        (Stopping(best_by="grad_norm"), {}),
        (Plateau(plateau_patience=1, fall_back=True), {"validation_every": 1}),
    ],
)
def test_a_judge_that_is_never_measured_is_refused_before_the_first_round(judge, when):
    judge = {"stopping" if isinstance(judge, Stopping) else "plateau": judge}
    with pytest.raises(vfl.UsageError, match=r"is never measured: what is evaluated is (\w+_|nothing)"):
        vfl.simulate(FedAvg(), regression(), federated(), 1, evaluation=vfl.Evaluation(**when), **judge, **OPTIONS)


def test_what_is_evaluated_may_judge_and_what_no_round_brings_is_warned_of_once(caplog):
    when = vfl.Evaluation(2, clients_every=2, metrics=("grad_norm",))
    for name in ("test_accuracy", "client_train_loss_mean", "grad_norm", "client_bits_up:min", "train_loss"):
        stopping = Stopping(best_by=name)
        _, history = vfl.simulate(FedAvg(), regression(), federated(), 2, evaluation=when, stopping=stopping, **OPTIONS)
        scheduled = judging.scheduled(history[-1], when)
        assert stopping.after(Standing(), scheduled).round == 2 and not caplog.records
    vfl.simulate(FedAvg(), regression(), federated(), 2, stopping=Stopping(stop_at="acuracy:max=1"), **OPTIONS)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "round 1 has no metric 'acuracy', by which this run is judged"
    ]


# Plateaus


def steered(plateau: Plateau, losses: list[float | None], config=None) -> list[float]:
    """The step size after rounds with these validation losses, whatever the model does."""
    task = regression()
    algorithm = plateau.configure(config or FedAvg(local_lr=1.0)).build(task, N)
    state, found = vfl.Engine(algorithm, task, federated(), clients_per_round=5).init(0), []
    for row in rows(validation_loss=losses):
        state, metrics = plateau.after(state, row)
        found.append(metrics[plateau.plateau_rate])
    return found


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_the_step_size_falls_as_torchs_reduce_on_plateau(patience):
    losses = np.random.default_rng(3).uniform(size=60).round(2).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience - 1, threshold=0, eps=0)
    wanted = []
    for loss in losses:
        theirs.step(loss)
        wanted.append(theirs.get_last_lr()[0])
    assert wanted[-1] < 0.1
    np.testing.assert_allclose(
        steered(Plateau(plateau_patience=patience, plateau_factor=0.5), losses), wanted, rtol=1e-12
    )


def test_rounds_without_a_measurement_do_not_count():
    assert steered(Plateau(plateau_patience=2), [1.0, None, 2.0, None, None]) == [1.0] * 5
    assert steered(Plateau(plateau_patience=2), [1.0, None, 2.0, None, 2.0]) == pytest.approx([1, 1, 1, 1, 0.1])


def loss_of(x: np.ndarray, data) -> float:
    inputs, labels = data.validation.x.numpy(), data.validation.y.numpy()
    W, b = x[:15].reshape(3, 5), x[15:]
    z = inputs @ W.T + b
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]))


@pytest.mark.parametrize("fall_back", [False, True])
@pytest.mark.parametrize("rate", ["local_lr", "server_lr"])
def test_a_plateau_equals_plain_python(rate, fall_back):
    """FedAvg whose step size is halved, and whose model returns to its best, as in a loop by hand."""
    data, x = validated(), regression().x.numpy()
    step, best, kept, since, steps = {"local_lr": 1.5, "server_lr": 1.0}, math.inf, x, 0, []
    for t in range(10):
        ids = vfl.sampler("uniform", 5, DATA.offsets).draw(round_keys(SEED, t)[0]).ids.tolist()
        total, weight = np.zeros_like(x), 0
        for i, batches in drawn(SEED, t, ids, vfl.Work(4, 1)).items():
            if batches:
                total = total + SIZES[i] * (papers.local_model(x, batches, step["local_lr"], lambda g, y: g) - x)
                weight += SIZES[i]
        x = x + step["server_lr"] * total / weight
        loss = loss_of(x, data)
        best, kept, since = (loss, x, 0) if loss < best else (best, kept, since + 1)
        if since >= 2:
            step[rate] *= 0.5
            x, since = (kept if fall_back else x), 0
        steps.append(step[rate])
    assert len(set(steps)) > 2, "the step size should fall more than once"
    plateau = Plateau(plateau_patience=2, plateau_factor=0.5, plateau_rate=rate, fall_back=fall_back)
    state, history = vfl.simulate(FedAvg(local_lr=1.5), regression(), data, 10, plateau=plateau, **OPTIONS)
    np.testing.assert_allclose([m[rate] for m in history], steps, rtol=1e-12)
    np.testing.assert_allclose(state.server.x, x, rtol=1e-9, atol=1e-9)


def test_a_plateau_and_its_best_model_survive_a_kill(tmp_path):
    """Inside of delays, with buffers and a server's memory."""
    plateau = Plateau(plateau_patience=1, fall_back=True, plateau_factor=0.5, plateau_metric="test_loss")
    late, task, data = Delays(delay_probability=0.4, delay="uniform:2"), norm_and_dropout(), federated()

    def engine() -> vfl.Engine:
        algorithm = late.wrap(plateau.configure(FedAvgM(local_lr=1.0)).build(task, N), task, N)
        return vfl.Engine(algorithm, task, data, clients_per_round=5, chunk=3, execution="vmap")

    whole = engine()
    played = list(play(whole, whole.init(SEED), 8, plateau=plateau))
    wanted, rates = state_numbers(played[-1][0]), [m["local_lr"] for _, m in played]
    assert len(set(rates)) > 2
    first = engine()
    half = list(play(first, first.init(SEED), 4, plateau=plateau))[-1][0]
    checkpoint.save(tmp_path, half, {}, keep=1)
    second = engine()
    loaded = checkpoint.load(checkpoint.of_round(tmp_path, 4), second.init(99), {})
    rest = list(play(second, loaded, 8, plateau=plateau))
    assert_same(state_numbers(rest[-1][0]), wanted, 0)
    assert [m["local_lr"] for _, m in rest] == rates[4:]


def test_a_measurement_that_is_made_because_the_run_ends_judges_nothing():
    """So a run that is interrupted between two evaluations goes on as an uninterrupted one."""
    plateau = Plateau(plateau_patience=1, fall_back=True, plateau_metric="test_loss")
    options = OPTIONS | {"plateau": plateau, "evaluation": vfl.Evaluation(2), "task": regression(), "data": federated()}
    whole, wanted = vfl.simulate(FedAvg(local_lr=4.0), rounds=9, **options)
    assert len({m["local_lr"] for m in wanted}) > 1
    half, first = vfl.simulate(FedAvg(local_lr=4.0), rounds=3, **options)
    assert "test_loss" in first[-1], "the round 3 is measured, as the last one"
    ended, rest = vfl.simulate(FedAvg(local_lr=4.0), rounds=9, state=half, **options)
    assert [m["local_lr"] for m in first + rest] == [m["local_lr"] for m in wanted]
    assert_same(state_numbers(ended), state_numbers(whole), 0)


def test_a_plateau_that_never_comes_changes_nothing():
    config = FedAvg()
    assert Plateau().configure(config) is config
    plain = run(config, mlp(), federated(), 4, **OPTIONS)
    patient = run(
        config, mlp(), federated(), 4, plateau=Plateau(plateau_patience=99, plateau_metric="train_loss"), **OPTIONS
    )
    np.testing.assert_array_equal(patient["server.inner.inner.x"], plain["server.x"])


def test_an_algorithm_that_asks_everyone_still_does_so_with_a_plateau():
    plateau = Plateau(plateau_patience=99, plateau_metric="train_loss")
    options = OPTIONS | {"execution": "vmap", "batch_size": None, "local_steps": 1}
    plain = run(Marina(compressor="rand_k:0.5"), mlp(), federated(), 5, **options)
    found = run(Marina(compressor="rand_k:0.5"), mlp(), federated(), 5, plateau=plateau, **options)
    np.testing.assert_array_equal(found["metric.clients"], plain["metric.clients"])
    np.testing.assert_allclose(found["server.inner.inner.x"], plain["server.x"], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"plateau_patience": -1}, "plateau-patience must be at least 0, not -1"),
        ({"plateau_factor": 1.0}, "plateau-factor must be above 0 and below 1, not 1.0"),
        ({"plateau_rate": "rate"}, "unknown plateau-rate 'rate'"),
        ({"plateau_metric": "late"}, "say whether lower or higher is better"),
        ({"fall_back": True}, "give plateau-patience, 1 at least"),
    ],
)
def test_a_plateau_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        Plateau(**options)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_plateau_is_for_one_run_of_an_algorithms_options():
    plateau = Plateau(plateau_patience=1, plateau_metric="train_loss")
    with pytest.raises(vfl.UsageError, match="give these, not an Algorithm"):
        plateau.configure(FedAvg().build(mlp(), N))
    with pytest.raises(vfl.UsageError, match="step size of one run"):
        data = federated([3, 3])
        vfl.simulate(FedAvg(), mlp(), data, 1, clients_per_round=2, replicas=2, plateau=plateau, execution="vmap")


# A pretrained start


def saved(task: vfl.Task, path, x=None, **extra):
    tensors = task.state_dict(task.x + 1 if x is None else x, tuple(b + 2 for b in task.buffers))
    runs.write_tensors(path, tensors | extra, {})
    return tensors


@pytest.mark.parametrize("make", [mlp, norm_and_dropout])
def test_a_pretrained_start_is_the_model_of_the_file(make, tmp_path):
    task, path = make(), tmp_path / "model.safetensors"
    saved(task, path)
    started = pretrained(task, path)
    torch.testing.assert_close(started.x, task.x + 1, rtol=0, atol=0)
    assert all(torch.equal(a, b + 2) for a, b in zip(started.buffers, task.buffers, strict=True))
    state = vfl.Engine(FedAvg().build(started, N), started, federated(), clients_per_round=5).init(0)
    assert torch.equal(state.server.x, task.x + 1)
    assert started.x.dtype == torch.float64


def test_another_models_file_is_refused(tmp_path):
    task, path = mlp(), tmp_path / "model.safetensors"
    with pytest.raises(vfl.UsageError, match="is no safetensors file that can be read"):
        pretrained(task, path)
    path.write_bytes(b"no tensors")
    with pytest.raises(vfl.UsageError, match="is no safetensors file that can be read"):
        pretrained(task, path)
    saved(regression(), path)
    with pytest.raises(vfl.UsageError, match=r"has no '0\.bias': it is another model's"):
        pretrained(task, path)
    tensors = saved(task, path, head=torch.zeros(2))
    with pytest.raises(vfl.UsageError, match="has 'head', which the model has not"):
        pretrained(task, path)
    runs.write_tensors(path, tensors | {"0.bias": torch.zeros(9)}, {})
    with pytest.raises(vfl.UsageError, match=r"0\.bias is \[9\] there and \[4\] in the model"):
        pretrained(task, path)
