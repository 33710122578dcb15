"""How a chunk's clients are computed: one by one, or all at once under vmap.

Letters: C clients in the chunk. Replicas put an axis R before all but the data: sent [R, ...], inputs [R, C, ...].
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfl.base import Algorithm, Tree, tree_map
from vfl.chunks import out_of_memory
from vfl.data.container import Transform
from vfl.errors import ClientError
from vfl.local import Batches, Block
from vfl.reduce import Results, Sums, add
from vfl.task import Weight
from vfl.transforms import mapped


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
