"""The ranks of one machine, which add through memory that they share.

A sum that goes through sockets takes, beside the copies, as long as the system needs to wake the one who waits: up to a
scheduler's tick of 4 ms, where a round may take 3. Here, a rank that waits looks for the others' numbers itself. Each
gives its own to a slot, all wait, each adds a part of all slots, all wait, and each takes the sums: to the bit the same
ones on every rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import select
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from vfl import native
from vfl.errors import RankLostError

SLOT = 2**20  # bytes a rank; longer sums are made slot by slot
LINE = 64  # bytes of a processor's cache that are its own
LOOKS = 2000  # at the others, before anything else may be done here: some tenths of a millisecond
PATIENCE = 5e-4  # seconds of looking all the time; whoever waits longer sleeps between looks
NAP = 5e-5  # seconds
NATIVE = native.Source(
    Path(__file__).with_suffix(".cpp"),
    {"meet": ("int64_t*", "int64_t", "int64_t", "int64_t", "int64_t", "int64_t*")},
)


class Neighbours:
    """All ranks of a run, of which this is one; `meet` makes them."""

    def __init__(
        self, rank: int, world: int, wait: Callable[..., None], memory: mmap.mmap, watched: dict[int, int]
    ) -> None:
        """What waits, the memory that they share, and descriptors of the other ranks' processes."""
        self.rank, self.world, self._wait, self._watched = rank, world, wait, watched
        self._lines = _head(memory, world)[1:]
        self._slots = torch.frombuffer(memory, dtype=torch.uint8, offset=_start(world)).view(world + 1, SLOT)
        self._stage, self._met = 0, ctypes.c_int64()
        self._ends = select.poll()
        for end in watched:
            self._ends.register(end, select.POLLIN)

    def all_reduce(self, flat: Tensor) -> None:
        """The sum over ranks, in place. Raises RuntimeError when another rank has left or ended."""
        slots = self._slots.view(flat.dtype)
        for piece in flat.view(-1).split(slots.shape[1]):
            n = len(piece)
            slots[self.rank, :n].copy_(piece)
            self._meet()
            mine = slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)
            torch.sum(slots[:-1, mine], 0, dtype=flat.dtype, out=slots[-1, mine])
            self._meet()
            piece.copy_(slots[-1, :n])

    def close(self) -> None:
        """This rank takes no part any more."""
        self._lines[self.rank, 1] = 1
        for end in self._watched:
            os.close(end)

    def _meet(self) -> None:
        """Waits until all ranks are here."""
        self._stage += 1
        if self._look(LOOKS):
            return
        started, nap = time.monotonic(), 0.0
        while not self._look(1 if nap else LOOKS):
            if (lost := self._lost()) is not None and not self._look(1):  # it may have left after this stage
                raise RuntimeError(f"rank {lost} has ended")
            if time.monotonic() > started + PATIENCE:
                nap = NAP
            time.sleep(nap)

    def _look(self, looks: int) -> bool:
        address = self._lines.ctypes.data
        self._wait(address, self.rank, self.world, self._stage, looks, ctypes.addressof(self._met))
        return bool(self._met.value)

    def _lost(self) -> int | None:
        """A rank that has left or ended."""
        left = np.flatnonzero(self._lines[:, 1])
        ended = [self._watched[end] for end, _ in self._ends.poll(0)]
        return next(iter([*left.tolist(), *ended]), None)


def meet(rank: int, world: int, store: Store) -> Neighbours | None:
    """The ranks that this store knows, if all are processes of this machine and can share memory; the same on each.

    Raises RankLostError where one of them has ended.
    """
    with contextlib.ExitStack() as held:
        wait = NATIVE.found("meet")
        try:
            os.close(os.pidfd_open(os.getpid()))
            memory = _made(world, store, held) if rank == 0 else _found(world, store)
        except (AttributeError, OSError, ValueError):  # another system, machine or container
            memory = None
        if rank == 0 and memory is None:
            store.set("memory", "")
        store.set(f"process {rank}", str(os.getpid()) if memory and wait else "")
        processes = [store.get(f"process {r}").decode() for r in range(world)]
    if memory is None or wait is None or not all(processes):
        return None
    try:
        watched = {os.pidfd_open(int(pid)): r for r, pid in enumerate(processes) if r != rank}
    except ProcessLookupError:
        raise RankLostError("another rank is gone (it ended before the first round)") from None
    return Neighbours(rank, world, wait, memory, watched)


def _made(world: int, store: Store, held: contextlib.ExitStack) -> mmap.mmap:
    """The memory, made by the first rank. It has no name and is gone with the last process that uses it."""
    fd, token = os.memfd_create("vfl"), secrets.randbits(62)
    held.callback(os.close, fd)  # when the others have opened it
    size = _start(world) + (world + 1) * SLOT
    os.ftruncate(fd, size)
    memory = mmap.mmap(fd, size)
    _head(memory, world)[0, 0] = token
    store.set("memory", f"{os.getpid()} {fd} {token}")
    return memory


def _found(world: int, store: Store) -> mmap.mmap:
    """The memory that the first rank has made. Raises OSError and ValueError where it is not to be seen from here."""
    pid, fd, token = map(int, store.get("memory").split())
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    try:
        memory = mmap.mmap(opened, _start(world) + (world + 1) * SLOT)
    finally:
        os.close(opened)
    if _head(memory, world)[0, 0] != token:
        raise ValueError("another machine's process has this number here")
    return memory


def _head(memory: mmap.mmap, world: int) -> np.ndarray:
    """What lies before the slots, in lines: int64 [1 + W, 8]; the token, then each rank's stage and whether it left."""
    return np.frombuffer(memory, np.int64, (world + 1) * LINE // 8).reshape(world + 1, LINE // 8)


def _start(world: int) -> int:
    """Where the slots begin."""
    return -(-(world + 1) * LINE // mmap.PAGESIZE) * mmap.PAGESIZE
