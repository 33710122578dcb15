"""How a chunk's clients are computed: one by one, under vmap, or under vmap and compiled. C clients in the chunk."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from vfl import random
from vfl.base import Algorithm, Message, Metrics, Tree, leaves, tree_map
from vfl.chunks import out_of_memory
from vfl.data.container import Transform
from vfl.errors import ClientError
from vfl.local import Batches


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
    factor: Tensor  # [C] its weight's factor from the sampler
    buffers: tuple[Tensor, ...]  # [C, ...] each


class Bounds(NamedTuple):
    """What a chunk's program is specialized to, beside the shapes."""

    shortest: int  # the fewest steps of its clients
    largest: int  # the most examples


class Problem(NamedTuple):
    """What is computed for a client."""

    algorithm: Algorithm
    transform: Transform
    dtype: torch.dtype


Results = tuple[Message, Tree, Metrics]


def one_client(problem: Problem, bounds: Bounds, shared: Shared, mine: Inputs) -> Results:
    """One client's round; under vmap, the chunk's."""
    batches = Batches(
        shared.x, shared.y, mine.rows, mine.mask, mine.steps, mine.start, mine.examples, random.fold_in(mine.key, 1),
        mine.buffers, bounds.shortest, bounds.largest, problem.transform, problem.dtype,
    )  # fmt: skip
    key = random.fold_in(mine.key, 2)
    message, client, metrics = problem.algorithm.client_update(shared.sent, mine.client, batches, key)
    return message._replace(weight=message.weight * mine.factor), client, metrics


def by_vmap(problem: Problem, bounds: Bounds, shared: Shared, inputs: Inputs) -> Results:
    """All clients of the chunk at once."""
    return torch.func.vmap(lambda mine: one_client(problem, bounds, shared, mine))(inputs)


def by_loop(problem: Problem, bounds: Bounds, shared: Shared, inputs: Inputs, ids: np.ndarray, round: int) -> Results:
    """The clients one after the other, unmapped: breakpoints, prints and stack traces work.

    Raises ClientError, which names the client.
    """
    results = []
    for c, i in enumerate(ids.tolist()):
        mine = tree_map(operator.itemgetter(c), inputs)
        with torch.random.fork_rng(devices=[mine.rows.device] if mine.rows.is_cuda else []):
            torch.manual_seed(int(mine.key) % 2**63)  # for models with random layers of their own
            try:
                results.append(one_client(problem, bounds, shared, mine))
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise ClientError(i, round, error) from error
    return tree_map(lambda *each: torch.stack([torch.as_tensor(e) for e in each]), *results)


class Program(NamedTuple):
    """A compiled chunk."""

    call: Callable[[Shared, Inputs], Results]
    nodes: int  # of its graph


class Compiler:
    """Compiled programs by chunk shape. Traced under vmap, where nothing can depend on a value; so none is guarded."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.seconds = 0.0  # spent on tracing and compiling
        self._programs: dict[Any, Program] = {}

    def has(self, bounds: Bounds, shared: Shared, inputs: Inputs) -> bool:
        """Whether a chunk like this has been traced already."""
        return _signature(bounds, shared, inputs) in self._programs

    def trace(self, bounds: Bounds, shared: Shared, inputs: Inputs) -> Program:
        """The program for chunks of this shape. It is traced here, and compiled when first called."""
        signature = _signature(bounds, shared, inputs)
        if signature not in self._programs:
            started = time.perf_counter()
            graph = make_fx(lambda s, i: by_vmap(self.problem, bounds, s, i))(shared, inputs)
            self.seconds += time.perf_counter() - started
            self._programs[signature] = Program(torch.compile(graph, dynamic=False), len(graph.graph.nodes))
        return self._programs[signature]

    def run(self, bounds: Bounds, shared: Shared, inputs: Inputs) -> Results:
        """All clients of the chunk at once, by the compiled program."""
        return self.trace(bounds, shared, inputs).call(shared, inputs)


def _signature(bounds: Bounds, shared: Shared, inputs: Inputs) -> Any:
    return bounds, *((leaf.shape, leaf.dtype) for leaf in leaves((shared.sent, inputs)))
