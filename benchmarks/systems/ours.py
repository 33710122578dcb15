"""vfl as its README shows it: with its own choice of execution and chunk, and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import vfl
from algorithms.fedavg import FedAvg
from benchmarks.work import CLASSES, SIDE, Outcome, Work, examples, parameters, timed

COMPILED_CHUNK = {"softmax": 50, "mlp": 10, "cnn": 2}
"""Clients at once: a few megabytes of models, which stay in the caches."""


def compiled(model: str, work: Work) -> Outcome:
    """`run` with `execution="compile"`."""
    return run(model, work, execution="compile", chunk=min(COMPILED_CHUNK[model], work.clients))


def run(model: str, work: Work, **options: Any) -> Outcome:
    """FedAvg by `vfl.rounds`, under torchrun on all ranks."""
    module = vfl.models.model(model, (1, SIDE, SIDE), CLASSES)
    for tensor, values in zip(module.parameters(), parameters(model, work), strict=True):
        tensor.data.copy_(torch.from_numpy(values))
    task = vfl.task(module)
    x, y = examples(work)
    users = np.repeat(np.arange(work.clients), work.examples)
    clients, _ = vfl.data.from_arrays(x.reshape(-1, 1, SIDE, SIDE), y.reshape(-1), users)
    data = vfl.data.FederatedData("random", clients, None, None, None, CLASSES, vfl.data.cast)
    with vfl.launched(task.x.device) as ranks:
        stream = vfl.rounds(
            FedAvg(local_lr=work.lr), task, data, work.rounds, clients_per_round=work.clients, ranks=ranks,
            batch_size=work.batch, local_epochs=work.epochs, evaluation=vfl.Evaluation(every=0), **options,
        )  # fmt: skip
        seconds, (state, metrics) = timed(stream)
    trained = [p.numpy() for p in task.parameters(state.server.x).values()]
    return Outcome(seconds, trained, metrics["execution"], metrics["chunk"])
