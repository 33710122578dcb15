"""FedJAX: its own federated averaging (`fedjax.algorithms.fed_avg`) with the jit backend, as in its EMNIST example."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
from fedjax.algorithms import fed_avg

from benchmarks.systems.jax_by_hand import from_torch, images, loss, to_torch
from benchmarks.work import Outcome, Work, parameters, timed


def run(model: str, work: Work) -> Outcome:
    """FedAvg; the model is the hand-written JAX one."""
    gradient = jax.grad(lambda params, batch, key: loss(params, batch["x"], batch["y"]))
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=work.batch, num_epochs=work.epochs)
    algorithm = fed_avg.federated_averaging(
        gradient, fedjax.optimizers.sgd(work.lr), fedjax.optimizers.sgd(1.0), batches
    )
    datasets = [fedjax.ClientDataset({"x": x, "y": y}) for x, y in zip(*images(work), strict=True)]

    initial = algorithm.init([jnp.asarray(a) for a in from_torch(parameters(model, work))])

    def rounds(state: Any) -> Iterator[Any]:
        for key in jax.random.split(jax.random.PRNGKey(work.seed), work.rounds):
            clients = list(zip(range(work.clients), datasets, jax.random.split(key, work.clients), strict=True))
            state, _ = algorithm.apply(state, clients)
            jax.block_until_ready(state.params)
            yield state.params

    seconds, params = timed(rounds(initial))
    return Outcome(seconds, to_torch(model, params))
