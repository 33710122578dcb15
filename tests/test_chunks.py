"""How many clients run at once: splitting, growing, and giving way when memory runs out."""

import logging
import mmap

import numpy as np
import pytest
import torch

from vfl.chunks import COLD, HEAVY, MEMORY_SHARE, SHORT, ChunkSize, Memory, out_of_memory, parse_chunk
from vfl.errors import UsageError
from vfl.queue import PADDING, alike

CPU = torch.device("cpu")
MB = 2**20
GB = 2**30


class Machine(Memory):
    """A device where each client takes some bytes, and a chunk of C clients does speed(C) steps a millisecond."""

    def __init__(self, free: int | None = 8 * GB, each: int = 1, speed=lambda clients: clients, base: int = GB) -> None:
        super().__init__(CPU)
        self.total, self.each, self.speed, self.base, self.highest = free, each, speed, base, base

    def free(self) -> int | None:
        return self.total

    def used(self) -> int | None:
        return self.base

    def peak(self) -> int | None:
        return self.highest

    def run(self, clients: int) -> float:
        """Seconds of one chunk in which every client takes one step."""
        self.highest = max(self.highest, self.base + clients * self.each)
        return 1e-3 * clients / self.speed(clients)


def size_on(machine: Machine, wanted: int | None = None, client_bytes: int = 1) -> ChunkSize:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfl.chunks.Memory", lambda device: machine)
        return ChunkSize(wanted, client_bytes, CPU)


def played(machine: Machine, size: ChunkSize, population: int = 10**6, rounds: int = 40) -> list[int]:
    """The chunks that were run until the size settled."""
    run: list[int] = []
    for _ in range(rounds):
        if size.settled:
            break
        clients = size.take(population)
        run.append(clients)
        before = machine.used()
        size.report(clients, clients, machine.run(clients), before)
    return run


def split(size: ChunkSize, counts: list[int]) -> list[list[int]]:
    left, chunks = np.array(counts), []
    while len(left):
        take = size.take(alike(left))
        assert 1 <= take <= len(left)
        chunks.append(left[:take].tolist())
        left = left[take:]
    return chunks


# Words


@pytest.mark.parametrize(("text", "size"), [(None, None), ("auto", None), (1, 1), ("1", 1), ("64", 64), (10**6, 10**6)])
def test_a_chunk_is_auto_or_a_count(text, size) -> None:
    assert parse_chunk(text) == size


@pytest.mark.parametrize("text", [0, "0", -1, "-1", "x", "", "1.5", 2.5, "Auto", "10%"])
def test_any_other_chunk_is_refused(text) -> None:
    with pytest.raises(UsageError, match="chunk must be 'auto' or a whole number of clients from 1, not"):
        parse_chunk(text)


# Splitting


@pytest.mark.parametrize(("clients", "size", "chunks"), [
    (10, 4, [4, 3, 3]), (9, 4, [3, 3, 3]), (8, 4, [4, 4]), (5, 4, [3, 2]), (4, 4, [4]), (1, 4, [1]),
    (101, 100, [51, 50]), (3, 1, [1, 1, 1]),
])  # fmt: skip
def test_a_given_size_splits_a_cohort_into_equal_chunks(clients: int, size: int, chunks: list[int]) -> None:
    assert [len(c) for c in split(size_on(Machine(), size), [7] * clients)] == chunks


def test_a_chunk_ends_where_the_next_client_has_too_few_steps() -> None:
    assert split(size_on(Machine(), 100), [10, 9, 6, 5, 4, 3, 2, 1]) == [[10, 9, 6, 5], [4, 3, 2], [1]]
    assert split(size_on(Machine(), 100), [100, 49]) == [[100], [49]]
    assert split(size_on(Machine(), 100), [100, 50]) == [[100, 50]]
    assert split(size_on(Machine(free=None)), [100, 50, 49, 1]) == [[100, 50], [49], [1]]


@pytest.mark.parametrize("wanted", [1, 3, 16, 1000, None])
def test_every_client_is_in_one_chunk_of_bounded_size_and_padding(wanted: int | None) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = np.sort(generator.integers(1, 200, size=generator.integers(1, 80)))[::-1].tolist()
        size = size_on(Machine(), wanted)
        chunks = split(size, counts)
        assert [count for chunk in chunks for count in chunk] == counts
        for chunk in chunks:
            assert len(chunk) <= size.size
            assert chunk[-1] >= PADDING * chunk[0]


def test_while_growing_full_chunks_come_first_so_that_they_can_be_measured() -> None:
    assert [len(c) for c in split(size_on(Machine()), [7] * 40)] == [16, 16, 8]


# Growing


def test_growth_ends_when_the_cohorts_never_fill_a_chunk() -> None:
    size = size_on(Machine())
    for _ in range(SHORT):
        assert not size.settled
        size.report(10, 10, 0.001, 0)
    assert size.settled and size.size == 16


def test_a_given_size_is_kept() -> None:
    machine = Machine(speed=lambda c: c**2)
    size = size_on(machine, 5)
    assert size.settled
    size.report(5, 5, 0.001, 0)
    assert size.size == 5


@pytest.mark.parametrize(("client_bytes", "first"), [(1, 16), (MB, 4), (4 * MB, 1), (100 * MB, 1), (MB // 3, 12)])
def test_the_first_size_is_small_and_within_half_the_free_memory(client_bytes: int, first: int) -> None:
    assert size_on(Machine(free=8 * MB), None, client_bytes).size == first


@pytest.mark.parametrize("free", [None, 100 * GB])
def test_clients_with_large_models_start_as_few(free: int | None) -> None:
    firsts = [size_on(Machine(free=free), None, client_bytes).size for client_bytes in (MB, 16 * MB, 100 * GB)]
    assert firsts == [16, 2, 1]


def test_a_short_chunk_beyond_the_best_that_is_slower_ends_the_growth() -> None:
    size = size_on(Machine())
    size.report(16, 16, 0.016, 0)
    size.report(20, 20, 0.040, 0)  # of 32
    assert size.settled and size.size == 16


@pytest.mark.parametrize("best", [16, 64, 256, 1024])
def test_the_size_doubles_while_that_pays_and_settles_on_the_fastest(best: int) -> None:
    machine = Machine(speed=lambda c: min(c, best))
    size = size_on(machine)
    run = played(machine, size)
    assert run == [16 * 2**i for i in range(len(run))]
    assert run[-1] == 2 * best  # one more, which did not pay
    assert size.settled
    assert size.size == best


def test_a_doubled_size_that_is_hardly_faster_is_not_kept() -> None:
    for gain, kept in ((1.04, 16), (1.06, 32)):
        machine = Machine(speed=lambda c, g=gain: {16: 100.0, 32: 100 * g}.get(c, 1.0))
        size = size_on(machine)
        played(machine, size)
        assert size.size == kept


@pytest.mark.parametrize("each", [1, 10**6, 7 * 10**7, GB // 5, 3 * GB, 20 * GB])
@pytest.mark.parametrize("guess", ["right", "four times too low"])
def test_no_chunk_after_the_first_is_expected_to_take_more_than_half_of_the_free_memory(each: int, guess: str) -> None:
    machine = Machine(free=8 * GB, each=each)
    size = size_on(machine, None, each if guess == "right" else max(each // 4, 1))
    run = played(machine, size, rounds=12)
    grown = run[1:] if guess != "right" else run
    assert all(c * each <= MEMORY_SHARE * 8 * GB or c == 1 for c in grown)
    if each >= 10**6:
        assert size.settled
        assert 2 * size.size * each > MEMORY_SHARE * 8 * GB  # and it does use what it may


def test_without_any_figure_for_memory_speed_alone_decides() -> None:
    machine = Machine(free=None, each=10 * GB, speed=lambda c: min(c, 128))
    size = size_on(machine)
    played(machine, size)
    assert size.size == 128


def test_a_chunk_smaller_than_the_size_teaches_nothing() -> None:
    size = size_on(Machine())
    for clients, seconds in ((1, 1e-9), (15, 1e-3)):
        size.report(clients, clients, seconds, 0)
    assert size.size == 16
    assert not size.settled


@pytest.mark.parametrize(("speed", "chunks"), [(0.5 / HEAVY, [16, 16]), (0.5 / HEAVY / COLD, [16])])
def test_clients_whose_steps_take_long_are_not_put_together(speed: float, chunks: list[int]) -> None:
    """Twice as long as those beside which calls cost nothing; in the first chunk, other things may take the time."""
    machine = Machine(speed=lambda clients: 1e-3 * speed)
    size = size_on(machine)
    assert played(machine, size) == chunks and size.size == 16


def test_a_first_chunk_that_took_long_for_other_things_is_followed_by_larger_ones() -> None:
    size = size_on(Machine())
    size.report(16, 16, 16 * 2 * HEAVY, 0)
    assert size.size == 16 and not size.settled and size.warm
    size.report(16, 16, 16 * HEAVY / 2, 0)
    assert size.size == 32


# Giving way


def test_running_out_of_memory_halves_the_size_for_good(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    size = size_on(machine)
    size.report(16, 16, 0.016, 0)
    assert size.size == 32
    with caplog.at_level(logging.WARNING, logger="vfl"):
        assert size.halve(32)
    assert "out of memory with 32 clients at once; going on with 16" in caplog.text
    assert size.settled
    assert [len(c) for c in split(size, [1] * 40)] == [14, 13, 13]
    size.report(16, 16, 1e-9, 0)
    assert size.size == 16


def test_a_given_size_gives_way_too_down_to_one_client() -> None:
    size = size_on(Machine(), 100)
    sizes, clients = [], 100
    while size.halve(clients):
        clients = size.take(1000)
        sizes.append(clients)
    assert sizes == [50, 25, 12, 6, 3, 1]
    assert not size.halve(1)
    assert size.size == 1


def test_the_clients_that_did_not_fit_are_halved_even_when_they_were_fewer_than_the_size() -> None:
    size = size_on(Machine(), 100)
    assert size.halve(9)
    assert size.size == 4


def test_failed_allocations_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)  # more than any address space
    assert out_of_memory(raised.value)
    assert out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to")
    )
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert out_of_memory(MemoryError())
    for other in (RuntimeError("shape mismatch"), ValueError("memory"), KeyboardInterrupt(), UsageError("x")):
        assert not out_of_memory(other)


def test_numpys_failed_allocations_count_too() -> None:
    with pytest.raises(MemoryError) as raised:
        np.empty(2**55)
    assert out_of_memory(raised.value)


def test_the_machines_memory_is_told_in_bytes() -> None:
    memory = Memory(CPU)
    free, used = memory.free(), memory.used()
    if free is None or used is None:
        pytest.skip("this system does not tell")
    assert 2**20 < used < 2**45
    assert 2**20 < free < 2**50
    with mmap.mmap(-1, 2**27) as block:  # from the system, whatever the process keeps
        for page in range(0, 2**27, 2**12):
            block[page] = 1
        assert memory.peak() >= used + 2**26
