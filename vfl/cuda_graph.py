"""CUDA graphs: a compiled program's kernels recorded once, then launched all together; small models are all launches.

A recording reads and writes fixed places in memory. What stays the same, as the packed examples do, is read where it
lies; everything else is copied to its place before each replay, and the results are copied out after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UP = 3  # runs before a recording: libraries set themselves up in the first ones
AGREE = 1e-3  # relative to a result's largest entry; sums by atomic additions differ by rounding

Program = Callable[..., list[Tensor]]
Work = Callable[[], list[Tensor]]


class Recorder(NamedTuple):
    """What CUDA does for a recording."""

    warm_up: Callable[[Work], list[Tensor]]  # runs the work as often as a recording needs, and returns its results
    record: Callable[[Work], tuple[Callable[[], Any], list[Tensor]]]  # → what replays the work; where results will lie


def recorder(device: torch.device, cuda: Any = torch.cuda) -> Recorder:
    """Recordings on this GPU, in the order that torch's documentation of `torch.cuda.graph` asks for.

    All share one pool of memory: results are copied out before another one is replayed.
    """
    side, pool = cuda.Stream(device), cuda.graph_pool_handle()

    def warm_up(work: Work) -> list[Tensor]:
        side.wait_stream(cuda.current_stream(device))
        with cuda.stream(side):
            for _ in range(WARM_UP - 1):
                work()
            results = work()
        cuda.current_stream(device).wait_stream(side)
        return results

    def record(work: Work) -> tuple[Callable[[], Any], list[Tensor]]:
        graph = cuda.CUDAGraph()
        # A recording that fails leaves its own stream in force. Other threads, such as NCCL's, may go on meanwhile.
        with (
            cuda.stream(cuda.current_stream(device)),
            cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
        ):
            results = work()
        return graph.replay, results

    return Recorder(warm_up, record)


class Replay:
    """A program as a recording, for arguments of one shape. Each call's results are tensors of their own.

    `fixed` says which arguments are the same tensors in every call. Raises RuntimeError where CUDA cannot record the
    program, and where the recording gives other results than the program.
    """

    def __init__(
        self, program: Program, arguments: Sequence[Tensor], fixed: Sequence[bool], recorder: Recorder
    ) -> None:
        self._fixed = fixed
        self._places = [a if stays else a.clone() for a, stays in zip(arguments, fixed, strict=True)]
        wanted = recorder.warm_up(lambda: program(*self._places))
        self._replay, self._results = recorder.record(lambda: program(*self._places))
        if not all(_agree(a, b) for a, b in zip(self(*arguments), wanted, strict=True)):
            raise RuntimeError("a replay gives other results than the program")

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        for place, stays, now in zip(self._places, self._fixed, arguments, strict=True):
            if not stays:
                place.copy_(now)
            elif now is not place:
                raise ValueError("an argument that was to stay the same is another tensor")
        self._replay()
        return [result.clone() for result in self._results]


def _agree(a: Tensor, b: Tensor) -> bool:
    if not b.numel() or not b.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(a, b, rtol=0, atol=AGREE * scale, equal_nan=True)
