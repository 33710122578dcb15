"""Differential privacy of single examples: DP-SGD inside clients (Abadi et al. 1607.00133). D parameters, B batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import vmap

from vfl import random
from vfl.errors import UsageError
from vfl.privacy.central import NOISE
from vfl.task import Aux, Batch, Task, Weight


def private_gradients(task: Task, clip: float, noise_multiplier: float, batch_size: int | None = None) -> Task:
    """The task whose gradients are (Σ clipped gradients of the single examples + N(0, (zC)²)) / B (Algorithm 1).

    `clip` is C, `noise_multiplier` z. B is `batch_size`, or the minibatch's own number of examples, which then counts
    as public. Takes B × D numbers a client. The noise is a function of the minibatch's key: a method that computes two
    gradients on one minibatch, as MARINA, FRECON and Mime do, gets the same noise in both, which its differences then
    lack, and is refused (`Task.refuse_private`); nor is private what a method sends beside functions of these
    gradients, as q-FedAvg's losses and DGA's statistic. Raises UsageError for a model with buffers, whose batch
    statistics mix examples.

    Of a method with one gradient a minibatch, such as FedAvg, and draw epochs, each example is in one noisy sum an
    epoch: so many mechanisms, in which another example in its place changes the sum by 2C. That is what
    `vfl privacy --mechanism examples` accounts (`Plan.replaced`), toward one who sees every message of the client. As
    the minibatches of an epoch are no independent samples, nothing is claimed of their order's amplification.
    """
    if not (clip > 0 and math.isfinite(clip)):
        raise UsageError(f"example-clip must be a finite number > 0, not {clip}")
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise UsageError(f"example-noise must be a finite number ≥ 0, not {noise_multiplier}")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"the batch size of private gradients must be at least 1, not {batch_size}")
    refuse_buffers(task)

    def grad_fn(x: Tensor, batch: Batch, buffers: tuple[Tensor, ...]) -> tuple[Tensor, Aux]:
        def single(xj: Tensor, yj: Tensor, mask: Tensor, key: Tensor, weight: Weight) -> tuple[Tensor, Aux]:
            one = weight[None] if isinstance(weight, Tensor) else ()
            return task.grad_fn(x, Batch(xj[None], yj[None], mask[None], key, one), buffers)

        keys = random.split(batch.key, batch.mask.shape[-1])
        g, aux = vmap(single)(batch.x, batch.y, batch.mask, keys, batch.weight)  # [B, D]
        factor = clip / torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp(min=clip)
        total = torch.where(batch.mask[:, None], g * factor, 0).sum(0)
        drawn = random.normal(random.fold_in(batch.key, NOISE), x.shape, x.dtype)
        examples = aux.examples.sum(0)
        count = examples.clamp(min=1) if batch_size is None else batch_size
        return (total + noise_multiplier * clip * drawn) / count, Aux(aux.loss.sum(0), examples, buffers)

    return task._replace(grad_fn=grad_fn, private=True)


def refuse_buffers(task: Task) -> None:
    """Raises UsageError for a model with buffers: their mean over clients would go round without noise."""
    if task.buffers:
        raise UsageError(
            f"a private run cannot average the model's buffers ({task.buffer_names[0]}, ...), which get no noise; use "
            "a model without batch norm, such as resnet18:norm=group"
        )
