"""Client state: rows for those that took part, the template for the others."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from vfl.base import leaves, tree_map
from vfl.store import Store

CPU = torch.device("cpu")


class Memory(NamedTuple):
    """A client's state with a nested tree, a scalar and an integer."""

    h: Tensor  # [3]
    opt: tuple[Tensor, Tensor]  # [2, 2] and []


def template() -> Memory:
    return Memory(torch.tensor([1.0, 2.0, 3.0]), (torch.full((2, 2), 5.0, dtype=torch.float64), torch.tensor(7)))


def states(ids: np.ndarray, version: int = 0) -> Memory:
    """States that tell which client and which version they are."""
    tag = torch.from_numpy(1000 * version + 10 * ids)
    return Memory(
        tag.float()[:, None] + torch.tensor([0.1, 0.2, 0.3]),
        (tag.double()[:, None, None].expand(-1, 2, 2) + 0.5, tag),
    )


def all_of(ids: np.ndarray) -> Tensor:
    return torch.ones(len(ids), dtype=torch.bool)


def some(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def same(a, b) -> None:
    assert type(a) is type(b)
    for left, right in zip(leaves(a), leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def repeated(count: int) -> Memory:
    return tree_map(lambda leaf: leaf.expand(count, *leaf.shape), template())


def test_a_client_that_never_took_part_reads_the_template() -> None:
    store = Store(template(), CPU)
    same(store.gather(some(4, 0, 9), CPU), repeated(3))
    store.scatter(some(4), states(some(4)), all_of(some(4)))
    same(store.gather(some(0, 9), CPU), repeated(2))


def test_reading_gives_no_client_a_row() -> None:
    store = Store(template(), CPU)
    store.gather(some(4, 0, 9), CPU)
    assert store.rows()[0].tolist() == []
    store.scatter(some(9, 4), states(some(9, 4)), all_of(some(9, 4)))
    store.gather(some(0, 4, 5), CPU)
    assert store.rows()[0].tolist() == [4, 9]


def test_what_was_written_is_read_back_in_any_order() -> None:
    store, ids = Store(template(), CPU), some(7, 2, 10**9, 5)
    store.scatter(ids, states(ids), all_of(ids))
    for asked in (ids, ids[::-1].copy(), some(5), some(10**9, 7)):
        same(store.gather(asked, CPU), states(asked))
    mixed = store.gather(some(5, 3, 2), CPU)
    same(tree_map(lambda leaf: leaf[[0, 2]], mixed), states(some(5, 2)))
    same(tree_map(lambda leaf: leaf[1:2], mixed), repeated(1))


def test_no_clients_are_an_empty_stack() -> None:
    store = Store(template(), CPU)
    store.scatter(some(), states(some()), all_of(some()))
    same(store.gather(some(), CPU), repeated(0))
    store.scatter(some(1), states(some(1)), all_of(some(1)))
    same(store.gather(some(), CPU), repeated(0))


def test_a_second_write_replaces_the_first_and_leaves_the_others() -> None:
    store, ids = Store(template(), CPU), some(1, 2, 3)
    store.scatter(ids, states(ids), all_of(ids))
    store.scatter(some(3, 1), states(some(3, 1), version=1), all_of(some(3, 1)))
    same(store.gather(some(1, 3), CPU), states(some(1, 3), version=1))
    same(store.gather(some(2), CPU), states(some(2)))
    assert store.rows()[0].tolist() == [1, 2, 3]


def test_only_the_kept_clients_are_written_and_get_rows() -> None:
    store, ids = Store(template(), CPU), some(1, 2, 3, 4)
    store.scatter(some(2), states(some(2)), all_of(some(2)))
    store.scatter(ids, states(ids, version=1), torch.tensor([True, False, False, True]))
    same(store.gather(some(1, 4), CPU), states(some(1, 4), version=1))
    same(store.gather(some(2), CPU), states(some(2)))
    same(store.gather(some(3), CPU), repeated(1))
    assert store.rows()[0].tolist() == [1, 2, 4]
    store.scatter(ids, states(ids, version=2), torch.zeros(4, dtype=torch.bool))
    same(store.gather(some(1, 4), CPU), states(some(1, 4), version=1))


def test_growing_keeps_every_row() -> None:
    store, everyone = Store(template(), CPU), np.random.default_rng(0).permutation(300)
    for at in range(0, 300, 7):
        now = everyone[at : at + 7]
        store.scatter(now, states(now), all_of(now))
        same(store.gather(everyone[: at + 7], CPU), states(everyone[: at + 7]))
    assert store.rows()[0].tolist() == list(range(300))


def test_changing_what_was_read_or_written_does_not_change_the_store() -> None:
    first, ids = template(), some(1, 2)
    store, written = Store(first, CPU), states(some(1, 2))
    store.scatter(ids, written, all_of(ids))
    for tree in (written, store.gather(ids, CPU), store.gather(some(8), CPU), store.rows()[1]):
        for leaf in leaves(tree):
            leaf.zero_()
    same(store.gather(ids, CPU), states(ids))
    same(store.gather(some(8), CPU), repeated(1))


def test_the_store_holds_on_to_no_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    store = Store(x * 2, CPU)
    store.scatter(some(1), (x * 3)[None], all_of(some(1)))
    assert not store.gather(some(0, 1), CPU).requires_grad
    assert store.gather(some(0, 1), CPU).tolist() == [[2, 2, 2], [3, 3, 3]]


def test_clients_without_state_keep_nothing() -> None:
    for nothing in ((), ((), ())):
        store = Store(nothing, CPU)
        assert store.empty
        store.scatter(some(1), nothing, all_of(some(1)))
        assert store.gather(some(1, 2), CPU) == nothing
        ids, rows = store.rows()
        assert ids.tolist() == []
        assert rows == []
        store.load(ids, rows, 0, 1)
    assert not Store(template(), CPU).empty


def filled(ids: np.ndarray) -> Store:
    store = Store(template(), CPU)
    store.scatter(ids, states(ids), all_of(ids))
    return store


def test_rows_come_by_ascending_client_and_only_those_in_use() -> None:
    ids, rows = filled(some(9, 4, 6)).rows()
    assert ids.tolist() == [4, 6, 9]
    for row, expected in zip(rows, leaves(states(ids)), strict=True):
        assert torch.equal(row, expected)


def test_loading_saved_rows_gives_the_same_store() -> None:
    ids, rows = filled(some(9, 4, 6)).rows()
    store = Store(template(), CPU)
    store.load(ids, rows, 0, 1)
    same(store.gather(ids, CPU), states(ids))
    same(store.gather(some(5), CPU), repeated(1))
    again = store.rows()
    assert again[0].tolist() == ids.tolist()
    assert all(torch.equal(a, b) for a, b in zip(again[1], rows, strict=True))
    store.scatter(some(5, 4), states(some(5, 4), version=1), all_of(some(5, 4)))
    same(store.gather(some(4, 5), CPU), states(some(4, 5), version=1))
    same(store.gather(some(6, 9), CPU), states(some(6, 9)))


@pytest.mark.parametrize("world", [2, 5])  # five ranks for three rows: some have none
def test_ranks_share_the_saved_rows_and_know_all_owners(world: int) -> None:
    ids, rows = filled(some(9, 4, 6)).rows()
    ranks = [Store(template(), CPU) for _ in range(world)]
    for rank, store in enumerate(ranks):
        store.load(ids, rows, rank, world)
    owners = ranks[0].owners
    assert sorted(owners) == ids.tolist()
    assert all(store.owners == owners for store in ranks)
    for rank, store in enumerate(ranks):
        mine = store.rows()[0]
        assert mine.tolist() == [i for i in ids.tolist() if owners[i] == rank]
        same(store.gather(mine, CPU), states(mine))
        assert len(mine) <= -(-len(ids) // world)
    merged = np.sort(np.concatenate([store.rows()[0] for store in ranks]))
    assert merged.tolist() == ids.tolist()


def test_no_saved_rows_load_as_an_empty_store() -> None:
    store = Store(template(), CPU)
    store.load(*Store(template(), CPU).rows(), 0, 1)
    assert store.rows()[0].tolist() == []
    same(store.gather(some(1), CPU), repeated(1))
