"""How many clients run at once: a number, or found by growing until memory or speed says stop."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path

import torch

from vfl.errors import UsageError

log = logging.getLogger("vfl")

MEMORY_SHARE = 0.5  # of the free memory, the most a chunk may be expected to take
SHORT = 3  # so many chunks without a full one end the growth
FIRST = (16, 2**25)  # the first chunk on a CPU: so many clients, or bytes of them
WORTH = 1.05  # a doubled chunk must be this much faster to be kept
HEAVY = 0.01  # seconds of a client's step beside which calls cost nothing on a CPU, so that more clients bring nothing;
COLD = 10  # so many times that in the first chunk, which warms up


def parse_chunk(text: str | int | None) -> int | None:
    """`auto` (None) or a count of at least 1."""
    if text is None or text == "auto":
        return None
    with contextlib.suppress(ValueError):
        if int(str(text)) >= 1:  # int alone would cut 2.5 down to 2
            return int(text)
    raise UsageError(f"chunk must be 'auto' or a whole number of clients from 1, not {text!r}")


class Memory:
    """What is free and what is used on a device, in bytes; None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int | None:
        """Bytes that can still be taken."""
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + cached
        found = [_read("/proc/meminfo", "MemAvailable:", 1024)]
        limit, used = _cgroup("memory.max"), _cgroup("memory.current")
        if limit is not None and used is not None:
            found.append(limit - used)
        known = [f for f in found if f is not None]
        return min(known) if known else None

    def used(self) -> int | None:
        """Bytes in use now; starts a new measurement of the peak on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return _read("/proc/self/status", "VmRSS:", 1024)

    def peak(self) -> int | None:
        """The most bytes ever in use (on a GPU, since `used`)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the kernels of the measured chunk must have run
            return torch.cuda.max_memory_allocated(self.device)
        return _read("/proc/self/status", "VmHWM:", 1024)


class ChunkSize:
    """The chunk size in force; `auto` starts small and doubles while memory allows it and it pays.

    On a CPU clients with large models start as few: together they would leave the caches, and a short run would be over
    before that is found.
    """

    def __init__(self, wanted: int | None, client_bytes: int, device: torch.device) -> None:
        self.memory = Memory(device)
        self.settled = wanted is not None
        free = self.memory.free()
        most = FIRST[1] if device.type == "cpu" else math.inf
        if free is not None:
            most = min(most, MEMORY_SHARE * free)
        first = int(min(max(most / client_bytes, 1), FIRST[0]))
        self.size = wanted or first
        self._equal = 2**63  # clients in a chunk of the last equal ones
        self._short = 0  # chunks since the last full one
        self._best = (0.0, self.size)  # (local steps a second, size)
        self._most_seconds = HEAVY if device.type == "cpu" else math.inf

    @property
    def warm(self) -> bool:
        """Whether chunks have been timed."""
        return self._best[0] > 0

    def take(self, alike: int, size: int | None = None) -> int:
        """How many of the next clients, of which `alike` are alike, form the next chunk; of `size` if that is given."""
        if size is None and not self.settled:
            return min(self.size, alike)
        most = size or self.size
        if size is not None:  # programs are for one shape: equal chunks, as large as the last ones if that can be
            for clients in (self._equal, *range(min(most, alike), most // 2, -1)):
                if clients <= most and alike % clients == 0:
                    self._equal = clients
                    return clients
        chunks = -(-alike // most)
        return -(-alike // chunks)  # nearly equal chunks rather than full ones and a rest

    def report(self, clients: int, steps: int, seconds: float, before: int | None) -> None:
        """Learns from a finished chunk; `before` is the memory in use when it started."""
        if self.settled:
            return
        rate, step = steps / seconds, seconds / steps
        if step > self._most_seconds:
            if self.warm or step > COLD * self._most_seconds:
                self._settle(self._best[1] if rate < WORTH * self._best[0] else clients)
            else:
                self._best = (rate, clients)  # warmed up, as many show whether they are as slow again
            return
        if clients < self.size:  # the cohorts may never fill it
            if clients > self._best[1] and rate < self._best[0]:
                self._settle(self._best[1])
                return
            self._short += 1
            if self._short == SHORT:
                self._settle(self.size)
            return
        self._short = 0
        if rate < WORTH * self._best[0]:
            self._settle(self._best[1])
            return
        self._best = (rate, clients)
        free, peak = self.memory.free(), self.memory.peak()
        if free is not None and peak is not None and before is not None:
            # The peak may be an older one: then this overstates what a client takes, and growth stops early.
            each = max(peak - before, 0) / clients
            if 2 * clients * each > MEMORY_SHARE * free:
                self._settle(clients)
                return
        self.size = 2 * clients

    def keep(self, size: int) -> None:
        """Takes a size that an earlier run has found."""
        if not self.settled:
            self.size, self.settled = size, True

    def halve(self, clients: int) -> bool:
        """After running out of memory with so many clients: False when there is nothing left to halve."""
        if clients <= 1:
            return False
        self.size, self.settled = clients // 2, True
        log.warning("out of memory with %d clients at once; going on with %d", clients, self.size)
        if self.memory.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _settle(self, size: int) -> None:
        self.size, self.settled = size, True
        log.info("chunk auto: %d clients at once", size)


def cache_bytes() -> int:
    """The second-level cache of a core, where the system tells; else what is common."""
    size = ""
    with contextlib.suppress(OSError):
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
    units = {"K": 2**10, "M": 2**20}
    return int(size[:-1]) * units[size[-1]] if size and size[-1] in units else 2**20


def out_of_memory(error: BaseException) -> bool:
    """Whether this is an allocation that failed, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _read(path: str, label: str, unit: int) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(label):
                return int(line.split()[1]) * unit
    return None


def _cgroup(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((Path("/sys/fs/cgroup") / name).read_text())  # "max" means no limit
    return None
