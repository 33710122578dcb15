"""How a chunk's clients are computed: one by one, under vmap, or under vmap and compiled. C clients in the chunk."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import NamedTuple

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


class Compiler:
    """Compiled programs by chunk shape. Traced under vmap, where nothing can depend on a value; so none is guarded."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._programs: dict[Hashable, Callable[[Shared, Inputs], Results]] = {}

    def run(self, signature: Hashable, bounds: Bounds, shared: Shared, inputs: Inputs) -> Results:
        """All clients of the chunk at once, by the program for its shape, which the first such chunk compiles."""
        if signature not in self._programs:
            graph = make_fx(lambda s, i: by_vmap(self.problem, bounds, s, i))(shared, inputs)
            self._programs[signature] = torch.compile(graph, dynamic=False)
        return self._programs[signature](shared, inputs)


def chunk_signature(bounds: Bounds, shared: Shared, inputs: Inputs) -> Hashable:
    """What a compiled program is good for."""
    return bounds, *((leaf.shape, leaf.dtype) for leaf in leaves((shared.sent, inputs)))
