"""A round on a GPU keeps its queue full: the host reads nothing back before the round's sums are there.

No GPU is needed: tensors on it are torch's fake ones, which have shapes and devices but no values, so that reading one,
mixing devices or a shape that depends on a value is an error. What kernels compute there is not tested by this.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ALGORITHMS, FEATURES, N, federated, make_task
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

import vfl
from algorithms.fedavg import FedAvg
from vfl.balance import Stopwatch
from vfl.chunks import Memory
from vfl.task import Aux
from vfl.wrappers import Context

GPU = torch.device("cuda", 0)
aten = torch.ops.aten


class WaitsError(Exception):
    """The host would wait for the GPU here."""


class PretendGpu(FakeTensorMode):
    """Tensors on a GPU without values, beside the host's real ones."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.strict, self.copies = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        onto = torch.device(kwargs.get("device") or "cpu")
        there = any(isinstance(leaf, FakeTensor) for leaf in given)
        moved = func is aten._to_copy.default and kwargs.get("device") is not None
        if moved and {given[0].device.type, onto.type} == {"cpu", "cuda"}:
            self.copies += 1
            if self.strict and not kwargs.get("non_blocking"):
                raise WaitsError(f"a copy to {onto}")
        if self.strict and there and func in (aten._local_scalar_dense.default, aten.equal.default):
            raise WaitsError(str(func))
        if there or onto.type == "cuda":
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


def getitem(x: torch.Tensor, index: Any) -> torch.Tensor:
    """`x[index]` by operators alone: torch's own asks for a CUDA build."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    dots = next(i for i, part in enumerate(parts) if part is Ellipsis)
    parts[dots : dots + 1] = [slice(None)] * (x.dim() - sum(part is not None for part in parts) + 1)
    at, tensors = 0, []
    for part in parts:
        if part is None:
            x, tensors = x.unsqueeze(at), [*tensors, None]
        elif isinstance(part, slice):
            x, tensors = aten.slice.Tensor(x, at, part.start, part.stop, part.step or 1), [*tensors, None]
        elif isinstance(part, torch.Tensor):
            tensors = [*tensors, part]
        else:
            x, at = x.select(at, part), at - 1
        at += 1
    return x if all(t is None for t in tensors) else aten.index.Tensor(x, tensors)


def setitem(x: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """`x[index] = value`, likewise."""
    aten.index_put_.default(x, [index], value)


@pytest.fixture
def gpu(monkeypatch):
    """The pretended GPU, on which `pin_memory`, memory and time are not asked for."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Memory, "free", lambda self: None)
    monkeypatch.setattr(Stopwatch, "_now", lambda self: None)
    copied = functools.partial(aten.clone.default, memory_format=torch.contiguous_format)
    replaced = {"__getitem__": getitem, "__setitem__": setitem, "contiguous": copied, "__invert__": aten.bitwise_not}
    for name, of_gpu in replaced.items():
        torchs = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *a, o=of_gpu, t=torchs: (o if x.is_cuda else t)(x, *a))
    with PretendGpu() as mode:
        yield mode


def least_squares(x: torch.Tensor, batch: vfl.Batch, buffers: tuple[()]) -> tuple[torch.Tensor, Aux]:
    """The gradient without autograd, which needs a CUDA build for tensors on a GPU."""
    left = torch.where(batch.mask, batch.x @ x[:-1] + x[-1] - batch.y, 0)
    n = batch.mask.sum()
    return torch.cat([left @ batch.x, left.sum()[None]]) / n.clamp(min=1), Aux(left.square().sum() / 2, n, ())


def task_on_gpu() -> vfl.Task:
    """A linear model."""
    return make_task(nn.Linear(FEATURES, 1))._replace(x=torch.zeros(FEATURES + 1, device=GPU), grad_fn=least_squares)


def engine_on_gpu(algorithm: Any, **options: Any) -> vfl.Engine:
    """Of three chunks a round."""
    task = task_on_gpu()
    if not isinstance(algorithm, vfl.Algorithm):
        algorithm = algorithm.build(task, N)
    options = {"clients_per_round": 6, "execution": "vmap", "chunk": 2, "work": vfl.Work(4, steps=2)} | options
    return vfl.Engine(algorithm, task, federated(), **options)


def first_wait(engine: vfl.Engine, gpu: PretendGpu) -> list[str]:
    """The functions of the first place in a round where the host waits, outermost first."""
    state = engine.init(0)
    gpu.strict = True
    with pytest.raises(WaitsError) as caught:
        engine.play(state)
    return [entry.name for entry in caught.traceback if entry.path.parent == Path(vfl.__file__).parent]


NAMES = ("fedavg", "fedavg-aggregator=geometric_median:iterations=3", "fednova", "scaffold-option=2", "diana", "ef21")


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("name", NAMES)
def test_a_round_waits_for_the_gpu_only_to_read_its_sums(name, place, gpu):
    assert first_wait(engine_on_gpu(ALGORITHMS[name], client_state=place), gpu) == ["play", "reduce"]
    assert gpu.copies > 10


@pytest.mark.parametrize("work", [{"reshuffle": "once"}, {"batch_size": None}, {"draw": "nice"}, {"draw": "multi"}])
def test_drawing_minibatches_waits_for_nothing(work, gpu):
    assert first_wait(engine_on_gpu(FedAvg(), work=vfl.Work(**{"batch_size": 3} | work)), gpu) == ["play", "reduce"]


def test_simulated_devices_wait_for_nothing(gpu):
    devices = vfl.Devices(device_speeds="classes:1,2.5,8", client_dropout=0.3)
    algorithm = devices.wrap(FedAvg().build(task_on_gpu(), N), task_on_gpu(), Context(N, 6, "uniform", 1, federated()))
    assert first_wait(engine_on_gpu(algorithm), gpu) == ["play", "reduce"]


def test_a_plain_copy_between_chunks_would_be_noticed(gpu, monkeypatch):
    monkeypatch.setattr("vfl.queue.on_device", lambda array, device: torch.from_numpy(array).to(device))
    assert first_wait(engine_on_gpu(FedAvg()), gpu)[-2:] == ["_drawn", "<genexpr>"]
