"""FedLabels: pseudo-labels by the global or the local model (Cho et al., arXiv 2307.08809; FLUTE, arXiv 2203.13789).

Of a client's n examples ⌈f n⌉ are labelled, the same in every round; the labels of the others are not used.
Client: from the model x that it is sent,
    supervised: w ← x, then K steps, on the loss of the labelled examples of each minibatch;
    unsupervised: u ← x, then K steps on the others. Of the softmaxes at x and at w, for each example, the one with the
    larger variance s² over the classes gives the label ŷ, kept if its probability is above a threshold. A step descends
        the loss of u on (ã, ŷ), mean over those kept,
        + λ s² KL(softmax w(a) ‖ softmax u(a)), mean over those of them whose likeliest class is the same at x and at w,
        + μ/2 ‖u − x‖²,
    with a the input and ã an augmented view of it. A minibatch with nothing to learn from changes nothing.
Server: x ← ServerOpt(x, −Δ, γ), Δ = ½ mean (w − x) + ½ Σ m (u − x) / Σ m, with m a client's number of pseudo-labels in
its K steps. Without any in the cohort, Δ = mean (w − x).

In FLUTE both trainings draw minibatches of their own, from the labelled and from the other examples; here both share
those that the engine draws. Its views are RandAugment's; here images are shifted and mirrored, and noise is added to
inputs of any shape. Its ℓ₂ is the mean square of each parameter tensor, which weighs layers unequally. There a client
without any pseudo-label counts as one with a single one, so that before there are any, half of each step is lost.
The module's buffers (batch norm) are those of the supervised models.
DP-SGD (private gradients) does not make it private: m, what is kept and the divergence see examples as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

import vfl
from algorithms.fedavg import Server

_LAST = 2**63 - 1  # of int64
_VIEWS = 0xF1AB  # a stream of a minibatch's key that no layer uses
_NEVER = 2.0  # no probability is above it

Buffers = tuple[Tensor, ...]


class Sent(NamedTuple):
    """What the server sends."""

    model: vfl.ModelAndRate
    threshold: Tensor  # [] of pseudo-labels; it follows from the round, so it is not counted as sent


class Payload(NamedTuple):
    """What a client sends. m is over the client's weight, so that in the cohort's sums it counts as it is."""

    supervised: Tensor  # [D] w − x
    unsupervised: Tensor  # [D] m (u − x)
    labels: Tensor  # [] m


class Targets(NamedTuple):
    """What the two teachers make of a minibatch."""

    label: Tensor  # [B] int64 ŷ
    kept: Tensor  # [B] bool
    agreed: Tensor  # [B] bool: kept, and the likeliest class is the same for both
    variance: Tensor  # [B] s²
    p: Tensor  # [B, classes] the supervised model's softmax


@dataclass(frozen=True, kw_only=True)
class FedLabels(vfl.LocalTraining):
    """FedLabels: pseudo-labels where labels are few (Cho et al., 2307.08809)."""

    labelled: float = 0.1
    """Share f in (0, 1] of each client's examples that are labelled; their number is rounded up."""
    label_seed: int = 0
    """Decides which examples these are, whatever the run's seed."""
    threshold: float = 0.9
    """A pseudo-label is kept if its probability is above this number in [0, 1)."""
    burn_in: int = 0
    """Rounds at the start without pseudo-labels."""
    consistency: float = 0.05
    """λ ≥ 0, the weight of the divergence from the supervised model."""
    l2: float = 0.01
    """μ ≥ 0, how strongly the unsupervised model is held near the one that was sent."""
    noise: float = 0.5
    """Standard deviation of the Gaussian noise in a view, in units of the model's inputs."""
    shift: int = 0
    """Most pixels by which a view of an image is shifted along each axis; what enters is 0."""
    flip: bool = False
    """Whether views of images are mirrored, left to right, half of the time."""
    weighting: Literal["examples", "uniform", "steps"] = "uniform"
    """A client's weight in the mean of the supervised models: its number of examples, 1, or of local steps."""

    compresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.labelled <= 1:
            raise vfl.UsageError(f"labelled must be a share above 0 and at most 1, not {self.labelled}")
        if not 0 <= self.threshold < 1:
            raise vfl.UsageError(f"threshold must be a probability from 0 to below 1, not {self.threshold}")
        for name in ("consistency", "l2", "noise"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise vfl.UsageError(f"{name} must be a finite number ≥ 0, not {getattr(self, name)}")
        for name in ("burn_in", "shift"):
            if getattr(self, name) < 0:
                raise vfl.UsageError(f"{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task. Its clients raise UsageError where the task is not classification."""
        trainer = self.trainer(task)
        choice = vfl.random.key(self.label_seed, task.x.device)

        def divergence(u: Tensor, batch: vfl.Batch, to: Targets, buffers: Buffers) -> Tensor:
            log_q = torch.log_softmax(task.outputs(u, batch, buffers, training=True), -1)
            kl = (torch.xlogy(to.p, to.p) - to.p * log_q).sum(-1)
            values = to.variance * kl * (batch.weight if isinstance(batch.weight, Tensor) else 1)
            return torch.where(to.agreed, values, 0).sum() / to.agreed.sum().clamp(min=1)

        def init_server(x: Tensor) -> Server:
            return Server(x, trainer.server.init(x), x.new_zeros(()))

        def broadcast(server: Server, key: Tensor) -> vfl.Broadcast:
            sent = trainer.broadcast(server.x, server.t, key)
            threshold = torch.where(server.t >= self.burn_in, torch.full_like(server.t, self.threshold), _NEVER)
            return vfl.Broadcast(Sent(sent.content, threshold), sent.bits)

        def client_update(
            sent: Sent, client: tuple[()], batches: vfl.Batches, key: Tensor
        ) -> tuple[vfl.Message, tuple[()], vfl.Metrics]:
            x, buffers, zero = sent.model.x, batches.buffers, sent.model.x.new_zeros(())
            known = labelled(batches, self.labelled, choice)

            def supervised(w: Tensor, k: int, carried: tuple[Buffers, Tensor, Tensor]) -> Learned:
                own, loss, examples = carried
                batch = batches.at(k)
                g, aux = task.grad_fn(w, batch._replace(mask=batch.mask & known[k]), own)
                return Learned(g, aux.examples > 0, (aux.buffers, loss + aux.loss, examples + aux.examples))

            w, (own, loss, examples) = descend(trainer, sent.model, batches, supervised, (buffers, zero, zero))

            def unsupervised(u: Tensor, k: int, carried: tuple[Tensor, Tensor]) -> Learned:
                m, right = carried
                batch = batches.at(k)
                batch = batch._replace(mask=batch.mask & ~known[k])
                to = taught(task, batch, (x, buffers), (w, own), sent.threshold)
                plain, view = self.views(batch._replace(y=to.label.to(batch.y.dtype), mask=to.kept))
                g, _ = task.grad_fn(u, view, buffers)
                if self.consistency:
                    g = torch.add(g, torch.func.grad(divergence)(u, plain, to, buffers), alpha=self.consistency)
                if self.l2 and k:  # u is x in the first step
                    g = torch.add(g, u - x, alpha=self.l2)
                correct = to.kept & (to.label == batch.y)
                return Learned(g, to.kept.any(), (m + to.kept.sum(), right + correct.sum()))

            u, (m, right) = descend(trainer, sent.model, batches, unsupervised, (zero, zero))
            weight = trainer.weight(batches)
            share = m / weight.clamp(min=1)  # who has no data has no weight
            message = trainer.message(Payload(w - x, share * (u - x), share), weight, key)
            counts = {"pseudo_labels": m, "pseudo_labels_right": right}
            gradients = examples + (2 if self.consistency else 1) * m
            return message, client, vfl.Metrics(loss, examples, gradients, own, counts=counts)

        def server_update(server: Server, mean: vfl.Mean, key: Tensor) -> tuple[Server, dict[str, Tensor]]:
            sent: Payload = mean.payload
            some = sent.labels > 0
            unsupervised = sent.unsupervised / torch.where(some, sent.labels, 1)
            delta = torch.where(some, (sent.supervised + unsupervised) / 2, sent.supervised)
            x, opt = trainer.server_step(delta, server.opt, server.x, server.t)
            return Server(x, opt, server.t + 1), {}

        return vfl.Algorithm(init_server, vfl.stateless, broadcast, client_update, server_update)

    def views(self, batch: vfl.Batch) -> tuple[vfl.Batch, vfl.Batch]:
        """The minibatch and an augmented view of it, either with a key of its own for dropout.

        Images [B, channels, height, width] are shifted and mirrored; noise is added to inputs of any shape [B, ...].
        """
        shift, flip, noise, *dropout = vfl.random.split(vfl.random.fold_in(batch.key, _VIEWS), 5).unbind(-1)
        x, B = batch.x, len(batch.x)
        if x.dim() == 4 and self.shift:
            by = vfl.random.randint(shift, (B, 2), 2 * self.shift + 1) - self.shift
            x = shifted(shifted(x, by[:, 0], -2), by[:, 1], -1)
        if x.dim() == 4 and self.flip:
            mirrored = vfl.random.bernoulli(flip, 0.5, (B, 1, 1, 1))
            x = torch.where(mirrored, x.flip(-1), x)
        if self.noise:
            x = x + self.noise * vfl.random.normal(noise, x.shape, x.dtype)
        return batch._replace(key=dropout[0]), batch._replace(x=x, key=dropout[1])


def labelled(batches: vfl.Batches, share: float, key: Tensor) -> Tensor:
    """Which examples in a client's minibatches are labelled: bool [K, B].

    Those are the ⌈share · n⌉ of its n examples whose places among them have the smallest hashes with (key, n): no round
    and no other client's data changes them.
    """
    place = torch.arange(max(batches.largest, 1), device=batches.rows.device)
    key = vfl.random.fold_in(key, batches.examples)
    hashes = vfl.random.fold_in(key, place)
    ordered = torch.where(place < batches.examples, hashes, _LAST).sort().values
    count = (share * batches.examples.to(torch.float64) - 1e-9).ceil().to(torch.int64)  # 0.1 · 30 is 3
    return vfl.random.fold_in(key, batches.rows - batches.start) <= ordered.gather(0, (count - 1).clamp(min=0)[None])


def taught(
    task: vfl.Task, batch: vfl.Batch, sent: tuple[Tensor, Buffers], local: tuple[Tensor, Buffers], threshold: Tensor
) -> Targets:
    """Pseudo-labels by the model that was sent or the local one. Raises UsageError for a task without classes."""
    if not batch.x.is_floating_point():
        raise vfl.UsageError("fedlabels adds noise to the model's inputs, so they must be numbers, not tokens")
    outputs = [task.outputs(y, batch, buffers) for y, buffers in (sent, local)]
    if outputs[0].dim() != 2 or outputs[0].shape[1] < 2 or batch.y.dim() != 1:
        raise vfl.UsageError(
            f"fedlabels gives each example a class: it needs outputs [B, classes] of two classes at least and targets "
            f"[B], not {list(outputs[0].shape)} and {list(batch.y.shape)}"
        )
    of_sent, of_local = (torch.softmax(z, -1) for z in outputs)
    variances = of_sent.var(-1), of_local.var(-1)
    chosen = torch.where((variances[0] >= variances[1])[:, None], of_sent, of_local)
    confidence, label = chosen.max(-1)
    kept = batch.mask & (confidence > threshold)
    agreed = kept & (of_sent.argmax(-1) == of_local.argmax(-1))
    return Targets(label, kept, agreed, torch.maximum(*variances), of_local)


class Learned(NamedTuple):
    """What a minibatch gave."""

    g: Tensor  # [D] the gradient
    some: Tensor  # [] bool: whether there was anything to learn from
    carried: vfl.Tree  # sums and buffers after it


def descend(
    trainer: vfl.Trainer,
    sent: vfl.ModelAndRate,
    batches: vfl.Batches,
    learn: Callable[[Tensor, int, vfl.Tree], Learned],
    carried: vfl.Tree,
) -> tuple[Tensor, vfl.Tree]:
    """The local model [D] after the client's steps along `learn(model, step, carried)`, and what was carried on.

    A minibatch with nothing to learn from leaves the model, the optimizer and what is carried as they were. Padding is
    one, so that clients that are done stay where they are.
    """
    y, opt, bound = sent.x, trainer.local.init(sent.x), trainer.config.clip_norm
    for k in range(batches.longest):
        g, some, after = learn(y, k, carried)
        g = g if bound is None else vfl.clip_norm(g, bound)
        stepped = trainer.local.step(g, opt, y, sent.lr)
        (y, opt), carried = vfl.keep_where(some, (stepped, after), ((y, opt), carried))
    return y, carried


def shifted(x: Tensor, by: Tensor, axis: int) -> Tensor:
    """Images [B, channels, height, width], pixels `by` [B] places further along an axis (−2 or −1), after zeros."""
    size = x.shape[axis]
    source = torch.arange(size, device=x.device) - by[:, None]  # [B, size]
    source = source[:, None, :, None] if axis == -2 else source[:, None, None, :]
    inside = (source >= 0) & (source < size)
    return torch.where(inside, x.gather(axis, source.clamp(0, size - 1).expand(x.shape)), 0)
