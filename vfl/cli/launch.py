"""`vfl run --ranks N`: the same command in N processes of this machine, looked after by the one that was called."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from vfl.cli.signals import first_signal
from vfl.errors import RankLostError, UsageError

CPUS = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
LAUNCHER = "VFL_LAUNCHER"  # the variable that tells a rank which process started it
RANK_LOST = 3  # exit code of a rank that ends because another one is gone, and of a run that lost one
INTERRUPTED = 128 + signal.SIGTERM
GRACE = 30.0  # seconds in which the others may end by themselves (say what was wrong, save) after a rank has failed
POLL = 0.02  # seconds


def rank_count(wanted: int | None, device: str) -> int:
    """How many ranks `--ranks` means, where None is `auto`: one for each GPU that the device option allows, else one
    for each core.

    Raises UsageError under another launcher, and for more ranks than GPUs: two ranks cannot share one.
    """
    if wanted == 1:
        return 1
    if "WORLD_SIZE" in os.environ:
        raise UsageError("--ranks starts ranks, but this process is itself a launcher's rank (WORLD_SIZE is set); "
                         "leave --ranks out under torchrun")  # fmt: skip
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if gpus and ":" in device:
        gpus = 1
    if wanted is None:
        return gpus or cores()
    if gpus and wanted > gpus:
        raise UsageError(f"--ranks {wanted} needs as many GPUs, and --device {device} means {gpus} here; take --ranks "
                         "auto, or --device cpu")  # fmt: skip
    return wanted


def cores() -> int:
    """Cores that this process may use; the hardware threads of a core are one, since arithmetic keeps them all busy."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    found = set()
    for cpu in os.sched_getaffinity(0):
        try:
            found.add((CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            found.add(str(cpu))
    return max(1, math.floor(min(len(found), _quota())))


def _quota() -> float:
    """Processors that a container may use at a time, by its share of their time."""
    with contextlib.suppress(OSError, ValueError):
        allowed, period = QUOTA.read_text().split()
        return int(allowed) / int(period)  # "max": no limit
    return math.inf


def launch(argv: Sequence[str], count: int) -> int:
    """`vfl run` with these arguments on `count` ranks; the exit code.

    A signal makes all ranks finish the round and save, however long that takes (torchrun would kill them after 30 s).
    When a rank fails, the others cannot go on: they get some time to end by themselves. No rank outlives this function.
    Raises RankLostError where a rank ended without having said why.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    # Where they find each other: a port that only this machine reaches.
    server = socket.create_server(("127.0.0.1", 0))
    port, fd = server.getsockname()[1], server.detach()
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=fd
    )
    with first_signal() as signalled:
        try:
            for rank in range(count):
                ranks.append(_start(argv, rank, count, store.port))
            ended = _wait(ranks, signalled)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        number = signalled()
    faults = [(rank, code) for rank, code in ended.items() if code not in (0, INTERRUPTED)]
    if not faults:
        return 128 + (number or signal.SIGTERM) if INTERRUPTED in ended.values() else 0
    rank, code = min(faults, key=lambda fault: fault[1] == RANK_LOST)  # the first, and no mere consequence
    if code == -signal.SIGTERM and number == signal.SIGINT:  # before there was a round to finish
        raise KeyboardInterrupt
    if code == -signal.SIGTERM and number:
        return 128 + number
    if code < 0:
        hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
        raise RankLostError(f"rank {rank} was ended by {signal.Signals(-code).name}{hint}; the run goes on from its "
                            "newest checkpoint with --resume")  # fmt: skip
    if rank and list(ended.values()) != [code] * count:  # what all ranks find, the first one says
        raise RankLostError(f"rank {rank} failed (exit code {code}), so the others could not go on")
    return code


def _start(argv: Sequence[str], rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "vfl", "run", *argv, "--ranks", "1"]
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores() // count)),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",  # the host's own name need not resolve
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),  # what can be imported here
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        LAUNCHER: str(os.getpid()),
    }  # fmt: skip
    # A terminal sends Ctrl-C to every process in it. What is blocked is inherited, so the ranks hear of it from this
    # process alone: once, and not while they cannot answer yet.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, env=environment)
    except OSError as error:
        raise UsageError(f"--ranks {count}: rank {rank} cannot be started ({error.strerror})") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], signalled: Callable[[], int | None]) -> dict[int, int]:
    """The ranks' exit codes, in the order in which they ended; without those that do not follow one that failed."""
    ended: dict[int, int] = {}
    told, deadline = False, math.inf
    while len(ended) < len(ranks) and time.monotonic() < deadline:
        if signalled() and not told:
            told = True
            for process in ranks:
                process.terminate()
        for rank, process in enumerate(ranks):
            if rank not in ended and (code := process.poll()) is not None:
                ended[rank] = code
                if code not in (0, INTERRUPTED):
                    deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(POLL)
    return ended


def follow_launcher() -> None:
    """In a rank: ends it in order when the process that started it is gone, as nobody else would."""
    launcher = int(os.environ.get(LAUNCHER, "0"))

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if launcher:
        threading.Thread(target=watch, daemon=True).start()
