"""What a client's update gives away of its text, as FLUTE measures it (Dimitriadis et al., 2203.13789).

Letters: D parameters, V words of the vocabulary, E entries of an embedding, B batch, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from vfl.base import Algorithm, Broadcast, Message, Metrics, Tree, leaves
from vfl.errors import UsageError, unknown
from vfl.local import Batches, keep_where
from vfl.task import Batch, Task
from vfl.wrappers import Context

Action = Literal["none", "measure", "drop", "reweight"]
EPSILON, WORDS, DROPPED = "practical_epsilon", "words_recovered", "leaking"
"""The metrics: the cohort's largest practical epsilon and share of words recovered, and how many clients leaked."""
TOLERANCE = 1e-9  # what keeps a ratio finite, so that no practical epsilon exceeds about 9 ln 10


def words_recovered(rows: Tensor, counts: Tensor) -> Tensor:
    """The share [] of a client's words that its embedding's gradient shows; rows [V, E], counts [V] of the words.

    An embedding's row has a gradient only where its word occurs. An attacker who knows that the client has n words
    takes the n rows of largest norm for them, those that are zero apart. Each occurrence counts; without words it is 0.
    """
    norms = torch.linalg.vector_norm(rows, dim=1)
    rank = norms.argsort(descending=True, stable=True).argsort()
    found = (rank < counts.sum()) & (norms > 0)
    return (counts * found).sum() / counts.sum().clamp(min=1)


def practical_epsilon(before: Tensor, after: Tensor, mask: Tensor, weighted: bool = False) -> Tensor:
    """How much surer the client's words became by an attacker's step: max(0, log max (s + tol)/(s⁺ + tol)) [].

    s = −log p is how surprising a word is to the model before, and s⁺ after the step that the attacker takes along the
    client's update; `before` and `after` [...] are the log-probabilities, those whose mask [...] is false left out.
    FLUTE adds the tolerance to log p, which is below 0, so that there a word that becomes certain counts for nothing.
    `weighted`: each ratio times the larger of the two probabilities, so that words that stay unlikely count less.
    """
    ratio = (TOLERANCE - before) / (TOLERANCE - after)
    if weighted:
        ratio = ratio * torch.maximum(before, after).exp()
    return torch.where(mask, ratio, 0).amax().clamp(min=1).log()


def log_probabilities(outputs: Tensor, targets: Tensor) -> Tensor:
    """log p of each target [B] or [B, T] under outputs [B, V] or [B, T, V]; for [B], outputs of the last position."""
    return -functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


class SentWithModel(NamedTuple):
    """What the server sends, and what the attacker, who sits there, knows that it was sent from."""

    content: Tree
    x: Tensor  # [D]


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """Measures what clients' updates give away of their words, and keeps back those that give away too much."""

    leakage: Action = "none"
    """Of a client above a bound: nothing but its metrics (measure), it does not answer (drop), or its weight shrinks by
    as much as the bound is exceeded (reweight); none: nothing is measured."""
    leakage_bound: float | None = None
    """Largest practical epsilon allowed."""
    leakage_words: float | None = None
    """Largest share of a client's words allowed that its embedding's gradient shows."""
    leakage_lr: float = 0.03
    """Size of the attacker's step in every coordinate."""
    leakage_weighted: bool = False
    """Whether a word's practical epsilon counts by its probability."""
    leakage_embedding: str = "embedding.weight"
    """Name of the embedding's parameter [words, entries]; the share of words is measured if the model has it."""

    def __post_init__(self) -> None:
        if self.leakage not in (known := get_args(Action)):
            raise unknown("leakage", self.leakage, known)
        if self.leakage_bound is not None and not self.leakage_bound >= 0:
            raise UsageError(f"leakage-bound is a practical epsilon from 0, not {self.leakage_bound}")
        if self.leakage_words is not None and not 0 <= self.leakage_words <= 1:
            raise UsageError(f"leakage-words is a share from 0 to 1, not {self.leakage_words}")
        if not (self.leakage_lr > 0 and math.isfinite(self.leakage_lr)):
            raise UsageError(f"leakage-lr must be a finite number > 0, not {self.leakage_lr}")
        bounds = (self.leakage_bound, self.leakage_words)
        if self.leakage == "none" and bounds != (None, None):
            raise UsageError("a leakage-bound or leakage-words does nothing with leakage none; give measure, drop or "
                             "reweight")  # fmt: skip
        if self.leakage in ("drop", "reweight") and bounds == (None, None):
            raise UsageError(f"leakage {self.leakage} needs a bound: leakage-bound or leakage-words")

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The algorithm whose clients measure their update, the first leaf [D] of their payload, before they send it.

        It must be a change of the model, as FedAvg's Δ. The attacker steps to x + lr·Δ/(|Δ| + 1e−8), Adamax's first
        step along it, and the words are all of the client's targets, those of the embedding its inputs. Adds the
        metrics `practical_epsilon`, `words_recovered`, `leaking`. A client that is dropped has no weight, no bits and
        its state of before. Raises UsageError for a model that does not score classes, and a name of no embedding.
        """
        if self.leakage == "none":
            return algorithm
        has_words = self.leakage_embedding in task.names
        if self.leakage_words is not None and not has_words:
            raise unknown("leakage-embedding", self.leakage_embedding, task.names)

        def broadcast(server: Any, key: Tensor) -> Broadcast:
            sent = algorithm.broadcast(server, key)
            return Broadcast(SentWithModel(sent.content, server.x), sent.bits)

        def client_update(
            sent: SentWithModel, client: Tree, batches: Batches, key: Tensor
        ) -> tuple[Message, Tree, Metrics]:
            message, after, metrics = algorithm.client_update(sent.content, client, batches, key)
            found = self._measured(task, sent.x, _change(message, task), batches, has_words)
            factor, over = self._factor(found)
            peaks = {**metrics.peaks, **found}
            metrics = metrics._replace(peaks=peaks, counts={**metrics.counts, DROPPED: over.to(batches.dtype)})
            if self.leakage == "measure":
                return message, after, metrics
            weight = message.weight * factor.to(message.weight.dtype)
            if self.leakage == "reweight":
                return message._replace(weight=weight), after, metrics
            bits = torch.where(over, 0, message.bits)
            return message._replace(weight=weight, bits=bits), keep_where(over, client, after), metrics

        return algorithm._replace(broadcast=broadcast, client_update=client_update)

    def _measured(self, task: Task, x: Tensor, delta: Tensor, batches: Batches, words: bool) -> Mapping[str, Tensor]:
        """The metrics [] of a client whose update [D] moves the model x [D]."""
        attacked = x + self.leakage_lr * delta / (delta.abs() + 1e-8)
        epsilon = x.new_zeros(())
        rows = task.parameters(delta)[self.leakage_embedding] if words else x.new_zeros(1, 1)
        counts = x.new_zeros(len(rows))
        for batch in batches.whole():
            before, after = (
                log_probabilities(_scores(task.outputs(at, batch, batches.buffers), batch), batch.y)
                for at in (x, attacked)
            )
            mask = batch.mask.reshape(-1, *[1] * (batch.y.dim() - 1)).expand(batch.y.shape)
            epsilon = torch.maximum(epsilon, practical_epsilon(before, after, mask, self.leakage_weighted))
            if words:
                counts = counts + _occurrences(batch, len(rows), counts)
        found = {EPSILON: epsilon}
        return found | {WORDS: words_recovered(rows, counts)} if words else found

    def _factor(self, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What a client's weight is multiplied with [], and whether it is above a bound [] bool."""
        factor = torch.ones_like(found[EPSILON])
        over = torch.zeros_like(factor, dtype=torch.bool)
        for name, bound in ((EPSILON, self.leakage_bound), (WORDS, self.leakage_words)):
            if bound is not None:
                beyond = found[name] > bound
                shrunk = torch.where(beyond, bound / found[name], 1) if self.leakage == "reweight" else ~beyond
                factor, over = torch.minimum(factor, shrunk.to(factor.dtype)), over | beyond
        return factor, over


def _change(message: Message, task: Task) -> Tensor:
    """The change of the model [D] that a message carries."""
    for leaf in leaves(message.payload):
        if leaf.shape == task.x.shape:
            return leaf
    raise UsageError("leakage measures a change of the model, which this algorithm's clients do not send")


def _scores(outputs: Tensor, batch: Batch) -> Tensor:
    """The outputs if they score one class for every target [B, V] or [B, T, V]. Raises UsageError."""
    if batch.y.is_floating_point() or outputs.shape[:-1] != batch.y.shape:
        got, y = list(outputs.shape), f"{list(batch.y.shape)} {batch.y.dtype}"
        raise UsageError(f"leakage needs a score for every class at every target; the outputs are {got}, targets {y}")
    return outputs


def _occurrences(batch: Batch, V: int, like: Tensor) -> Tensor:
    """How often each word is among the inputs [V]. Raises UsageError for inputs that are no token ids."""
    if batch.x.is_floating_point():
        raise UsageError("leakage-words needs inputs that are token ids, not numbers with fractions")
    mask = batch.mask.reshape(-1, *[1] * (batch.x.dim() - 1)).expand(batch.x.shape)
    return torch.zeros(V, dtype=like.dtype, device=like.device).scatter_add(
        0, batch.x.flatten(), mask.flatten().to(like.dtype)
    )
