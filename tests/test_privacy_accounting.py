"""ε by round: the library's own numbers, the noise solved for a target, and who may be accounted for how."""

import builtins
import logging
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from helpers import N, assert_same, federated, mlp, norm_and_dropout, run

import vfl
from algorithms.fedavg import FedAvg
from algorithms.marina import PPMarina
from algorithms.mime import Mime
from algorithms.scaffnew import Scaffnew
from vfl.privacy import (
    Adaptive,
    Context,
    Plan,
    Privacy,
    epsilon,
    epsilons,
    locally_private,
    make_plan,
    private,
    solve_noise_multiplier,
    tree,
)
from vfl.privacy.accounting import INTERVAL
from vfl.privacy.central import Clipped

DELTA = 1e-5


def by_the_library(accountant, event) -> float:
    return accountant.compose(event).get_epsilon(DELTA)


def poisson_event(q: float, z: float, T: int) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(z)
    return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(q, gaussian), T)


@pytest.mark.parametrize(("q", "z", "T"), [(0.01, 1.0, 1000), (0.1, 1.2, 100), (0.02, 0.8, 50)])
def test_epsilon_of_poisson_sampling_is_the_librarys(q, z, T):
    rdp, pld = (
        dp_accounting.rdp.RdpAccountant(),
        dp_accounting.pld.PLDAccountant(value_discretization_interval=INTERVAL),
    )
    plan = make_plan("poisson", q, 1000, DELTA, "rdp")
    assert epsilon(plan, z, T) == pytest.approx(by_the_library(rdp, poisson_event(q, z, T)), rel=1e-12)
    assert epsilon(plan._replace(accountant="pld"), z, T) == pytest.approx(
        by_the_library(pld, poisson_event(q, z, T)), rel=1e-12
    )
    assert epsilon(plan._replace(accountant="pld"), z, T) < epsilon(plan, z, T)


def test_the_coarser_grid_costs_less_than_a_thousandth_of_epsilon_and_never_flatters():
    exact = by_the_library(dp_accounting.pld.PLDAccountant(), poisson_event(0.1, 1.2, 100))
    ours = epsilon(make_plan("poisson", 0.1, 1000, DELTA, "pld"), 1.2, 100)
    assert exact <= ours <= exact * 1.001


def test_epsilon_of_cohorts_of_one_size_is_the_librarys_for_a_replaced_client():
    """The sum then changes by up to twice the norm, so the event's noise multiplier is half of ours."""
    gaussian = dp_accounting.GaussianDpEvent(4.0 / 2)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.SampledWithoutReplacementDpEvent(1000, 20, gaussian), 50)
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    plan = make_plan("uniform", "2%", 1000, DELTA, "rdp")
    assert epsilon(plan, 4.0, 50) == pytest.approx(by_the_library(accountant, event), rel=1e-12)


@pytest.mark.parametrize(("sampling", "amount"), [("uniform", "all"), ("poisson", 1.0), ("fixed", 3), ("fixed:1,2", 5)])
def test_without_sampling_epsilon_is_that_of_the_gaussian_mechanism(sampling, amount):
    """T rounds with z are one with z / √T, whose ε is known exactly (Balle & Wang 1805.06530)."""
    plan = make_plan(sampling, amount, 10, DELTA, "pld")
    exact = dp_accounting.get_epsilon_gaussian(20 / math.sqrt(30), DELTA)
    assert epsilon(plan, 20, 30) == pytest.approx(exact, rel=1e-12)
    rdp = dp_accounting.rdp.RdpAccountant()
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(20), 30)
    assert epsilon(plan._replace(accountant="rdp"), 20, 30) == pytest.approx(by_the_library(rdp, event), rel=1e-12)


def test_little_noise_has_a_large_epsilon_at_little_cost():
    """Of as many points as more noise takes; the library's own grid would have a hundred times as many."""
    rdp, pld = (make_plan("poisson", 0.1, 1000, DELTA, accountant) for accountant in ("rdp", "pld"))
    assert 0.3 * epsilon(rdp, 0.1, 20) < epsilon(pld, 0.1, 20) < epsilon(rdp, 0.1, 20)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("q", "tree"), [(0.1, False), (1.0, False), (0.01, True)])
def test_epsilons_round_by_round_are_those_one_by_one(accountant, q, tree):
    plan, rounds = make_plan("poisson", q, 1000, DELTA, accountant, tree), [1, 2, 3, 17, 40]
    found = epsilons(plan, 3.0, rounds)
    np.testing.assert_allclose(found, [epsilon(plan, 3.0, t) for t in rounds], rtol=1e-6)
    assert found == sorted(found) and found[0] > 0


def test_epsilon_of_ftrl_is_the_librarys_tree_for_a_client_that_comes_once():
    relation = NeighboringRelation.REPLACE_SPECIAL
    once = Plan(1000, 1.0, DELTA, "rdp", tree=True)
    for T in (1, 2, 3, 4, 7, 8, 100):
        k = T  # everyone comes in every round
        event = dp_accounting.SingleEpochTreeAggregationDpEvent(500.0 / k, T)
        accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
        assert epsilon(once, 500.0, T) == pytest.approx(by_the_library(accountant, event), rel=1e-9)


def test_a_client_takes_part_in_more_rounds_than_ftrl_assumes_at_most_with_half_of_delta():
    from math import comb

    plan, T = Plan(1000, 0.05, 1e-3, tree=True), 60
    k, left = plan.participations(T)

    def more_than(k: int) -> float:
        return sum(comb(T, n) * 0.05**n * 0.95 ** (T - n) for n in range(k + 1, T + 1))

    assert left == 5e-4
    assert more_than(k) <= 5e-4 < more_than(k - 1)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_what_is_replaced_is_as_hard_to_tell_apart_as_half_the_noise_makes_it(accountant):
    """Two messages, or two examples' gradients, of norm up to C differ by up to 2C; T noisy ones are one with z/√T."""
    plan = Plan(1, 1.0, DELTA, accountant, replaced=True)
    whole = dp_accounting.get_epsilon_gaussian(9.0 / 2 / math.sqrt(20), DELTA)
    assert epsilon(plan, 9.0, 20) == pytest.approx(whole, rel=1e-12 if accountant == "pld" else 0.1)
    assert epsilon(plan, 9.0, 20) >= whole * (1 - 1e-12)
    assert 1.98 <= epsilon(plan, solve_noise_multiplier(plan, 2.0, 20), 20) <= 2


@pytest.mark.parametrize(
    "plan",
    [
        Plan(1000, 0.05, DELTA, "pld"),
        Plan(1000, 0.05, DELTA, "rdp"),
        Plan(1000, 1.0, DELTA, "pld"),
        Plan(10**6, 0.001, DELTA, "pld", tree=True),
    ],
    ids=["pld", "rdp", "everyone", "ftrl"],
)
def test_the_noise_solved_for_epsilon_2_gives_no_more_and_wastes_no_more_than_a_hundredth(plan):
    z = solve_noise_multiplier(plan, 2.0, 64)
    assert 1.98 <= epsilon(plan, z, 64) <= 2.0


@pytest.mark.parametrize(
    ("target", "rounds", "sentence"),
    [
        (0.0, 5, "target-epsilon must be a finite number > 0, not 0.0"),
        (math.inf, 5, "target-epsilon must be a finite number > 0, not inf"),
        (1e5, 1, "ε = 100000 over 1 rounds is no protection"),
        (1e-9, 5, "no noise gives ε ≤ 1e-09 over 5 rounds"),
    ],
)
def test_a_target_that_no_noise_meets_is_refused(target, rounds, sentence):
    with pytest.raises(vfl.UsageError) as error:
        solve_noise_multiplier(Plan(10, 1.0, 1e-12, "rdp"), target, rounds)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("sampling", "accountant", "delta", "sentence"),
    [
        ("uniform", "pld", 1e-5, "use --sampling poisson, or --accountant rdp"),
        ("weighted", "rdp", 1e-5, "no accountant knows --sampling weighted; use --sampling poisson"),
        ("replacement", "pld", 1e-5, "no accountant knows --sampling replacement; use --sampling poisson"),
        ("poisson", "prv", 1e-5, "unknown accountant 'prv'; known: pld, rdp"),
        ("poisson", "pld", 0.0, "delta must lie between 0 and 1, not 0.0"),
    ],
)
def test_a_sampler_that_the_accounting_does_not_assume_is_refused(sampling, accountant, delta, sentence):
    with pytest.raises(vfl.UsageError) as error:
        make_plan(sampling, 10, 100, delta, accountant)
    assert sentence in str(error.value)


def test_without_noise_epsilon_is_infinite():
    plan = make_plan("poisson", 0.1, 100, DELTA, "pld")
    assert epsilon(plan, 0, 5) == math.inf
    assert epsilons(plan, 0, [1, 2]) == [math.inf, math.inf]


def test_the_librarys_warnings_of_left_out_orders_are_not_the_users(caplog):
    """Small noise makes it leave out orders; its logger's level is its own again afterwards."""
    before = logging.getLogger("absl").level
    epsilon(make_plan("poisson", 0.1, 1000, DELTA, "rdp"), 0.5, 10)
    assert not caplog.records
    assert logging.getLogger("absl").level == before


# --- in a run ---


def test_options_become_the_wrappers_they_name():
    """Each in one step of the server, of a mean and a key alike."""
    task, context = mlp(), Context(N, 4, "poisson", 5)
    algorithm = FedAvg().build(task, N)
    adaptive = Adaptive(0.5, 4 / 20, 0.3)
    pairs = [
        ({}, private(algorithm, clip=0.2, noise_multiplier=0.1, cohort=4)),
        (
            {"adaptive_clip_quantile": 0.5, "adaptive_clip_lr": 0.3},
            private(algorithm, clip=0.2, noise_multiplier=0.1, cohort=4, adaptive=adaptive),
        ),
        ({"mechanism": "ftrl"}, private(algorithm, clip=0.2, noise_multiplier=0.1, cohort=4, noise=tree(3))),
        (
            {"mechanism": "ftrl", "tree_estimator": "binary"},
            private(algorithm, clip=0.2, noise_multiplier=0.1, cohort=4, noise=tree(3, "binary")),
        ),
        (
            {"mechanism": "local", "max_weight": 3.0, "min_weight": 1.0, "scale_messages": True},
            locally_private(algorithm, clip=0.2, noise_multiplier=0.1, weights=(1, 3), scale=True),
        ),
    ]
    how = {"clients_per_round": 4, "sampling": "poisson", "seed": 3}
    runs = []
    for options, wanted in pairs:
        wrapped = Privacy(clip=0.2, noise_multiplier=0.1, **options).wrap(algorithm, task, context)
        runs.append(run(wanted, task, federated(), 3, **how))
        assert_same(run(wrapped, task, federated(), 3, **how), runs[-1], 0)
    xs = [found.get("server.inner.x", found.get("server.x")) for found in runs]
    assert all((a != b).any() for i, a in enumerate(xs) for b in xs[:i]), "they differ"


@pytest.mark.parametrize("mechanism", ["central", "ftrl", "local"])
def test_a_run_reports_what_its_rounds_have_spent(mechanism):
    options = Privacy(clip=0.2, noise_multiplier=3.0, delta=1e-3, mechanism=mechanism, accountant="rdp")
    context, task = Context(N, 4, "poisson", 5), mlp()
    wrapped = options.wrap(FedAvg().build(task, N), task, context)
    how = {"clients_per_round": 4, "sampling": "poisson", "seed": 3}
    found = run(wrapped, task, federated(), 7, **how)["metric.epsilon"]
    rate, tree_of_noise = 1.0 if mechanism == "local" else 0.5, mechanism == "ftrl"
    plan = Plan(N, rate, 1e-3, "rdp", tree=tree_of_noise, replaced=mechanism == "local")
    wanted = epsilons(plan, 3.0, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(found[:5], wanted, rtol=1e-12)
    assert (found[5:] == math.inf).all(), "more rounds than were announced"


def test_a_long_runs_epsilons_are_never_below_the_librarys():
    options = Privacy(clip=1, noise_multiplier=3.0, delta=1e-3, accountant="rdp")
    context, task = Context(1000, 50, "poisson", 1000), mlp()
    wrapped = options.wrap(FedAvg().build(task, N), task, context)
    server, at = wrapped.init_server(task.x), [1, 2, 3, 99, 100, 101, 502, 998, 999, 1000]
    exact = dict(zip(at, epsilons(options.plan(context), 3.0, at), strict=True))
    for t in at:
        mean = vfl.Mean(Clipped(0 * task.x, ()), task.x.new_tensor(1.0), task.x.new_tensor(1.0))
        _, reported = wrapped.server_update(server._replace(t=server.t + t - 1), mean, vfl.random.key(0))
        assert exact[t] <= float(reported["epsilon"]) <= exact[t] * 1.05
    assert float(reported["epsilon"]) == exact[1000]


def test_a_target_is_met_by_the_last_round():
    options = Privacy(clip=0.2, target_epsilon=2.0, delta=1e-3, adaptive_clip_quantile=0.5, count_noise=50)
    task = mlp()
    wrapped = options.wrap(FedAvg().build(task, N), task, Context(N, 4, "poisson", 5))
    found = run(wrapped, task, federated(), 5, clients_per_round=4, sampling="poisson", seed=3)
    assert 1.98 <= found["metric.epsilon"][-1] <= 2.0


def test_a_local_message_epsilon_is_flutes_formula():
    options = Privacy(clip=1, mechanism="local", message_epsilon=0.5, delta=1e-5)
    plan = options.plan(Context(N, 4, "uniform", 5))
    z = options.multiplier(plan, 5)
    assert z == pytest.approx(math.sqrt(2 * math.log(1.25e5)) / 0.5, rel=1e-12)
    against_none = dp_accounting.get_epsilon_gaussian(z, 1e-5)
    assert against_none < 0.5, "the classical formula is on the safe side below 1"
    assert against_none < epsilon(plan, z, 1) < 2 * 0.5, "two messages may lie twice as far apart"


def test_without_delta_nothing_is_accounted_and_the_library_is_not_needed(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: _missing(real, name, *rest))
    task = mlp()
    algorithm = FedAvg().build(task, N)
    wrapped = Privacy(clip=0.2, noise_multiplier=1).wrap(algorithm, task, Context(N, 4, "uniform", 3))
    assert "metric.epsilon" not in run(wrapped, task, federated(), 1, clients_per_round=4)
    with pytest.raises(vfl.UsageError, match=r"needs dp-accounting; run `pip install vfl\[privacy\]`"):
        Privacy(clip=0.2, noise_multiplier=1, delta=0.1).wrap(algorithm, task, Context(N, 4, "poisson", 3))


def _missing(real, name, *rest):
    if name.partition(".")[0] == "dp_accounting":
        raise ImportError(name)
    return real(name, *rest)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip": 0}, "--clip must be a finite number > 0, not 0"),
        ({"clip": 1, "mechanism": "local", "message_epsilon": -1, "delta": 1e-5}, "--message-epsilon must be a finite"),
        ({"clip": 1, "noise_multiplier": -1}, "--noise-multiplier must be a finite number ≥ 0, not -1"),
        ({"clip": 1, "target_epsilon": math.nan, "delta": 1e-5}, "--target-epsilon must be a finite number > 0"),
        ({"clip": 1, "noise_multiplier": 1, "delta": 1}, "--delta must lie between 0 and 1, not 1"),
        ({"clip": 1, "mechanism": "centre"}, "unknown mechanism 'centre'; did you mean 'central'?"),
        ({"clip": 1, "accountant": "prv"}, "unknown accountant 'prv'"),
        ({"noise_multiplier": 1.0}, "--noise-multiplier needs --clip"),
        ({"mechanism": "ftrl"}, "--mechanism needs --clip"),
        ({"clip": 1, "target_epsilon": 2.0}, "--target-epsilon needs --delta"),
        ({"clip": 1, "target_epsilon": 2.0, "noise_multiplier": 1, "delta": 0.1}, "give one of them"),
        ({"clip": 1, "message_epsilon": 1.0, "delta": 0.1}, "--message-epsilon belongs to --mechanism local"),
        ({"clip": 1, "mechanism": "ftrl", "adaptive_clip_quantile": 0.5}, "belongs to --mechanism central, not ftrl"),
        ({"clip": 1, "count_noise": 2.0}, "give --adaptive-clip-quantile, too"),
        ({"clip": 1, "mechanism": "local", "max_weight": 1.0, "min_weight": 2.0}, "--min-weight 2 is above"),
        ({"example_noise": 1.0}, "--example-noise needs --example-clip"),
        ({"clip": 1, "adaptive_clip_lr": 0.5}, "--adaptive-clip-lr belongs to an adaptive norm; give --adaptive-clip"),
        ({"clip": 1, "mechanism": "local", "min_weight": 0.5}, "--min-weight needs --max-weight"),
        ({"clip": 1, "noise_multiplier": 1, "accountant": "rdp"}, "--accountant needs --delta"),
        ({"clip": 1, "delta": 0.1}, "--delta asks for ε, which is infinite without noise"),
        ({"clip": 1, "delta": 0.1, "noise_multiplier": 0}, "--delta asks for ε, which is infinite without noise"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(vfl.UsageError) as error:
        Privacy(**options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampling", ["replacement", "weighted"])
def test_a_sampler_that_may_draw_a_client_twice_is_refused(sampling):
    with pytest.raises(vfl.UsageError, match=f"--sampling {sampling} lets a client count more than once"):
        Privacy(clip=1).wrap(FedAvg().build(mlp(), N), mlp(), Context(N, 4, sampling, 3))


@pytest.mark.parametrize("late", [{"delay_probability": 0.5}, {"buffer_size": 4}], ids=str)
def test_messages_that_come_in_another_round_than_the_accounted_one_are_refused(late):
    """A client's late and fresh messages together would change a sum by more than the norm."""
    how = {"clients_per_round": 4, "sampling": "poisson", "execution": "vmap"}
    for mechanism in ("central", "ftrl"):
        wrappers = [Privacy(clip=1, noise_multiplier=1, mechanism=mechanism), vfl.Delays(**late)]
        with pytest.raises(vfl.UsageError, match=r"messages count in their own round alone.*without delays"):
            vfl.simulate(FedAvg(), mlp(), federated(), 1, wrappers=wrappers, **how)
    wrappers = [Privacy(clip=1, noise_multiplier=1, mechanism="local"), vfl.Delays(**late)]
    vfl.simulate(FedAvg(), mlp(), federated(), 2, wrappers=wrappers, **how)  # each message has noise of its own


def test_rounds_that_ask_for_different_things_are_refused():
    """An empty cohort's round would release something else than the round of the same number with clients."""
    with pytest.raises(vfl.UsageError, match="alternates from round to round"):
        vfl.simulate(Mime(), mlp(), federated(), 2, wrappers=[Privacy(clip=1)], clients_per_round=4, execution="vmap")


def test_numbers_beside_vectors_are_named_as_they_get_noise_too(caplog):
    how = {"clients_per_round": 4, "execution": "vmap"}
    vfl.simulate(Scaffnew(), mlp(), federated(), 1, wrappers=[Privacy(clip=1, mechanism="local")], **how)
    vfl.simulate(Scaffnew(), mlp(), federated(), 1, wrappers=[Privacy(clip=1)], **how)
    assert ["coin, new" in record.message for record in caplog.records] == [True, True]
    caplog.clear()
    vfl.simulate(FedAvg(), mlp(), federated(), 1, wrappers=[Privacy(clip=1)], **how)
    assert not caplog.records


def test_clipped_examples_without_the_task_that_clips_them_are_refused():
    options, how = Privacy(example_clip=1e-3), {"clients_per_round": 4, "execution": "vmap"}
    with pytest.raises(vfl.UsageError, match=r"the task that Privacy\.gradients returns"):
        vfl.simulate(FedAvg(), mlp(), federated(), 1, wrappers=[options], **how)
    task = options.gradients(mlp())
    assert (vfl.simulate(FedAvg(), task, federated(), 1, wrappers=[options], **how).x - task.x).norm() < 1e-2


def test_a_range_of_cohort_sizes_is_refused():
    with pytest.raises(vfl.UsageError, match=r"2\.\.5 is a range, and here it takes one number"):
        Privacy(clip=1).wrap(FedAvg().build(mlp(), N), mlp(), Context(N, "2..5", "uniform", 3))


def test_a_model_whose_buffers_would_go_round_without_noise_is_refused():
    task = norm_and_dropout()
    with pytest.raises(vfl.UsageError, match="cannot average the model's buffers"):
        Privacy(clip=1).wrap(FedAvg().build(task, N), task, Context(N, 4, "poisson", 3))
    with pytest.raises(vfl.UsageError, match="cannot average the model's buffers"):
        Privacy(example_clip=1).gradients(task)


def test_an_algorithm_that_sometimes_asks_everyone_is_refused_for_a_sample():
    algorithm = PPMarina().build(mlp(), N)
    with pytest.raises(vfl.UsageError, match="use --clients-per-round all"):
        Privacy(clip=1).wrap(algorithm, mlp(), Context(N, 4, "poisson", 3))
    everyone = Privacy(clip=1).wrap(algorithm, mlp(), Context(N, "all", "uniform", 3))
    assert everyone.everyone is not None and bool(everyone.everyone(everyone.init_server(mlp().x))) in (True, False)


def test_options_left_out_leave_algorithm_and_task_alone():
    task = mlp()
    algorithm = FedAvg().build(task, N)
    assert Privacy().wrap(algorithm, task, Context(N, 4, "weighted", 3)) is algorithm
    assert Privacy().gradients(task) is task
