"""Cohorts: each sampler's law within four standard errors, and how many clients an amount means."""

import math
import tracemalloc

import numpy as np
import pytest

from vfl import random
from vfl.errors import UsageError
from vfl.samplers import SAMPLERS, Cohort, Sampler, cohort_size, sampler

N, ROUNDS = 10, 4000
SIZES = np.array([3, 0, 7, 1, 12, 5, 0, 2, 9, 1])
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)])


def even(population: int) -> np.ndarray:
    """Offsets of clients with two examples each."""
    return 2 * np.arange(population + 1)


def draws(chosen: Sampler, rounds: int = ROUNDS, seed: int = 0) -> list[Cohort]:
    return [chosen.draw(k) for k in random.split(random.key(seed), rounds)]


def is_mean(values: np.ndarray, expected: float, std: float) -> None:
    assert abs(values.mean() - expected) < 4 * std / math.sqrt(values.size)


def is_uniform(cells: np.ndarray) -> None:
    free, expected = len(cells) - 1, cells.mean()
    assert ((cells - expected) ** 2 / expected).sum() < free + 4 * math.sqrt(2 * free)


def subsets(cohorts: list[Cohort]) -> np.ndarray:
    """How often each set of clients came."""
    return np.unique([(2**c.ids).sum() for c in cohorts], return_counts=True)[1]


# Amounts


@pytest.mark.parametrize(
    ("amount", "count"),
    [
        (10, 10), ("10", 10), (" 10 ", 10), (np.int64(10), 10), (0.1, 20), ("0.1", 20), ("10%", 20), ("2.5%", 5),
        ("all", 200), ("100%", 200), (200, 200), (1, 1), ("1", 1), (1.0, 200), ("1.0", 200), (1e-9, 1), ("0.1%", 1),
        (0.0126, 3), (np.float64(0.5), 100), (np.float32(0.5), 100),
    ],
)  # fmt: skip
def test_an_amount_is_a_count_when_whole_and_a_fraction_otherwise(amount, count: int) -> None:
    assert cohort_size(amount, 200) == count


@pytest.mark.parametrize("amount", ["x", "", "10 clients", "%", "ten%", "--5", "²", True, None, "0x10"])
def test_what_is_no_amount_is_refused(amount) -> None:
    with pytest.raises(UsageError, match=r"clients-per-round .* is not a count, a fraction"):
        cohort_size(amount, 200)


@pytest.mark.parametrize(
    "amount", [1.5, "1.5", "150%", "0%", 0.0, "0.0", -0.1, "-10%", "nan", "inf", float("nan"), 2.0]
)
def test_a_fraction_outside_zero_to_one_is_refused(amount) -> None:
    with pytest.raises(UsageError, match=r"is a fraction outside \(0, 1\]; write a whole number"):
        cohort_size(amount, 200)


@pytest.mark.parametrize("amount", [0, "0", -1, "-1"])
def test_less_than_one_client_is_refused(amount) -> None:
    with pytest.raises(UsageError, match=f"at least 1, not {amount}"):
        cohort_size(amount, 200)


@pytest.mark.parametrize("amount", [201, "201", 10**30])
def test_more_clients_than_there_are_is_refused(amount) -> None:
    with pytest.raises(UsageError, match=f"is {amount}, above the population of 200 clients"):
        cohort_size(amount, 200)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_bad_amount_is_refused_when_the_sampler_is_made(name: str) -> None:
    with pytest.raises(UsageError, match="clients-per-round"):
        sampler(name, 11, OFFSETS)


# All samplers


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("amount", [1, 4, "all"])
def test_a_cohort_is_a_function_of_the_key(name: str, amount) -> None:
    chosen = sampler(name, amount, OFFSETS)
    first, again = draws(chosen, 20), draws(chosen, 20)
    for a, b in zip(first, again, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.factor.tolist() == b.factor.tolist()
        assert a.ids.dtype == np.int64
        assert a.factor.dtype == np.float64
        assert a.ids.shape == a.factor.shape
        assert ((a.ids >= 0) & (a.ids < N)).all()


@pytest.mark.parametrize("name", ["uniform", "replacement", "poisson", "weighted"])
def test_another_key_draws_another_cohort(name: str) -> None:
    cohorts = draws(sampler(name, 50, even(10**6)), 100)
    assert len({tuple(c.ids) for c in cohorts}) == 100


@pytest.mark.parametrize("name", SAMPLERS)
def test_changing_a_cohort_does_not_change_the_next(name: str) -> None:
    chosen, key = sampler(name, 4, OFFSETS), random.key(3)
    before = chosen.draw(key).ids.tolist()
    chosen.draw(key).ids[:] = -1
    assert chosen.draw(key).ids.tolist() == before


@pytest.mark.parametrize("name", ["uniform", "poisson", "fixed", "replacement"])
def test_unweighted_samplers_leave_the_weights_and_sort_the_clients(name: str) -> None:
    for cohort in draws(sampler(name, 4, OFFSETS), 50):
        assert (cohort.factor == 1).all()
        assert (np.diff(cohort.ids) >= 0).all()


@pytest.mark.parametrize(
    ("name", "distinct"),
    [("uniform", True), ("poisson", True), ("fixed", True), ("replacement", False), ("weighted", False)],
)
def test_samplers_say_whether_a_client_can_come_twice(name: str, distinct: bool) -> None:
    chosen = sampler(name, 6, OFFSETS)
    assert chosen.distinct == distinct
    assert all(len(np.unique(c.ids)) == len(c.ids) for c in draws(chosen, 200)) == distinct


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_cost_of_a_cohort_grows_with_the_cohort_and_not_with_the_population(name: str) -> None:
    offsets, key = even(10**7), random.key(0)
    tracemalloc.start()
    try:
        cohort = sampler(name, 1000, offsets).draw(key)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(cohort.ids) > 800
    assert peak < 1_000_000  # bytes; one byte a client would be ten times that


# Laws


def test_uniform_takes_every_set_of_its_size_equally_often() -> None:
    cohorts = draws(sampler("uniform", 2, even(6)), 6000)
    assert all(len(c.ids) == 2 for c in cohorts)
    cells = subsets(cohorts)
    assert len(cells) == 15
    is_uniform(cells)


def test_uniform_includes_each_client_with_probability_s_over_n() -> None:
    ids = np.concatenate([c.ids for c in draws(sampler("uniform", 3, OFFSETS))])
    for share in np.bincount(ids, minlength=N) / ROUNDS:
        assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / ROUNDS)


@pytest.mark.parametrize("count", [500, 5000])  # numpy draws small and large shares of a population in different ways
def test_uniform_is_uniform_over_a_large_population(count: int) -> None:
    cohorts = draws(sampler("uniform", count, even(20_000)), 20)
    assert all(len(np.unique(c.ids)) == count for c in cohorts)
    is_uniform(np.bincount(np.concatenate([c.ids for c in cohorts]) // 200, minlength=100))


def test_uniform_of_all_is_everyone() -> None:
    for cohort in draws(sampler("uniform", "all", OFFSETS), 5):
        assert cohort.ids.tolist() == list(range(N))


def test_replacement_draws_each_place_independently_and_uniformly() -> None:
    cohorts = draws(sampler("replacement", 3, even(4)))
    assert all(len(c.ids) == 3 for c in cohorts)
    repeats = np.array([len(np.unique(c.ids)) for c in cohorts])
    for distinct, share in ((1, 4 / 64), (2, 36 / 64), (3, 24 / 64)):
        is_mean(repeats == distinct, share, math.sqrt(share * (1 - share)))
    counts = np.stack([np.bincount(c.ids, minlength=4) for c in cohorts])
    for column in counts.T:
        is_mean(column, 3 / 4, math.sqrt(3 * (1 / 4) * (3 / 4)))


def test_poisson_tosses_a_coin_for_every_client_on_its_own() -> None:
    cells = subsets(draws(sampler("poisson", "50%", even(6)), 6400))
    assert len(cells) == 2**6  # with q = 1/2 every set of clients, the empty one too, is equally likely
    is_uniform(cells)


def test_poisson_counts_are_binomial() -> None:
    population, count = 1000, 100
    cohorts = draws(sampler("poisson", count, even(population)), 3000)
    sizes = np.array([len(c.ids) for c in cohorts])
    variance = count * (1 - count / population)
    is_mean(sizes, count, math.sqrt(variance))
    is_mean((sizes - count) ** 2, variance, math.sqrt(2 * variance**2 + variance))
    is_uniform(np.bincount(np.concatenate([c.ids for c in cohorts]) // 10, minlength=100))


def test_a_poisson_cohort_may_be_empty() -> None:
    cohorts = draws(sampler("poisson", 1, even(3)), 100)
    empty = [c for c in cohorts if not len(c.ids)]
    assert 10 < len(empty) < 60
    assert empty[0].ids.dtype == np.int64
    assert empty[0].factor.shape == (0,)


def test_fixed_is_the_listed_clients_or_the_first_ones_every_round() -> None:
    for cohort in draws(sampler("fixed:5,0,3", "all", OFFSETS), 3):
        assert cohort.ids.tolist() == [0, 3, 5]
    for cohort in draws(sampler("fixed", 3, OFFSETS), 3):
        assert cohort.ids.tolist() == [0, 1, 2]
    assert sampler("fixed:0", 3, OFFSETS).draw(random.key(0)).ids.tolist() == [0]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("fixed:1,2,1", "names a client twice: 1, 2, 1"),
        ("fixed:10", "outside 0 … 9: 10"),
        ("fixed:0,-1", "outside 0 … 9: 0, -1"),
        ("fixed:a", "whole number"),
        ("uniform:3", "sampler 'uniform:3'"),
        ("unifrom", "unknown sampler 'unifrom'; did you mean 'uniform'"),
    ],
)
def test_bad_samplers_are_refused_by_name(spec: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        sampler(spec, 3, OFFSETS)


def test_weighted_draws_clients_by_their_size_and_never_an_empty_one() -> None:
    cohorts = draws(sampler("weighted", 5, OFFSETS))
    counts = np.stack([np.bincount(c.ids, minlength=N) for c in cohorts])
    for column, size in zip(counts.T, SIZES, strict=True):
        p = size / SIZES.sum()
        if size:
            is_mean(column, 5 * p, math.sqrt(5 * p * (1 - p)))
        else:
            assert not column.any()


def test_weighted_divides_each_weight_by_n_times_its_probability() -> None:
    for cohort in draws(sampler("weighted", 5, OFFSETS), 50):
        np.testing.assert_allclose(cohort.factor * N * SIZES[cohort.ids] / SIZES.sum(), 1, rtol=1e-12)


def test_weighted_means_estimate_full_participation_without_bias() -> None:
    values = np.random.default_rng(0).normal(size=N) + np.arange(N)
    cohorts = draws(sampler("weighted", 5, OFFSETS))
    # Weights nᵢ: all draws weigh the same, so their plain mean estimates the mean over examples.
    by_examples = []
    for c in cohorts:
        weights = SIZES[c.ids] * c.factor
        np.testing.assert_allclose(weights, weights[0], rtol=1e-12)
        by_examples.append((weights * values[c.ids]).sum() / weights.sum())
    p = SIZES / SIZES.sum()
    wanted = (p * values).sum()
    is_mean(np.array(by_examples), wanted, math.sqrt((p * (values - wanted) ** 2).sum() / 5))
    # Weights 1: the sum over S draws estimates the plain mean over the N clients.
    by_clients = np.array([(c.factor * values[c.ids]).mean() for c in cohorts])
    filled = SIZES > 0
    wanted = values[filled].sum() / N
    second = (values[filled] ** 2 / (N * N * p[filled])).sum()
    is_mean(by_clients, wanted, math.sqrt((second - wanted**2) / 5))


def test_poisson_takes_a_fraction_as_the_probability_itself() -> None:
    offsets = np.arange(6)
    counts = [len(sampler("poisson", "50%", offsets).draw(random.fold_in(random.key(0), t)).ids) for t in range(4000)]
    mean, error = np.mean(counts), np.sqrt(5 * 0.25 / 4000)
    assert abs(mean - 2.5) < 4 * error  # rounded to whole clients it would be 2
