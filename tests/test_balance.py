"""Clients are shared out over ranks by what they cost and by how fast the ranks are, the same on every rank."""

import numpy as np
import pytest
import torch
from helpers import N, federated, regression

import vfl
from algorithms.fedavg import FedAvg
from vfl.balance import NOISE, PATIENCE, STEP, Pace, Stopwatch, assign, client_work, even

LIKE = np.full(12, 100)  # twelve clients of one size


def shares(work: np.ndarray, slowness: list[float], owners: dict[int, int] | None = None) -> list[int]:
    """How much work each rank gets."""
    rank = assign(np.arange(len(work)), work, owners or {}, np.array(slowness))
    return np.bincount(rank, work, minlength=len(slowness)).astype(int).tolist()


def settled(seconds_a_unit: list[float], work: np.ndarray = LIKE, rounds: int = 40) -> Pace:
    """The pace after rounds on ranks that take so long for a unit of work."""
    pace = even(len(seconds_a_unit))
    for _ in range(rounds):
        share = np.array(shares(work, pace.slowness.tolist()))
        pace = pace.after(share * seconds_a_unit, share)
    return pace


def test_a_client_costs_its_examples_and_a_fixed_part_for_each_step():
    np.testing.assert_array_equal(
        client_work(np.array([0, 1, 3]), np.array([0, 20, 5])), [0, 20 + STEP, 3 * (5 + STEP)]
    )


def test_like_clients_on_equal_ranks_split_evenly():
    for world in (1, 2, 3, 4):
        assert shares(LIKE, [1.0] * world) == [1200 // world] * world


def test_the_longest_work_goes_first_and_to_the_rank_that_is_done_first():
    assert shares(np.array([1, 2, 3, 4, 5, 9]), [1.0, 1.0]) == [12, 12]
    assert shares(np.array([6, 1, 1, 1, 1, 1, 1]), [1.0, 1.0]) == [6, 6]


def test_a_rank_of_half_the_speed_gets_half_the_work():
    assert shares(LIKE, [2.0, 1.0]) == [400, 800]
    assert shares(LIKE, [1.0, 2.0, 2.0]) == [600, 300, 300]


def test_a_client_with_state_stays_with_its_owner_however_slow():
    assert shares(LIKE, [100.0, 1.0], dict.fromkeys(range(12), 0)) == [1200, 0]
    assert shares(LIKE, [1.0, 1.0], dict.fromkeys(range(4), 0)) == [600, 600]


@pytest.mark.parametrize("units", [[1.0, 2.0], [0.3, 0.1, 0.1]])
def test_paces_are_learnt_from_seconds(units):
    pace = settled(units)
    np.testing.assert_allclose(pace.slowness, np.array(units) / min(units), rtol=1e-12)


def test_differences_within_the_noise_move_no_client():
    generator, pace = np.random.default_rng(0), even(2)
    for _ in range(200):
        pace = pace.after(np.array([1.0, 1.05]) * generator.uniform(0.99, 1.01, 2), np.array([1, 1]))
        assert pace.slowness.tolist() == [1.0, 1.0]
    assert settled([1.0, NOISE + 0.01]).slowness[1] > NOISE


def test_one_slow_round_of_a_rank_is_not_its_pace():
    pace = even(2)
    for seconds in ([1.0, 1.0], [1.0, 1.4], [1.0, 1.0]):
        pace = pace.after(np.array(seconds), np.array([1, 1]))
    assert pace.slowness.tolist() == [1.0, 1.0]


def test_clients_wait_ten_rounds_before_they_move_and_move_again():
    pace, moves = even(2), []
    for round in range(40):
        before, pace = pace, pace.after(np.array([1.0, 5.0 if round < 20 else 1.0]), np.array([1, 1]))
        if not np.array_equal(before.slowness, pace.slowness):
            moves.append(round)
    assert moves[0] == PATIENCE - 1
    assert np.diff(moves).min() >= PATIENCE


def test_rounds_of_milliseconds_are_mostly_calls_and_move_no_client():
    pace, work = even(2), np.array([50, 50])
    for _ in range(100):
        pace = pace.after(0.001 + np.array([1.5, 1.0]) * 1e-5 * work, work)
        work = np.array(shares(np.ones(100, dtype=np.int64), pace.slowness.tolist()))
    assert work.tolist() == [50, 50]


def test_rounds_that_were_not_timed_teach_nothing():
    pace = even(2)
    for seconds in ([0.0, 0.0], [5.0, 0.0]):  # the second rank's pace is still unknown
        pace = pace.after(np.array(seconds), np.array([10, 10]))
        assert pace.slowness.tolist() == [1.0, 1.0]
    known = settled([1.0, 2.0])
    after = known.after(np.zeros(2), np.array([10, 10]))
    np.testing.assert_array_equal(after.average, known.average)


def test_a_rank_that_is_too_slow_for_any_client_is_tried_again():
    few, pace = np.full(4, 100), Pace(np.array([1.0, 50.0]), np.array([1.0, 50.0]))  # it was busy with something else
    assert shares(few, pace.slowness.tolist()) == [400, 0]
    for _ in range(40):
        share = np.array(shares(few, pace.slowness.tolist()))
        pace = pace.after(share * 1.0, share)
    assert shares(few, pace.slowness.tolist()) == [200, 200]


def test_a_stopwatch_reads_the_seconds_between_its_two_moments(monkeypatch):
    clock = iter([0.0, 0.0, 3.0, 5.5])
    monkeypatch.setattr("vfl.balance.time.perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    watch.stop()
    assert watch.seconds() == 2.5


@pytest.mark.parametrize(
    ("options", "timed"),
    [({"execution": "vmap", "chunk": 4}, False), ({"execution": "vmap"}, True), ({"chunk": 4}, True), ({}, True)],
)
def test_no_timing_moves_a_client_where_execution_and_chunk_are_given(options, timed):
    task = regression()
    engine = vfl.Engine(
        FedAvg().build(task, N), task, federated(), clients_per_round="all", ranks=vfl.Ranks(0, 2), **options
    )
    assert engine.timed is timed
