"""The ranks of a run and what they do together: the one all-reduce a round."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from vfl.chunks import out_of_memory
from vfl.errors import RankLostError, UsageError
from vfl.neighbours import Neighbours, meet


class Ranks(NamedTuple):
    """This process among all of the run's. Its collectives raise RankLostError when another one is gone."""

    rank: int = 0
    world: int = 1
    near: Neighbours | None = None  # all of them, where they share memory

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks to the terminal."""
        return self.rank == 0

    def all_reduce(self, flat: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            with _together():
                (dist if self.near is None else self.near).all_reduce(flat)
        return flat

    def exchange(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """parts[r], flat, goes to rank r; from rank r come sizes[r] entries. All of one dtype."""
        if self.world == 1:
            return parts
        sent = torch.cat(parts)
        received = sent.new_empty(sum(sizes))
        with _together():
            dist.all_to_all_single(received, sent, sizes, [len(part) for part in parts])
        return list(received.split(sizes))

    def gather(self, rows: Tensor, device: torch.device) -> list[Tensor]:
        """Every rank's rows [R, ...], on the host of the first rank; empty on the others. `device` is the ranks'."""
        if self.world == 1:
            return [rows.cpu()]
        count = torch.tensor([len(rows)], device=device)
        counts = [torch.zeros_like(count) for _ in range(self.world)]
        with _together():
            dist.all_gather(counts, count)
            if not self.first:
                dist.send(rows.to(device).contiguous(), 0)
                return []
            received = [rows.cpu()]
            for rank, n in enumerate(counts[1:], 1):
                part = torch.empty((int(n), *rows.shape[1:]), dtype=rows.dtype, device=device)
                dist.recv(part, rank)
                received.append(part.cpu())
            return received

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            with _together():
                dist.barrier()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # What torch raises differs between backends and versions; but a collective of tensors that are alike on every
        # rank has one way to fail.
        if out_of_memory(error):
            raise
        said = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip())  # without the place in torch's source
        first = re.split(r"\.\s|\n", said)[0]
        raise RankLostError(f"another rank is gone ({first})") from error


def local_rank() -> int:
    """This process's number on its machine, by the launcher's variable; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[Ranks]:
    """The ranks that `--ranks` or torchrun (or SLURM with its variables) started; a run of its own without them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    store, rank, world = next(rendezvous("env://"))
    # torchrun's store may outlive an attempt, and then the addresses in it are those of dead ranks.
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    fresh = dist.PrefixStore(attempt, store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=fresh, rank=rank, world_size=world)
    near = meet(rank, world, fresh) if device.type == "cpu" else None
    try:
        yield Ranks(rank, world, near)
    finally:
        if near is not None:
            near.close()
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """The device that `auto | cpu | cuda | cuda:1` means for this rank. Raises UsageError where there is none such."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:1, not {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    _, colon, index = name.partition(":")
    number = int(index) if colon else local_rank() % max(count, 1)
    if number >= count:
        found = f"the {count} here have the numbers 0 to {count - 1}" if count else "torch finds no GPU here"
        raise UsageError(f"device {name!r} cannot be used: {found}; `--device auto` takes what there is")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
