"""Ranks of one machine add through memory that they share: the same sums on each, and an error when one is gone."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from vfl import neighbours
from vfl.errors import RankLostError

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open") or neighbours.NATIVE.found("meet") is None,
    reason="needs Linux and a C++ compiler",
)


def together(world: int, work: Callable[[int, neighbours.Neighbours | None], None]) -> None:
    """`work` on every rank, each in a thread of its own; the first of their errors."""
    store, errors = HashStore(), []

    def play(rank: int) -> None:
        try:
            near = neighbours.meet(rank, world, store)
            with contextlib.closing(near) if near is not None else contextlib.nullcontext():
                work(rank, near)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("world", [2, 3])
def test_sums_are_those_of_all_ranks_and_the_same_on_each(world, monkeypatch):
    monkeypatch.setattr(neighbours, "SLOT", 2**12)
    forms = [(0,), (), (1,), (2, 3), (511,), (512,), (5000,)]
    dtypes = torch.float32, torch.float64, torch.int32, torch.int64
    cases = [(form, dtype) for form in forms for dtype in dtypes]
    given = [
        [(100 * torch.randn(form, generator=torch.Generator().manual_seed(rank))).to(dtype) for form, dtype in cases]
        for rank in range(world)
    ]
    found = {}

    def work(rank, near):
        found[rank] = [tensor.clone() for tensor in given[rank]]
        for tensor in found[rank]:
            near.all_reduce(tensor)

    together(world, work)
    for case, parts in enumerate(zip(*given, strict=True)):
        expected = torch.stack([part.double() for part in parts]).sum(0)
        for rank in range(world):
            assert found[rank][case].equal(found[0][case])
            torch.testing.assert_close(found[rank][case].double(), expected, rtol=1e-6, atol=1e-4)
        if world == 2:
            assert found[0][case].equal(parts[0] + parts[1])


def test_a_rank_that_leaves_is_missed_but_not_for_what_it_has_done():
    said = {}

    def work(rank, near):
        for _ in range(1 + (rank == 0)):
            total = torch.ones(3)
            try:
                near.all_reduce(total)
            except RuntimeError as error:
                said[rank] = str(error)
            else:
                assert total.tolist() == [2, 2, 2]

    together(2, work)
    assert said == {0: "rank 1 has ended"}


DIES = """
import sys, torch, torch.distributed as dist
from vfl.neighbours import meet
near = meet(1, 2, dist.TCPStore("127.0.0.1", int(sys.argv[1])))
near.all_reduce(torch.ones(3))
print("added", flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_killed_is_missed(monkeypatch):
    monkeypatch.setattr(neighbours, "LOOKS", 10)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-c", DIES, str(store.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        near = neighbours.meet(0, 2, store)
        assert near is not None
        near.all_reduce(torch.ones(3))
        assert other.stdout is not None
        assert other.stdout.readline() == b"added\n"
        other.kill()
        with pytest.raises(RuntimeError, match="rank 1 has ended"):
            near.all_reduce(torch.ones(3))
    near.close()


@pytest.mark.parametrize("lacking", [0, 1])
def test_where_one_rank_cannot_share_none_does(lacking, monkeypatch):
    made, found = neighbours._made, neighbours._found

    def refused(*arguments):
        raise OSError("no such memory here")

    monkeypatch.setattr(neighbours, "_made", refused if lacking == 0 else made)
    monkeypatch.setattr(neighbours, "_found", refused if lacking == 1 else found)
    seen = {}
    together(2, lambda rank, near: seen.update({rank: near}))
    assert seen == {0: None, 1: None}


def test_memory_of_another_machine_is_not_taken_for_the_first_ranks(monkeypatch):
    tokens = iter([5, 6])
    monkeypatch.setattr(neighbours.secrets, "randbits", lambda bits: next(tokens))
    with contextlib.ExitStack() as held:
        store = HashStore()
        neighbours._made(2, store, held)
        assert neighbours._found(2, store) is not None
        pid, fd, _ = store.get("memory").split()
        store.set("memory", f"{pid.decode()} {fd.decode()} 6")
        with pytest.raises(ValueError, match="another machine"):
            neighbours._found(2, store)
        store.set("memory", "")
        with pytest.raises(ValueError, match="not enough values"):
            neighbours._found(2, store)


def test_a_rank_that_ended_before_the_first_sum_is_missed():
    store = HashStore()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    store.set("process 1", str(gone.pid))
    with pytest.raises(RankLostError, match="ended before the first round"):
        neighbours.meet(0, 2, store)
