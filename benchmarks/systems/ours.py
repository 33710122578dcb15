"""vfl as its README shows it: with its own choice of execution and chunk, and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import vfl
from algorithms.fedavg import FedAvg
from benchmarks.systems.torch_loop import gpu_memory, models, tensors
from benchmarks.work import CHARACTERS, CLASSES, Outcome, Work, parameters, timed
from vfl.precision import tf32


def compiled(model: str, work: Work) -> Outcome:
    """`run` with `execution="compile"`."""
    return run(model, work, execution="compile")


def run(model: str, work: Work, **options: Any) -> Outcome:
    """FedAvg by `vfl.rounds`, under torchrun on all ranks."""
    module = models(model)
    for tensor, values in zip(module.parameters(), parameters(model, work), strict=True):
        tensor.data.copy_(torch.from_numpy(values))
    task = vfl.task(module, device=work.device)
    x, y = (values.flatten(0, 1) for values in tensors(work, model))
    users = np.repeat(np.arange(work.clients), work.examples)
    clients, _ = vfl.data.from_arrays(x, y, users)
    classes, transform = (CHARACTERS, vfl.data.as_stored) if model == "lstm" else (CLASSES, vfl.data.cast)
    data = vfl.data.FederatedData("random", clients, None, None, None, classes, transform)
    with vfl.launched(task.x.device) as ranks, tf32(work.tf32):
        stream = vfl.rounds(
            FedAvg(local_lr=work.lr), task, data, work.rounds, clients_per_round=work.clients, ranks=ranks,
            batch_size=work.batch, local_epochs=work.epochs, evaluation=vfl.Evaluation(every=0), **options,
        )  # fmt: skip
        seconds, (state, metrics) = timed(stream)
    trained = [p.cpu().numpy() for p in task.parameters(state.server.x).values()]
    return Outcome(seconds, trained, metrics["execution"], metrics["chunk"], gpu_memory(work))
