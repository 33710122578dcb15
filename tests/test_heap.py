"""Freed memory stays with the process, unless the user has said what should be done with it."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from vfl.heap import keep_freed_memory

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer"
)


class Info(ctypes.Structure):
    """glibc's struct mallinfo2."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def info() -> Info:
    """What the C library holds now."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Info
    return mallinfo2()


@pytest.fixture
def untouched(monkeypatch):
    """An environment that says nothing about memory."""
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)


@glibc
def test_freed_tensors_stay_in_the_heap(untouched):
    assert keep_freed_memory()
    mapped, blocks = info().hblkhd, [torch.ones(2**21) for _ in range(4)]  # 8 MiB each
    grown = info()
    assert grown.hblkhd == mapped, "no block is a mapping of its own"
    del blocks
    assert info().arena >= grown.arena, "nothing is given back"


def test_the_users_own_choice_is_left_alone(untouched, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert not keep_freed_memory()


@glibc
def test_an_engine_on_the_cpu_keeps_freed_memory(untouched):
    code = (
        "import vfl.executor as e; called = []; e.keep_freed_memory = lambda: called.append(1)\n"
        "import vfl; from algorithms.fedavg import FedAvg\n"
        "data = vfl.data.federated('synthetic:features=3', clients=2)\n"
        "vfl.Engine(FedAvg().build(t := vfl.task(vfl.models.model('softmax', (3,), data.classes)), 2), t, data,"
        " clients_per_round=2); assert called"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
