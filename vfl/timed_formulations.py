"""Which of the `FORMULATIONS` of a convolution is the fastest here: each shape is timed once on a machine.

Letters as in `vfl.formulations`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from vfl import choices
from vfl.formulations import FORMULATIONS, Geometry, Product

log = logging.getLogger("vfl")

KIND = "convolutions"
FEWEST, MOST = 2, 8  # clients that are timed: what is fastest for so many is so for more
WORK = 2**31  # multiplications to time: large convolutions are timed with fewer clients
TRIES = 3  # timings after one that warms up
HOPELESS = 3.0  # who needs so many times the best time to warm up is not timed


class Case(NamedTuple):
    """What timings are good for."""

    which: Product
    geometry: Geometry
    a: tuple[int, ...]  # the first factor's shape
    b: tuple[int, ...]
    bias: bool
    dtype: torch.dtype
    device: torch.device
    threads: int

    @property
    def name(self) -> str:
        """The same as text, with the machine."""
        numbers = " ".join(f"{name}={value}" for name, value in vars(self.geometry).items())
        shapes = f"{[*self.a]} {[*self.b]}{' with bias' * self.bias} {self.dtype}"
        return f"{self.which} {shapes} {numbers} on {choices.machine(self.device)}".replace("torch.", "")


def fastest(which: Product, geometry: Geometry, a: Tensor, b: Tensor, bias: Tensor | None) -> str:
    """The name of the formulation to take for such factors, of C clients each."""
    if isinstance(a, FakeTensor):  # a program that is made without data: there is nothing to time
        return "each" if a.device.type == "cpu" else "grouped"
    return _fastest(
        Case(which, geometry, a.shape, b.shape, bias is not None, a.dtype, a.device, torch.get_num_threads())
    )


@functools.cache
def _fastest(case: Case) -> str:
    """By timings of this run or an earlier one, perhaps of fewer clients."""
    if case.a[0] == 1:
        return "each"
    # Each output is I/G · k products, and the derivatives take as many.
    w = case.a[2] * case.b[2] // case.geometry.groups * math.prod(case.geometry.kernel)
    w = w if case.which == "weights" else math.prod(case.b[1:])
    each = case.a[1] * math.prod(case.geometry.outputs) * w
    few = min(case.a[0], max(FEWEST, min(WORK // max(each, 1), MOST)))
    case = case._replace(a=(few, *case.a[1:]), b=(few, *case.b[1:]))
    return choices.fastest(KIND, case.name, FORMULATIONS, lambda: _measure(case))


def _measure(case: Case) -> dict[str, float]:
    """Seconds of every formulation that can compute the case."""
    seconds: dict[str, float] = {}
    with disable_proxy_modes_tracing():  # a program that is being traced is not to repeat this
        a, b = (torch.ones(shape, dtype=case.dtype, device=case.device) for shape in (case.a, case.b))
        bias = b.flatten(2)[:, :, 0] if case.bias else None
        for name, formulation in FORMULATIONS.items():
            best = min(seconds.values(), default=math.inf)
            try:
                seconds[name] = _seconds(
                    lambda by=formulation: by.product(case.which, case.geometry, a, b, bias), case.device, best
                )
            except RuntimeError as error:
                if name == "each":
                    raise
                log.info("convolution %s cannot be used here (%s)", name, str(error).strip().splitlines()[0])
    return seconds


def _seconds(call: Callable[[], Tensor], device: torch.device, best: float) -> float:
    """The least time of a few calls; of one where that is far above the best."""
    clock = choices.clock(device)
    times: list[float] = []
    while len(times) <= TRIES and not (times and times[0] > HOPELESS * best):
        _wait(device)
        started = clock()
        call()
        _wait(device)
        times.append(clock() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
