"""How examples are dealt to clients."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from vfl.data import PARTITIONS, Assignment, Packed, from_list, hold_out
from vfl.data.partition import partition
from vfl.errors import UsageError

M, N, CLASSES = 2003, 20, 10
Y = np.random.default_rng(0).integers(0, CLASSES, M)
USERS = np.random.default_rng(1).permutation(np.repeat(np.arange(N) * 7, np.arange(N) * 10 + 6)[:M])
FIXED = ["sorted", "rows"]
DRAWN = ["iid", "dirichlet:0.3", "dirichlet:0.3,min=5", "shards:2", "labels:2", "lognormal:1", "powerlaw:1.5"]


def deal(spec: str, clients: int | None = N, seed: int = 0) -> Assignment:
    return partition(Y, spec, clients, seed)


def table(assignment: Assignment, y: np.ndarray = Y) -> np.ndarray:
    """Examples by client and label, [N, CLASSES]."""
    owner = np.repeat(np.arange(len(assignment.offsets) - 1), np.diff(assignment.offsets))
    counts = np.zeros((len(assignment.offsets) - 1, CLASSES), np.int64)
    np.add.at(counts, (owner, y[assignment.order]), 1)
    return counts


def distance(counts: np.ndarray) -> float:
    """Mean total variation between the clients' label distributions and everyone's."""
    counts = counts[counts.sum(1) > 0]
    return float(np.abs(counts / counts.sum(1, keepdims=True) - counts.sum(0) / counts.sum()).sum(1).mean() / 2)


def test_every_strategy_is_tested_here() -> None:
    assert {spec.partition(":")[0] for spec in DRAWN + FIXED} | {"natural"} == set(PARTITIONS)


@pytest.mark.parametrize("clients", [1, 7, N])
@pytest.mark.parametrize("spec", [s for s in DRAWN if s != "labels:2"] + ["labels:10", *FIXED])
def test_every_example_goes_to_exactly_one_client(spec: str, clients: int) -> None:
    order, offsets = deal(spec, clients)
    assert np.array_equal(np.sort(order), np.arange(M))
    assert len(offsets) == clients + 1 and offsets[0] == 0 and offsets[-1] == M and (np.diff(offsets) >= 0).all()
    assert order.dtype == offsets.dtype == np.int64


@pytest.mark.parametrize("spec", DRAWN)
def test_the_same_seed_deals_the_same_and_another_does_not(spec: str) -> None:
    first, again, other = deal(spec, seed=3), deal(spec, seed=3), deal(spec, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.order, other.order)


def test_labels_may_be_a_tensor() -> None:
    assert np.array_equal(partition(torch.from_numpy(Y), "shards:2", N, 0).order, deal("shards:2").order)


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = np.diff(deal("iid").offsets)
    assert sizes.max() - sizes.min() == 1


@pytest.mark.parametrize("clients", [1, 7, N])
def test_sorted_and_rows_are_equal_parts_in_the_order_of_labels_and_of_rows(clients: int) -> None:
    for spec, order in (("sorted", np.argsort(Y, kind="stable")), ("rows", np.arange(M))):
        found = deal(spec, clients)
        assert np.array_equal(found.order, order) and np.ptp(np.diff(found.offsets)) <= 1
    targets = np.random.default_rng(2).standard_normal(M)  # of a regression
    assert (np.diff(targets[partition(targets, "sorted", clients, 0).order]) >= 0).all()


def test_sorted_needs_one_value_an_example() -> None:
    with pytest.raises(UsageError, match=r"sorted: needs one label or target .* \[4, 2\]"):
        partition(np.zeros((4, 2)), "sorted", 2, 0)


def test_iid_labels_are_near_everyones() -> None:
    assert distance(table(deal("iid"))) < 0.15


def test_iid_deals_ten_million_examples_to_a_million_clients_in_seconds() -> None:
    start = time.process_time()
    order, offsets = partition(np.zeros(10**7, np.uint8), "iid", 10**6, 0)
    assert time.process_time() - start < 5
    assert len(order) == 10**7 and (np.diff(offsets) == 10).all()


def test_dirichlet_skews_labels_more_the_smaller_alpha_is() -> None:
    distances = [distance(table(deal(f"dirichlet:{alpha}"))) for alpha in (0.05, 0.5, 5, 500)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.7 and distances[-1] < 0.1


def test_dirichlet_shares_of_a_class_have_the_variance_of_their_distribution() -> None:
    alpha, clients, y = 0.5, 10, np.repeat(np.arange(2000), 100)
    owner = np.empty(len(y), np.int64)
    order, offsets = partition(y, f"dirichlet:{alpha}", clients, 0)
    owner[order] = np.repeat(np.arange(clients), np.diff(offsets))
    shares = np.stack([(owner.reshape(2000, 100) == i).mean(1) for i in range(clients)])
    # Dirichlet_n(α): mean 1/n, variance (1/n)(1 − 1/n) / (nα + 1), here 0.015; 2,000 classes give it to a few per cent.
    assert shares.mean(1) == pytest.approx(0.1, abs=0.01)
    assert shares.var(1) == pytest.approx(0.1 * 0.9 / (clients * alpha + 1), rel=0.2)


@pytest.mark.parametrize("alpha", ["1e-300", "1e-6", "1e9"])
def test_dirichlet_survives_extreme_alphas(alpha: str) -> None:
    counts = table(deal(f"dirichlet:{alpha}"))
    assert counts.sum() == M
    holders = (counts > 0).sum(0)
    assert (holders == (1 if float(alpha) < 1 else N)).all()


def test_dirichlet_may_leave_a_client_empty() -> None:
    assert np.diff(deal("dirichlet:0.001").offsets).min() == 0


def test_dirichlet_min_gives_everyone_that_many() -> None:
    assert np.diff(deal("dirichlet:0.3").offsets).min() < 30
    assert np.diff(deal("dirichlet:0.3,min=30").offsets).min() >= 30


def test_shards_give_a_client_few_labels() -> None:
    counts = table(deal("shards:2"))
    # A shard of M/40 = 50 examples is smaller than any class, so it straddles two labels at most.
    assert np.bincount(Y).min() > 51
    assert (counts > 0).sum(1).max() <= 4
    assert np.ptp(counts.sum(1)) <= 2


def test_one_shard_a_client_in_sorted_data_is_one_run_of_rows() -> None:
    order, offsets = partition(np.repeat(np.arange(5), 6), "shards:1", 10, 0)
    runs = [order[a:b].tolist() for a, b in pairwise(offsets)]
    assert sorted(runs) == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(10)]


@pytest.mark.parametrize("labels", [1, 3, 10])
def test_labels_gives_each_client_exactly_that_many_and_each_label_a_holder(labels: int) -> None:
    counts = table(deal(f"labels:{labels}"))
    assert ((counts > 0).sum(1) == labels).all()
    assert (counts.sum(0) == np.bincount(Y)).all()


def test_labels_divides_a_class_evenly_among_its_holders() -> None:
    for column in table(deal("labels:3")).T:
        assert np.ptp(column[column > 0]) <= 1


def test_labels_finds_every_label_a_holder_where_clients_just_suffice() -> None:
    for seed in range(20):
        counts = table(deal("labels:3", clients=4, seed=seed))
        assert counts.sum() == M and (counts > 0).sum(1).max() <= 3
        assert ((counts > 0).sum(0) >= 1).all()


def test_labels_counts_only_labels_that_occur() -> None:
    y = np.array([3, 7] * 50)
    order, offsets = partition(y, "labels:1", 4, 0)
    assert all(len(set(y[order[a:b]])) == 1 for a, b in pairwise(offsets))


def test_lognormal_sizes_have_its_spread_of_logarithms() -> None:
    sizes = np.diff(partition(np.zeros(10**6, np.int64), "lognormal:0.8", 2000, 0).offsets)
    assert np.log(sizes).std() == pytest.approx(0.8, rel=0.05)


def test_powerlaw_sizes_fall_with_the_rank() -> None:
    sizes = np.diff(partition(np.zeros(10**6, np.int64), "powerlaw:1.5,min=0", 100, 0).offsets)
    shares = np.arange(1, 101) ** -1.5
    assert np.sort(sizes)[::-1] == pytest.approx(shares / shares.sum() * 10**6, abs=1)
    assert not np.array_equal(sizes, np.sort(sizes)[::-1])


@pytest.mark.parametrize("spec", ["lognormal", "powerlaw"])
def test_quantity_skew_of_zero_is_equal_and_of_any_size_leaves_nobody_empty(spec: str) -> None:
    assert np.ptp(np.diff(deal(f"{spec}:0").offsets)) <= 1
    extreme = np.diff(deal(f"{spec}:1000").offsets)
    assert extreme.min() == 1 and extreme.max() == M - (N - 1)
    assert np.diff(deal(f"{spec}:1000,min=7").offsets).min() == 7


def test_natural_gives_each_user_their_rows_in_order() -> None:
    order, offsets = partition(Y, "natural", None, 0, users=USERS)
    names = np.unique(USERS)
    assert len(offsets) - 1 == len(names) == N
    for i, name in enumerate(names):
        assert np.array_equal(order[offsets[i] : offsets[i + 1]], np.flatnonzero(name == USERS))


def test_natural_accepts_the_number_of_users_it_has() -> None:
    assert len(partition(Y, "natural", N, 0, users=USERS).offsets) == N + 1


@pytest.mark.parametrize("spec", ["iid", "lognormal:1", "powerlaw:1"])
def test_strategies_without_labels_deal_regression_targets(spec: str) -> None:
    assert len(partition(np.linspace(0, 1, 50), spec, 5, 0).order) == 50


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ("iid", 0, "number of clients must be at least 1, not 0"),
        ("iid", None, "needs the number of clients"),
        ("iid", M + 1, "2004 clients cannot share 2003 examples"),
        ("dirichlet:0.3", M + 1, "cannot share"),
        ("dirichlet", N, "expected dirichlet:ALPHA"),
        ("dirichlet:0", N, "alpha must be above 0"),
        ("dirichlet:-1", N, "alpha must be above 0"),
        ("dirichlet:nan", N, "alpha must be above 0"),
        ("dirichlet:inf", N, "at most 1e9"),
        ("dirichlet:0.3,min=-1", N, "min=-1"),
        ("dirichlet:0.3,min=101", N, "20 clients cannot each have min=101 of 2003 examples"),
        ("dirichlet:0.001,min=50", N, "none of 100 draws gave each of 20 clients min=50"),
        ("shards:0", N, "20 clients × 0 shards must be between 20 and the 2003 examples"),
        ("shards:101", N, "20 clients × 101 shards"),
        ("shards:1.5", N, "shards .*not .1.5."),
        ("labels:0", N, "1 to 10 labels"),
        ("labels:11", N, "1 to 10 labels.*not 11"),
        ("labels:2", 4, "4 clients × 2 labels cannot hold all 10 labels"),
        ("lognormal:-1", N, "sigma must be a number from 0"),
        ("lognormal:inf", N, "sigma must be a number from 0"),
        ("lognormal:1,min=101", N, "lognormal: 20 clients cannot each have min=101"),
        ("powerlaw:-1", N, "exponent must be a number from 0"),
        ("powerlaw:nan", N, "exponent must be a number from 0"),
        ("powerlaw:1,min=-1", N, "powerlaw: 20 clients cannot each have min=-1"),
        ("natural", None, "does not say whose its examples are"),
        ("dirichlett:1", N, "did you mean 'dirichlet'"),
    ],
)
def test_a_partition_out_of_range_is_refused(spec: str, clients: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deal(spec, clients)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="seed must be 0 or larger, not -1"):
        deal("iid", seed=-1)


def test_natural_refuses_another_number_of_clients_and_misshapen_users() -> None:
    with pytest.raises(UsageError, match="20 users, not 21; leave the number of clients out"):
        partition(Y, "natural", N + 1, 0, users=USERS)
    with pytest.raises(UsageError, match=r"users of shape \[2003\], not \[5\]"):
        partition(Y, "natural", None, 0, users=USERS[:5])


@pytest.mark.parametrize("spec", ["dirichlet:0.3", "shards:2", "labels:2"])
@pytest.mark.parametrize("y", [np.linspace(0, 1, 50), np.zeros((50, 2), np.int64)])
def test_strategies_by_label_refuse_targets_that_are_no_labels(spec: str, y: np.ndarray) -> None:
    with pytest.raises(UsageError, match="needs one class label an example"):
        partition(y, spec, 5, 0)


def numbered(*sizes: int) -> Packed:
    """Clients whose examples are numbered through, 0, 1, 2, …"""
    stops = np.cumsum(sizes)
    return from_list([(torch.arange(b - n, b), torch.arange(b - n, b)) for n, b in zip(sizes, stops, strict=True)])


def test_hold_out_takes_the_fraction_of_each_client_but_leaves_one() -> None:
    clients = numbered(10, 0, 1, 2, 7, 100)
    rest, taken = hold_out(clients, 0.3, 0, "held_out")
    assert taken is not None
    assert taken.sizes().tolist() == [3, 0, 0, 1, 2, 30]
    assert (rest.sizes() + taken.sizes()).tolist() == [10, 0, 1, 2, 7, 100]
    for i in range(clients.population):
        kept, own = rest.client(i).x.tolist(), taken.client(i).x.tolist()
        assert sorted(kept + own) == clients.client(i).x.tolist()
        assert kept == sorted(kept) and own == sorted(own)
    _, most = hold_out(clients, 0.999, 0, "held_out")
    assert most is not None and most.sizes().tolist() == [9, 0, 0, 1, 6, 99]


def test_hold_out_takes_each_example_as_often_as_any_other() -> None:
    clients = numbered(*[5] * 4000)
    _, taken = hold_out(clients, 0.4, 0, "held_out")
    assert taken is not None
    counts = np.bincount(taken.x.numpy() % 5)
    # Each of the 5 places is taken in 1,600 ± 31 (one standard deviation) of 4,000 clients.
    assert counts == pytest.approx(1600, abs=125)


def test_hold_out_depends_on_the_seed_and_on_what_it_is_for() -> None:
    clients = numbered(200, 300)
    draws = [hold_out(clients, 0.2, *how)[0].x for how in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


def test_hold_out_of_nothing_copies_nothing() -> None:
    clients = numbered(3)
    rest, taken = hold_out(clients, 0.0, 0, "held_out")
    assert rest is clients and taken is None


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_hold_out_refuses_fractions_outside_zero_to_one(fraction: float) -> None:
    with pytest.raises(UsageError, match="validation: the fraction must be from 0 to below 1"):
        hold_out(numbered(3), fraction, 0, "validation")
