"""Late updates and FedBuff's buffer, against a simulation that keeps a list of events in plain Python."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, get_args

import cli_runs
import numpy as np
import papers
import pytest
import torch
from cli_runs import SMALL, assert_same_run, here
from helpers import (
    ALGORITHMS,
    ROOT,
    SIZES,
    N,
    Numbers,
    assert_same,
    federated,
    mlp,
    norm_and_dropout,
    regression,
    round_keys,
    run,
    state_numbers,
)
from papers import DATA, client_key, drawn

import vfl
from algorithms.fedavg import FedAvg, FedAvgM
from algorithms.mime import Mime
from algorithms.scaffold import Scaffold
from vfl import checkpoint, delays, programs, random
from vfl.base import Model, Personal
from vfl.delays import DELAYS, Delays, Staleness
from vfl.devices import Devices
from vfl.fedbuff import buffered
from vfl.privacy import Privacy
from vfl.spec import resolve

__all__ = ["here"]

ROUNDS, SEED = 14, 7
WORK = vfl.Work(4, 1)
OFF = vfl.Evaluation(0)


class Plan(NamedTuple):
    """A run with late clients."""

    delays: Delays
    options: dict


PLANS = {
    "half-late": Plan(Delays(delay_probability=0.5, delay="uniform:3"), {"clients_per_round": 5}),
    "sqrt": Plan(Delays(delay_probability=0.7, delay="geometric:0.4,4", staleness="sqrt"), {"clients_per_round": 5}),
    "all-late": Plan(Delays(delay_probability=1, delay="fixed:2", staleness="inverse"), {"clients_per_round": 4}),
    "weight": Plan(
        Delays(delay_probability=0.5, delay="uniform:2", staleness="inverse", staleness_scales="weight"),
        {"clients_per_round": 5},
    ),
    "empty-rounds": Plan(
        Delays(delay_probability=0.6, delay="uniform:4", staleness="sqrt"),
        {"sampling": "poisson", "clients_per_round": 1},
    ),
    "buffer": Plan(Delays(buffer_size=12), {"clients_per_round": 5}),
    "fedbuff": Plan(
        Delays(delay_probability=0.5, delay="uniform:4", staleness="sqrt", buffer_size=7), {"clients_per_round": 5}
    ),
    "fedbuff-weight": Plan(
        Delays(delay_probability=0.7, delay="fixed:4", staleness="inverse", staleness_scales="weight", buffer_size=6),
        {"clients_per_round": 5},
    ),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


class Event(NamedTuple):
    """An update on its way."""

    round: int  # in which it arrives
    tau: int  # rounds that it is late
    version: int  # steps of the server before it was sent its model
    weight: float
    change: np.ndarray  # [D]


def lateness(chosen: Delays, t: int, i: int) -> int:
    """τ of client i in round t, by its key."""
    key = random.fold_in(client_key(SEED, t, i), 2)  # the algorithm's
    if not bool(random.bernoulli(random.fold_in(key, delays._LATE), chosen.delay_probability, ())):
        return 0
    nothing = vfl.Metrics(*torch.zeros(3))
    return int(chosen.distribution().draw(random.fold_in(key, delays._TAU), nothing))


def simulated(plan: Plan, config: FedAvg) -> Numbers:
    """FedAvg by events: nothing but lists of who arrives when.

    With a buffer, staleness is FedBuff's (2106.06639, section 3): the server's version when it uses an update, less the
    one that the client started from.
    """
    chosen, x = plan.delays, regression().x.numpy()
    s = {"none": lambda tau: 1, "sqrt": lambda tau: (1 + tau) ** -0.5, "inverse": lambda tau: 1 / (1 + tau)}
    sampler = vfl.sampler(plan.options.get("sampling", "uniform"), plan.options["clients_per_round"], DATA.offsets)
    events: list[Event] = []
    buffer: list[Event] = []
    version, ages = 0, set()
    found: dict[str, list] = {"late": [], "arrived": [], "pending": [], "buffered": []}
    for t in range(ROUNDS):
        late = 0
        for i, batches in drawn(SEED, t, sampler.draw(round_keys(SEED, t)[0]).ids.tolist(), WORK).items():
            if batches:
                y = papers.local_model(x, batches, config.local_lr, lambda g, y: g)
                tau = lateness(chosen, t, i)
                late += tau > 0
                events.append(Event(t + tau, tau, version, SIZES[i], y - x))
        now = [event for event in events if event.round == t]
        buffer += now
        if buffer and len(buffer) >= chosen.buffer_size:
            stale = [version - e.version if chosen.buffer_size > 1 else e.tau for e in buffer]
            ages |= {(e.tau, age) for e, age in zip(buffer, stale, strict=True)}
            factors = [s[chosen.staleness](age) for age in stale]
            scaled = factors if chosen.staleness_scales == "weight" else [1] * len(buffer)
            update = sum(e.weight * f * e.change for e, f in zip(buffer, factors, strict=True))
            x = x + update / sum(e.weight * f for e, f in zip(buffer, scaled, strict=True))
            buffer, version = [], version + 1
        found["late"].append(late)
        found["arrived"].append(len(now))
        found["pending"].append(sum(event.round > t for event in events))
        found["buffered"].append(len(buffer))
    if chosen.buffer_size > 1 and chosen.delay_probability:
        assert {0, 1, 2} <= {age for _, age in ages} and any(age < tau for tau, age in ages), ages
    return {"x": x} | {name: np.array(values) for name, values in found.items()}


def play(plan: Plan, config=None, task=None, rounds: int = ROUNDS, **options) -> Numbers:
    task = regression() if task is None else task
    algorithm = plan.delays.wrap((config or FedAvg()).build(task, N), task, N)
    options = {"batch_size": 4, "seed": SEED, "evaluation": OFF, "chunk": 3} | plan.options | options
    return run(algorithm, task, federated(), rounds, **options)


@every_plan
def test_delays_and_buffer_equal_a_simulation_by_events(plan):
    found, wanted = play(plan), simulated(plan, FedAvg())
    assert np.abs(wanted["x"] - regression().x.numpy()).max() > 0.1, "the model has hardly moved"
    assert_same({"x": found["server.inner.x" if "server.inner.x" in found else "server.inner.inner.x"]},
                {"x": wanted["x"]}, 1e-12)  # fmt: skip
    if plan.delays.delay_probability:
        late = np.nan_to_num(found["metric.late"])  # no client: no report
        assert late.sum() > 0
        np.testing.assert_array_equal(late, wanted["late"])
        for name in ("arrived", "pending"):
            np.testing.assert_array_equal(found[f"metric.{name}"], wanted[name])
    if plan.delays.buffer_size > 1:
        assert 0 < (wanted["buffered"] == 0).sum() < ROUNDS, "some rounds should step, others not"
        np.testing.assert_array_equal(found["metric.buffered"], wanted["buffered"])


def test_the_plans_hold_what_they_are_meant_to():
    empty, late = simulated(PLANS["empty-rounds"], FedAvg()), simulated(PLANS["all-late"], FedAvg())
    cohorts = [vfl.sampler("poisson", 1, DATA.offsets).draw(round_keys(SEED, t)[0]).ids for t in range(ROUNDS)]
    nobody = np.array([sum(SIZES[i] for i in ids) == 0 for ids in cohorts])
    assert (nobody & (empty["arrived"] > 0)).any(), "something should arrive in a round without clients"
    assert late["arrived"][:3].tolist() == [0, 0, late["late"][0]]
    assert all(simulated(plan, FedAvg())["pending"][-1] > 0 for plan in PLANS.values() if plan.delays.delay_probability)


@pytest.mark.parametrize("algorithm", [Delays(), Delays(delay="geometric:0.5,9", staleness="sqrt")])
def test_without_late_clients_there_is_no_wrapper_at_all(algorithm):
    plain = FedAvg().build(mlp(), N)
    assert algorithm.wrap(plain, mlp(), N) is plain


@pytest.mark.parametrize("config", [FedAvgM(), Scaffold()])
def test_clients_that_are_never_late_give_the_plain_run(config):
    """p = 1e-300 goes through the wrapper: sums of one place, with nobody in the others."""
    task = norm_and_dropout()
    options = {"clients_per_round": 6, "batch_size": 4, "seed": 3, "chunk": 3}
    plain = run(config, task, federated(), 4, **options)
    nobody = delays.delayed(config.build(task, N), 1e-300, resolve("uniform:2", DELAYS, "delay"))
    found = run(nobody, task, federated(), 4, **options)
    assert not found["server.payload"].any() if "server.payload" in found else not found["server.payload.y"].any()
    for name, value in plain.items():
        same = found[name.replace("server.", "server.inner.")]
        np.testing.assert_allclose(same, value, rtol=1e-12, atol=1e-12, err_msg=name)


SCAFFOLD = Plan(Delays(delay_probability=0.5, delay="uniform:3"), {"clients_per_round": 5})
WHOLE = Plan(Delays(delay_probability=0.5, delay="uniform:3", buffer_size=9), {"clients_per_round": 5})


def test_nothing_is_lost_and_nothing_applied_twice():
    """SCAFFOLD's server holds Σ Δcᵢ / N of what has arrived, the ring the rest, the clients all of it."""
    for rounds in (1, 5, 9):
        found = play(SCAFFOLD, Scaffold(), rounds=rounds)
        waiting = found["server.payload.c"].sum((0, 1))
        assert np.abs(waiting).max() > 1e-3
        np.testing.assert_allclose(N * found["server.inner.c"] + waiting, found["client.0"].sum(0), atol=1e-12)
        assert found["server.clients"].sum() == found["metric.pending"][-1]
        assert found["metric.arrived"].sum() + found["metric.pending"][-1] > 0


@pytest.mark.parametrize(("config", "plan"), [(FedAvg(), PLANS["fedbuff"]), (Scaffold(), WHOLE)])
def test_delays_are_the_same_in_chunks_of_any_size_and_one_by_one(config, plan):
    plan = plan._replace(options={"clients_per_round": 6})
    wanted = play(plan, config, norm_and_dropout(), 4, execution="loop")
    for chunk in (2, 100):
        assert_same(play(plan, config, norm_and_dropout(), 4, chunk=chunk), wanted, 1e-9)


def test_delays_are_the_same_in_a_traced_program(monkeypatch):
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
    plan = SCAFFOLD._replace(options={"clients_per_round": "all", "batch_size": None})
    wanted = play(plan, Scaffold(), rounds=3, chunk=100)
    assert_same(play(plan, Scaffold(), rounds=3, chunk=100, execution="compile"), wanted, 1e-9)


@pytest.mark.parametrize(("config", "plan"), [(FedAvgM(), PLANS["fedbuff"]), (Scaffold(), WHOLE)])
def test_pending_updates_survive_a_kill(config, plan, tmp_path):
    """Rounds after the checkpoint are lost with the process; a fresh one goes on from the file to the same numbers."""
    chosen, task = plan.delays, norm_and_dropout()

    def engine() -> vfl.Engine:
        algorithm = chosen.wrap(config.build(task, N), task, N)
        return vfl.Engine(algorithm, task, federated(), clients_per_round=5, chunk=3, execution="vmap")

    def play(engine, state, rounds):
        history = []
        for _ in range(rounds):
            state, metrics = engine.play(state)
            history.append(metrics)
        return state, history

    whole = engine()
    wanted, history = play(whole, whole.init(SEED), 9)
    first = engine()
    state, _ = play(first, first.init(SEED), 4)
    waiting = state.server.clients.sum() + state.server.inner.clients
    checkpoint.save(tmp_path, state, {}, keep=1)
    play(first, state, 2)  # killed here
    second = engine()
    loaded = checkpoint.load(checkpoint.of_round(tmp_path, 4), second.init(99), {})
    assert loaded.server.clients.sum() + loaded.server.inner.clients == waiting > 0
    ended, rest = play(second, loaded, 5)
    assert_same(state_numbers(ended), state_numbers(wanted), 0)
    for name in ("arrived", "pending", "late", "buffered"):
        assert [m[name] for m in rest] == [m[name] for m in history[4:]]


LATE = """
import os, signal
import vfl
from algorithms.scaffold import Scaffold

class Late(Scaffold):
    def build(self, task, population):
        delays = vfl.Delays(delay_probability=0.5, delay="uniform:3")
        algorithm = delays.wrap(super().build(task, population), task, population)

        def broadcast(server, key):
            if "KILL" in os.environ and int(server.inner.t) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return algorithm.broadcast(server, key)

        return algorithm._replace(broadcast=broadcast)
"""


def test_a_killed_process_leaves_a_run_that_goes_on_to_the_same_end(here):
    Path("late.py").write_text(LATE)
    arguments = ("late:Late", *SMALL, "--rounds", "9", "--checkpoint-every", "2", "--quiet")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "KILL": "yes"}
    killed = subprocess.run([sys.executable, "-m", "vfl", "run", *arguments, "--out", "killed"], env=environment)
    assert killed.returncode == -signal.SIGKILL
    before = cli_runs.metrics(Path("killed"))
    assert 4 < len(before) < 9 and cli_runs.newest(Path("killed")).stem == "round-00000004"
    assert cli_runs.vfl("--resume", "--out", "killed", "--quiet") == 0
    assert cli_runs.vfl(*arguments, "--out", "whole") == 0
    assert_same_run(Path("killed"), Path("whole"))
    rows = cli_runs.metrics(Path("whole"))
    assert sum(row["arrived"] for row in rows) + rows[-1]["pending"] == 6 * 9, "every update arrives once or is pending"


def test_replicas_equal_their_runs_alone():
    chosen, task = PLANS["fedbuff"].delays, mlp()
    algorithm = Devices(client_dropout=0.6).wrap(FedAvg().build(task, N), task, N)
    algorithm = chosen.wrap(algorithm, task, N)
    data = federated([7, 4, 12, 3, 5, 1, 9, 4])
    options = {"clients_per_round": 2, "batch_size": 4, "chunk": 2, "evaluation": OFF, "execution": "vmap"}
    together, history = vfl.simulate(algorithm, task, data, 8, replicas=3, seed=5, **options)
    assert any(r["arrived"] == 0 for m in history for r in m["replicas"]), "a replica should have a round without any"
    assert any(m["replicas"][0]["arrived"] != m["replicas"][1]["arrived"] for m in history)
    for r in range(3):
        alone, single = vfl.simulate(algorithm, task, data, 8, seed=5 + r, **options)
        assert_same(state_numbers(together.replica(r)), state_numbers(alone), 1e-12)
        for name in ("arrived", "pending", "unanswered"):
            assert [m["replicas"][r][name] for m in history] == [m[name] for m in single]


def test_a_grid_of_step_sizes_takes_delays():
    class Late(FedAvg):
        def build(self, task, population):
            return SCAFFOLD.delays.wrap(super().build(task, population), task, population)

    data = federated([7, 4, 12, 3, 5, 1, 9, 4])
    options = {"clients_per_round": 3, "batch_size": 4, "chunk": 3, "evaluation": OFF, "execution": "vmap"}
    grid = vfl.Replication(1, {"local_lr": (0.05, 0.2)})
    together, _ = vfl.simulate(Late(), mlp(), data, 5, replicas=grid, **options)
    for r, lr in enumerate((0.05, 0.2)):
        alone, _ = vfl.simulate(Late(local_lr=lr), mlp(), data, 5, **options)
        np.testing.assert_allclose(together.server.x[r], alone.server.x, rtol=1e-12, atol=1e-12)


# Laws


def law(spec: str, count: int = 20000) -> np.ndarray:
    """How often τ = 0, 1, … came."""
    delay = resolve(spec, DELAYS, "delay")
    keys = random.split(random.key(1), count)
    tau = torch.func.vmap(lambda key: delay.draw(key, vfl.Metrics(*torch.zeros(3))))(keys)
    assert tau.dtype == torch.int64
    return np.bincount(tau.numpy(), minlength=delay.longest + 1) / count


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("fixed:3", [0, 0, 0, 1]),
        ("uniform:4", [0, 0.25, 0.25, 0.25, 0.25]),
        ("geometric:0.5,3", [0, 4 / 7, 2 / 7, 1 / 7]),
        ("geometric:0.2,2", [0, 1 / 1.8, 0.8 / 1.8]),
    ],
)
def test_delays_follow_their_law(spec, wanted):
    p = np.array(wanted)
    assert (np.abs(law(spec) - p) <= 4 * np.sqrt(p * (1 - p) / 20000)).all()


@pytest.mark.parametrize(
    ("staleness", "wanted"), [("none", [1, 1, 1]), ("sqrt", [1, 2**-0.5, 0.5]), ("inverse", [1, 0.5, 0.25])]
)
def test_the_discounts_are_those_of_the_papers(staleness: Staleness, wanted):
    found = delays.discount(staleness, torch.tensor([0, 1, 3]))
    np.testing.assert_allclose(found, wanted, rtol=1e-15)


def test_a_client_is_late_with_the_given_probability():
    chosen, task = Delays(delay_probability=0.3, delay="uniform:2"), regression()
    algorithm = chosen.wrap(FedAvg().build(task, 200), task, 200)
    options = {"clients_per_round": "all", "batch_size": None, "chunk": 200, "execution": "vmap"}
    _, history = vfl.simulate(algorithm, task, federated([1] * 200), 2, **options)
    assert abs(sum(m["late"] for m in history) / 400 - 0.3) < 4 * math.sqrt(0.21 / 400)


# Refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"delay_probability": 1.5}, "delay-probability must be from 0 to 1, not 1.5"),
        ({"delay_probability": math.nan}, "delay-probability must be from 0 to 1, not nan"),
        ({"delay": "uniform:0"}, "delay: rounds must be from 1 to 1000, not 0"),
        ({"delay": "gaussian:2"}, "unknown delay 'gaussian'"),
        ({"delay": "geometric:1,5"}, "p is a probability above 0 and below 1, not 1.0"),
        ({"delay": "speed:60"}, "delay-probability must be 1, not 0.0"),
        ({"delay": "speed:0", "delay_probability": 1}, "deadline is a number of seconds above 0, not 0.0"),
        ({"staleness": "exp"}, "unknown staleness 'exp'"),
        ({"buffer_size": 0}, "buffer-size must be at least 1, not 0"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        Delays(**options)
    assert sentence in str(error.value) and "\n" not in str(error.value)


FEDDF = next(name for name in ALGORITHMS if name.startswith("feddf"))
NEVER = ("marina", "vrmarina", "ppmarina", "mime-base=sgd", "scaffnew-p=0.5", "gradskip-p=0.5-q=0.5")


@pytest.mark.parametrize("chosen", [Delays(delay_probability=0.5), Delays(buffer_size=9)])
@pytest.mark.parametrize("name", [*NEVER, "privacy"])
def test_messages_that_count_in_their_own_round_alone_cannot_be_late(chosen, name):
    wrappers = [Privacy(clip=1.0), chosen] if name == "privacy" else [chosen]
    config = FedAvg() if name == "privacy" else ALGORITHMS[name]
    with pytest.raises(vfl.UsageError, match="count in their own round alone"):
        vfl.simulate(config, mlp(), federated(), 1, wrappers=wrappers, clients_per_round=5)


@pytest.mark.parametrize("name", ["scaffold-option=1", "diana", "ef21", "cofig", "frecon", "feddyn", FEDDF])
def test_updates_that_a_server_needs_whole_are_not_discounted(name):
    late = {"delay_probability": 0.5, "delay": "uniform:2"}
    algorithm = ALGORITHMS[name].build(mlp(), N)
    Delays(**late, buffer_size=9).wrap(algorithm, mlp(), N)
    for scales in get_args(delays.Scales):
        with pytest.raises(vfl.UsageError, match="staleness must be none, not sqrt"):
            Delays(**late, staleness="sqrt", staleness_scales=scales).wrap(algorithm, mlp(), N)


def test_privacy_around_delays_is_refused():
    wrappers = [SCAFFOLD.delays, Privacy(clip=1.0)]
    with pytest.raises(vfl.ClientError, match="privacy is that of one mean"):
        vfl.simulate(FedAvg(), mlp(), federated(), 1, wrappers=wrappers, clients_per_round=5)


def test_a_clients_usage_error_is_one_sentence_on_the_command_line(here, capsys):
    speed = ("--delay-probability", 1, "--delay", "speed:3")
    assert cli_runs.vfl("fedavg", *SMALL, "--rounds", 1, *speed) == 2
    said = "vfl: delay speed reads the clients' simulated times: choose device-speeds, equal at least\n"
    assert capsys.readouterr().err == said


def test_algorithms_that_ask_everyone_run_without_delays():
    unaware = ALGORITHMS["ppmarina"].build(mlp(), N)._replace(late="discounted")
    with pytest.raises(vfl.UsageError, match="asks all clients in some rounds"):
        SCAFFOLD.delays.wrap(unaware, mlp(), N)


def test_aggregators_that_need_every_message_run_without_delays():
    with pytest.raises(vfl.UsageError, match="this aggregator needs each of them"):
        SCAFFOLD.delays.wrap(FedAvg(aggregator="median").build(mlp(), N), mlp(), N)


def test_clients_own_models_are_those_of_the_algorithm_inside():
    """Evaluated where the server's state is a wrapper's, or two wrappers'."""
    task = mlp()
    options = {"clients_per_round": 5, "batch_size": 4, "seed": SEED, "chunk": 3, "execution": "vmap"}
    when = vfl.Evaluation(1, clients_every=1)
    personal = Personal(lambda server, client, batches: Model(server.x + server.t, batches.buffers))
    plain = FedAvg().build(task, N)._replace(personal=personal)
    _, wanted = vfl.simulate(plain, task, federated(), 1, evaluation=when, **options)
    never = delays.delayed(buffered(plain, 1), 1e-300, resolve("uniform:2", DELAYS, "delay"))
    _, found = vfl.simulate(never, task, federated(), 1, evaluation=when, **options)
    names = {name for name in wanted[0] if name.startswith("personal_")}
    assert names
    for name in names:
        assert found[0][name] == pytest.approx(wanted[0][name], rel=1e-12)


@pytest.mark.parametrize(("chosen", "how"), [(SCAFFOLD.delays, "delays"), (Delays(buffer_size=8), "a buffer")])
def test_algorithms_that_ask_for_different_things_run_without_delays(chosen, how):
    algorithm = chosen.wrap(Mime().build(mlp(), N)._replace(late="discounted"), mlp(), N)
    with pytest.raises(vfl.UsageError, match=f"alternates from round to round.* runs without {how}"):
        vfl.simulate(algorithm, mlp(), federated(), 4, clients_per_round="all", execution="vmap")


def test_data_without_any_example_leaves_everything_as_it_was():
    task = mlp()
    algorithm = SCAFFOLD.delays.wrap(FedAvg().build(task, 2), task, 2)
    state, _ = vfl.simulate(algorithm, task, federated([0, 0]), 2, clients_per_round=1, evaluation=OFF)
    assert torch.equal(state.server.x, task.x)
