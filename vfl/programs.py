"""A chunk's whole work as a program, made for its shape: the operators recorded and replayed, or compiled.

Letters: C clients in the chunk. Replicas put an axis R before all but the data.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vfl.base import filled, leaves, tree_map
from vfl.chunks import out_of_memory
from vfl.cuda_graph import Program, Recorder, Replay
from vfl.errors import first_line
from vfl.execute import Added, Bounds, Inputs, Problem, Shared, add_all, by_vmap, kept, one_client
from vfl.leafwise import leafwise
from vfl.matmul import faster_products
from vfl.operators import Operators
from vfl.recording import record
from vfl.reduce import Sums

log = logging.getLogger("vfl")

_LEAF = torch.empty(0)

Build = Callable[[Program, list[Tensor], list[int]], Program]
"""(a chunk's work, inputs of its shapes, the sizes of the model's parameters) → a faster program for such inputs."""


class Made(NamedTuple):
    """A chunk's whole work as a program: clients, weighted sums and reports."""

    call: Program  # of the leaves of Shared, Inputs and Sums
    result: Added  # of what it gives, the form alone


class Programs:
    """Programs by chunk shape, each of them made by `build` when the first chunk of its shape comes.

    Nothing in a program can depend on a value, which vmap has shown before, so a program guards nothing. Where a
    `recorder` can be made, programs are replayed as CUDA graphs.
    """

    def __init__(self, problem: Problem, build: Build, recorder: Callable[[], Recorder] | None = None) -> None:
        self.problem, self.build, self._recorder = problem, build, recorder and functools.cache(recorder)
        self._programs: dict[Hashable, Made] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def forget(self) -> None:
        """Lets go of all programs, whose recordings hold memory."""
        self._programs.clear()

    def run(
        self,
        signature: Hashable,
        bounds: Bounds,
        shared: Shared,
        inputs: Inputs,
        sums: Sums,
        most: int | None,
        chunk: int,
    ) -> list[Added]:
        """The clients by the program for chunks of this size, which the first of their shape makes.

        One chunk after the other goes through it, which costs the host but a call; each leaves its own.
        Raises TooManyOperatorsError where the program would take more than `most` operators.
        """
        common, mine, total = leaves(shared), leaves(inputs), leaves(sums)
        added, chunks = [], inputs.rows.shape[-3] // chunk
        for part in [mine] if chunks == 1 else zip(*(leaf.chunk(chunks) for leaf in mine), strict=True):
            flat = [*common, *part, *total]
            if signature not in self._programs:
                fixed = [leaf is shared.x or leaf is shared.y for leaf in flat]
                arguments = _form((shared, inputs, sums))
                self._programs[signature] = self._make(bounds, flat, fixed, arguments, most)
            program = self._programs[signature]
            done = program.call(*flat)
            added.append(filled(program.result, done))
            total = done[: len(total)]  # the sums come first in Added
        return added

    def _make(self, bounds: Bounds, flat: list[Tensor], fixed: list[bool], arguments: Any, most: int | None) -> Made:
        flat = _told_apart(flat)
        if self._recorder:  # whose places are dense
            flat = [leaf.contiguous() for leaf in flat]
        result: list[Added] = []

        def program(*flat: Tensor) -> list[Tensor]:
            with Operators(most):
                return traced(*flat)

        def traced(*flat: Tensor) -> list[Tensor]:
            shared, inputs, sums = filled(arguments, flat)
            if inputs.key.shape == (1,):  # a lone client's matrix products are plain ones
                mine = tree_map(operator.itemgetter(0), inputs)
                results = tree_map(lambda leaf: leaf[None], one_client(self.problem, bounds, shared, mine))
            else:
                results = by_vmap(self.problem, bounds, shared, inputs)
            fused = self.build is compiled
            added = Added(*add_all(self.problem, sums, results, fused=fused), results[1], kept(self.problem, results))
            result[:] = [_form(added)]
            return leaves(added)

        made = self.build(program, flat, self.problem.sizes)
        return Made(self._recorded(made, flat, fixed), result[0])

    def _recorded(self, program: Program, flat: list[Tensor], fixed: list[bool]) -> Program:
        """The program as a CUDA graph, where there are such and it can be one."""
        if self._recorder is None:
            return program
        try:
            return Replay(program, flat, fixed, self._recorder())
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            log.warning("CUDA graphs fail here, so compiled programs run kernel by kernel (%s)", first_line(error))
            self._recorder = None
            return lambda *now: program(*(leaf.contiguous() for leaf in now))


def _form(tree: Any) -> Any:
    """The tree with nothing in it: what `filled` fills."""
    return tree_map(lambda _: _LEAF, tree)


def _told_apart(inputs: list[Tensor]) -> list[Tensor]:
    """The inputs of which no two are one tensor: a trace would take them for one for good, later values included."""
    first: set[int] = set()
    return [leaf.clone() if id(leaf) in first or first.add(id(leaf)) else leaf for leaf in inputs]


def trace(work: Program, inputs: list[Tensor], sizes: list[int]) -> Program:
    """The operators one after the other, without what vmap and autograd do between them."""
    graph, results = record(work, inputs)
    graph, recorded = faster_products(leafwise(graph, sizes), inputs), [results]

    def program(*inputs: Tensor) -> list[Tensor]:
        if recorded:  # the first call is for the same inputs
            return recorded.pop()
        with torch.enable_grad():  # as when it was recorded: oneDNN keeps nothing for a gradient without
            return graph(*inputs)

    return program


def compiled(work: Program, inputs: list[Tensor], sizes: list[int]) -> Program:
    """The operators fused, as machine code."""
    return compile_graph(faster_products(leafwise(make_fx(work)(*inputs), sizes), inputs, lowered=True), inputs)


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
    """The graph as machine code for inputs of these shapes, which torch keeps on disk for other processes."""
    # These take a second, which only those who compile should wait.
    from torch._inductor import compile, config
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without an environment for symbolic shapes, of which there are none here, torch keeps nothing. Not every version
    # tells apart what it keeps for other numbers of threads, but all tell other options apart.
    shapes = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with tracing(TracingContext(shapes)), config.patch({"cpp.threads": torch.get_num_threads()}):
        return cast("Callable[..., list[Tensor]]", compile(graph, [*inputs]))
