"""Clients' own models: how good each is on its client's data, and fine-tuning before that.

Letters: N clients, C of them at once, D parameters, K minibatches, B batch, E examples evaluated at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfl import random
from vfl.base import Algorithm, Model, Personal, Tree, leaves, tree_map
from vfl.chunks import out_of_memory
from vfl.data.container import Examples, Packed
from vfl.engine import Engine
from vfl.errors import UsageError
from vfl.evaluation import BATCH, PerClient, metric_names, spread
from vfl.local import Batches, Work, descend, minibatches
from vfl.optimizers import optimizer
from vfl.state import State
from vfl.store import Store
from vfl.task import Batch, Task
from vfl.wrappers import Context

AT_ONCE = 2**24  # entries of the models that are made together


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Before it is evaluated on a client, a model takes a few steps on that client's training examples."""

    fine_tune_steps: int = 0
    """Local steps on a client's own training examples before its model is evaluated on its data; 0: none."""
    fine_tune_lr: float = 0.1
    """Step size of fine-tuning."""
    fine_tune_optimizer: str = "sgd"
    """Optimizer of fine-tuning, fresh for each client (see local-optimizer for the names)."""

    def __post_init__(self) -> None:
        if self.fine_tune_steps < 0:
            raise UsageError(f"fine-tune-steps must be at least 0, not {self.fine_tune_steps}")
        if not (self.fine_tune_lr >= 0 and math.isfinite(self.fine_tune_lr)):
            raise UsageError(f"fine-tune-lr must be a finite number ≥ 0, not {self.fine_tune_lr}")
        optimizer(self.fine_tune_optimizer)

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The algorithm whose clients use fine-tuned models, their own if it has such, else the server's.

        Nothing of the training changes. Raises UsageError where the algorithm fine-tunes already.
        """
        if not self.fine_tune_steps:
            return algorithm
        before, opt = algorithm.personal, optimizer(self.fine_tune_optimizer, task.sizes)
        if before is not None and before.steps:
            raise UsageError("this algorithm fine-tunes its models already; fine-tune-steps must be 0")

        def model(server: Any, client: Tree, batches: Batches) -> Model:
            x, buffers = Model(server.x, batches.buffers) if before is None else before.model(server, client, batches)
            y, metrics = descend(task.grad_fn, x, batches._replace(buffers=buffers), opt, self.fine_tune_lr)
            return Model(y, metrics.buffers)

        return algorithm._replace(personal=Personal(model, self.fine_tune_steps))


def evaluate_personal(engine: Engine, state: State) -> dict[str, PerClient]:
    """Each metric's distribution over the clients, of each client's own model on its own examples.

    The examples are those held out of the client's data, else those it trains on. A client that has not taken part yet
    has the state that it would start with; one without examples does not count. Under several ranks each evaluates the
    clients whose state it holds. Raises UsageError for an algorithm without personal models.
    """
    personal, task, data, ranks = engine.algorithm.personal, engine.task, engine.data, engine.ranks
    if personal is None:
        raise UsageError("this algorithm has no personal models; evaluate_clients evaluates the server's model")
    if not isinstance(state.store, Store):
        raise ValueError("evaluate one replica at a time, state.replica(r)")
    own = data.clients if data.held_out is None else data.held_out
    names = metric_names(task, state.server.x, state.buffers, Examples(own.x, own.y), data.transform)
    sums = torch.zeros(len(names), own.population, dtype=torch.float64, device=engine.device)
    sizes, owners = own.sizes(), state.store.owners
    ids = np.flatnonzero(sizes)
    ids = ids[[owners.get(i, i) % ranks.world == ranks.rank for i in ids.tolist()]]
    ids = ids[np.argsort(-sizes[ids], kind="stable")]  # those evaluated together have about as many examples
    at_once = max(min(AT_ONCE // len(task.x), BATCH // 20), 1)  # and 20 examples of each at a time
    with torch.no_grad():
        for first in range(0, len(ids), at_once):
            now = ids[first : first + at_once]
            models, at = _models(personal, engine, state, state.store, now), torch.from_numpy(now).to(engine.device)
            for batch in _batches(engine, own, now):
                values = _each(lambda model, some: task.evaluate(model.x, some, model.buffers), models, batch)
                for row, name in zip(sums, names, strict=True):
                    row.index_add_(0, at, torch.where(batch.mask, values[name], 0).sum(1, dtype=torch.float64))
    per_client = ranks.all_reduce(sums).cpu().numpy()[:, sizes > 0] / sizes[sizes > 0]
    return {name: spread(name, row) for name, row in zip(names, per_client, strict=True)}


def _models(personal: Personal, engine: Engine, state: State, store: Store, ids: np.ndarray) -> Model:
    """The models of these clients, stacked: x [C, D], buffers [C, ...]."""
    clients, device = engine.data.clients, engine.device
    # A stream of its own, so that what is measured neither moves nor repeats what is trained.
    key = random.fold_in(random.fold_in(state.key, -2), state.round)
    keys = random.fold_in(key.expand(len(ids)), torch.from_numpy(ids)).to(device)
    work = Work(engine.work.batch_size, steps=max(personal.steps, 1))
    sizes = clients.sizes(ids)
    plan = minibatches(work, random.fold_in(keys, 0), clients.offsets[ids], sizes)
    starts, examples = (torch.from_numpy(a).to(device) for a in (clients.offsets[ids], sizes))

    def model(client: Tree, rows: Tensor, mask: Tensor, steps: Tensor, start: Tensor, n: Tensor, key: Tensor) -> Model:
        batches = Batches(
            engine.data_x, engine.data_y, rows, mask, steps, start, n, key, state.buffers, plan.shortest,
            int(sizes.max()), engine.data.transform, engine.dtype,
        )  # fmt: skip
        return personal.model(state.server, client, batches)

    states = store.gather(ids, device)
    return _each(model, states, plan.rows, plan.mask, plan.steps, starts, examples, random.fold_in(keys, 1))


def _batches(engine: Engine, own: Packed, ids: np.ndarray) -> Iterator[Batch]:
    """All examples of these clients, a minibatch [C, E] at a time."""
    start, size = (torch.from_numpy(a)[:, None] for a in (own.offsets[ids], own.sizes(ids)))  # [C, 1]
    length, most = max(BATCH // len(ids), 1), int(size.max())
    keys = torch.zeros(len(ids), dtype=torch.int64, device=engine.device)
    for begin in range(0, most, length):
        place = torch.arange(begin, min(begin + length, most))
        mask = place < size  # [C, E]
        rows = (start + place.where(mask, 0)).to(own.x.device)
        x = engine.data.transform(own.x[rows.flatten()].to(engine.device), engine.dtype).unflatten(0, rows.shape)
        yield Batch(x, own.y[rows].to(engine.device), mask.to(engine.device), keys)


def _each(function: Callable[..., Any], *stacked: Tree) -> Any:
    """The function of each client's part of the stacked trees, stacked: under vmap, or one by one if that fails."""
    try:
        return torch.func.vmap(function)(*stacked)
    except Exception as error:
        if out_of_memory(error):
            raise
        count = next(leaf.shape[0] for leaf in leaves(stacked))
        each = [function(*tree_map(operator.itemgetter(c), stacked)) for c in range(count)]
        return tree_map(lambda *parts: torch.stack(parts), *each)
