"""How a chunk's clients are computed: one by one, under vmap, or compiled.

Letters: C clients in the chunk. Replicas put an axis R before all but the data: sent [R, ...], inputs [R, C, ...].
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from vfl.base import Algorithm, Tree, tree_map
from vfl.chunks import out_of_memory
from vfl.cuda_graph import Program, Recorder, Replay
from vfl.data.container import Transform
from vfl.errors import ClientError, first_line
from vfl.leafwise import leafwise
from vfl.local import Batches, Block
from vfl.matmul import faster_products
from vfl.operators import Operators
from vfl.recording import record
from vfl.reduce import Results, Sums, add
from vfl.task import Weight
from vfl.transforms import mapped

log = logging.getLogger("vfl")


class Shared(NamedTuple):
    """What all clients of a round read."""

    sent: Tree  # the broadcast's content
    x: Tensor  # [M, ...] the packed inputs
    y: Tensor  # [M, ...] the packed targets


class Inputs(NamedTuple):
    """What each client of a chunk brings."""

    client: Tree  # its state [C, ...]
    rows: Tensor  # [C, K, B] int64 its minibatches
    mask: Tensor  # [C, K, B] bool
    steps: Tensor  # [C] int64
    start: Tensor  # [C] int64
    examples: Tensor  # [C] int64
    key: Tensor  # [C]
    update_key: Tensor  # [C] made of it: for what its update draws,
    batches_key: Tensor  # [C] for its passes over all of its examples,
    minibatch_keys: Tensor  # [C, K] and for each of its minibatches
    factor: Tensor  # [C] its weight's factor from the sampler
    buffers: tuple[Tensor, ...]  # [C, ...] each
    weight: Weight = ()  # [C, K, B] its minibatches'
    block: Block = ()  # [C, B, ...] its examples, where every minibatch is all of them


class Bounds(NamedTuple):
    """What a chunk's program is specialized to, beside the shapes."""

    shortest: int  # the fewest steps of its clients
    largest: int  # the most examples


class Problem(NamedTuple):
    """What is computed for a client."""

    algorithm: Algorithm
    transform: Transform
    dtype: torch.dtype
    sizes: list[int]  # of the model's parameters
    drop: bool  # whether clients with NaN are left out
    replicas: int | None = None  # R; None: one experiment, without that axis


class Added(NamedTuple):
    """What a chunk leaves."""

    sums: Sums  # with its messages added
    report: Tensor  # [C, len(REPORT)]
    clients: Tree  # new client states [C, ...]
    messages: Tree  # their payloads [C, ...] and weights [C] where the algorithm combines them itself, else ()


def one_client(problem: Problem, bounds: Bounds, shared: Shared, mine: Inputs) -> Results:
    """One client's round; under vmap, the chunk's."""
    batches = Batches(
        shared.x, shared.y, mine.rows, mine.mask, mine.steps, mine.start, mine.examples, mine.batches_key,
        mine.buffers, bounds.shortest, bounds.largest, problem.transform, problem.dtype,
        mine.weight, mine.block, mine.minibatch_keys,
    )  # fmt: skip
    message, client, metrics = problem.algorithm.client_update(shared.sent, mine.client, batches, mine.update_key)
    if problem.algorithm.receive is not None:
        message = problem.algorithm.receive(message)
    return message._replace(weight=message.weight * mine.factor), client, metrics


def by_vmap(problem: Problem, bounds: Bounds, shared: Shared, inputs: Inputs) -> Results:
    """All clients of the chunk at once, and all replicas."""
    if problem.replicas is not None:
        alone = problem._replace(replicas=None)
        return mapped(
            lambda both: by_vmap(alone, bounds, shared._replace(sent=both[0]), both[1]), (shared.sent, inputs),
            problem.replicas,
        )  # fmt: skip
    return mapped(lambda mine: one_client(problem, bounds, shared, mine), inputs, len(inputs.steps))


def by_loop(problem: Problem, bounds: Bounds, shared: Shared, inputs: Inputs, ids: np.ndarray, round: int) -> Results:
    """The clients one after the other, unmapped: breakpoints, prints and stack traces work.

    `ids` [C] or [R, C] are the clients'. Raises ClientError, which names the client.
    """
    if problem.replicas is not None:
        alone = problem._replace(replicas=None)
        each = []
        for r in range(problem.replicas):
            sent, mine = tree_map(operator.itemgetter(r), (shared.sent, inputs))
            each.append(by_loop(alone, bounds, shared._replace(sent=sent), mine, ids[r], round))
        return tree_map(lambda *leaves: torch.stack(leaves), *each)
    results = []
    for c, i in enumerate(ids.tolist()):
        mine = tree_map(operator.itemgetter(c), inputs)
        with _seeded(mine.key):  # for models with random layers of their own
            try:
                results.append(one_client(problem, bounds, shared, mine))
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise ClientError(i, round, error) from error
    if len(results) == 1:
        return tree_map(lambda leaf: torch.as_tensor(leaf)[None], results[0])
    return tree_map(lambda *each: torch.stack([torch.as_tensor(e) for e in each]), *results)


@contextlib.contextmanager
def _seeded(key: Tensor) -> Iterator[None]:
    """Torch's own random numbers from a key []; they go on as before afterwards."""
    # torch.manual_seed would do, but it also records a stack trace for devices that are not in use: a millisecond.
    generators = [torch.default_generator]
    if key.is_cuda:
        generators.append(torch.cuda.default_generators[key.device.index])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(int(key) % 2**63)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def add_all(problem: Problem, sums: Sums, results: Results, *, fused: bool = False) -> tuple[Sums, Tensor]:
    """The sums with the chunk's results added, and the reports [C, ...]; both [R, ...] with replicas."""
    if problem.replicas is None:
        return add(sums, results, problem.drop, fused)
    return torch.func.vmap(lambda s, r: add(s, r, problem.drop, fused))(sums, results)


def kept(problem: Problem, results: Results) -> Tree:
    """What is kept of the chunk's messages until the cohort is complete."""
    message = results[0]
    return (message.payload, message.weight) if problem.algorithm.combine is not None else ()


Build = Callable[[Program, list[Tensor], list[int]], Program]
"""(a chunk's work, inputs of its shapes, the sizes of the model's parameters) → a faster program for such inputs."""


class Made(NamedTuple):
    """A chunk's whole work as a program: clients, weighted sums and reports."""

    call: Program  # of the leaves of Shared, Inputs and Sums
    result: Any  # the structure of what it gives, an Added


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
        common, mine, total = pytree.tree_leaves(shared), pytree.tree_leaves(inputs), pytree.tree_leaves(sums)
        added = []
        alone = chunk == inputs.rows.shape[-3]
        for part in [mine] if alone else zip(*(leaf.split(chunk) for leaf in mine), strict=True):
            flat = [*common, *part, *total]
            if signature not in self._programs:
                fixed = [leaf is shared.x or leaf is shared.y for leaf in flat]
                arguments = pytree.tree_structure((shared, inputs, sums))
                self._programs[signature] = self._make(bounds, flat, fixed, arguments, most)
            program = self._programs[signature]
            done = program.call(*flat)
            added.append(cast("Added", pytree.tree_unflatten(done, program.result)))
            total = done[: len(total)]  # the sums come first in Added
        return added

    def _make(self, bounds: Bounds, flat: list[Tensor], fixed: list[bool], arguments: Any, most: int | None) -> Made:
        flat = _told_apart(flat)
        if self._recorder:  # whose places are dense
            flat = [leaf.contiguous() for leaf in flat]
        result: list[Any] = []

        def program(*flat: Tensor) -> list[Tensor]:
            with Operators(most):
                return traced(*flat)

        def traced(*flat: Tensor) -> list[Tensor]:
            shared, inputs, sums = pytree.tree_unflatten(flat, arguments)
            if inputs.key.shape == (1,):  # a lone client's matrix products are plain ones
                mine = tree_map(operator.itemgetter(0), inputs)
                results = tree_map(lambda leaf: leaf[None], one_client(self.problem, bounds, shared, mine))
            else:
                results = by_vmap(self.problem, bounds, shared, inputs)
            added = Added(*add_all(self.problem, sums, results, fused=True), results[1], kept(self.problem, results))
            done, structure = pytree.tree_flatten(added)
            result[:] = [structure]
            return done

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
