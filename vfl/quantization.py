"""FLUTE's quantization of what clients send, with a threshold that changes from round to round, around any algorithm.

The compressor `quantize:bits,threshold=q` is the same map with one threshold for all rounds. D parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vfl.base import Algorithm, Broadcast, Mean, Message, Metrics, Tree, idled, leaves, nested, tree_map
from vfl.compressors.base import Layout
from vfl.compressors.quantize import check_quantize, quantized
from vfl.errors import UsageError
from vfl.local import Batches, float_bits
from vfl.operation import at_once
from vfl.task import Task
from vfl.wrappers import Context


class Counted(NamedTuple):
    """An algorithm's server state, and its rounds."""

    inner: Any
    t: Tensor  # [] rounds done

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


class SentWithThreshold(NamedTuple):
    """What the server sends."""

    content: Tree
    threshold: Tensor  # [] float64; this round's quantile, which both sides can compute and nobody has to send


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Quantizes what clients send as FLUTE does (Dimitriadis et al., 2203.13789), whatever the algorithm."""

    quant_bits: int | None = None
    """Bits of an entry that clients send, on even levels from each layer's least to its largest; none: as it is."""
    quant_threshold: float = 0.0
    """Quantile of each layer's entries by size below which they become 0, in the first round."""
    quant_anneal: float = 1.0
    """Factor on quant-threshold from round to round, above 0 and at most 1."""

    def __post_init__(self) -> None:
        check_quantize(8 if self.quant_bits is None else self.quant_bits, self.quant_threshold)
        if not 0 < self.quant_anneal <= 1:
            raise UsageError(f"quant-anneal is a factor above 0 and at most 1, not {self.quant_anneal}")
        if self.quant_bits is None and (self.quant_threshold, self.quant_anneal) != (0.0, 1.0):
            raise UsageError("quant-threshold and quant-anneal are about entries that are quantized: give quant-bits")
        if self.quant_anneal != 1 and not self.quant_threshold:
            raise UsageError("quant-anneal lowers quant-threshold, which is 0: give a quantile such as 0.9")

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The algorithm whose messages' leaves [D] go through `quantize` with threshold·annealᵗ in round t, from 0.

        A message's bits are then those of the quantized leaves, and of the others as they are, so the algorithm's own
        compressor must be identity. Without `quant_bits` it is the algorithm itself. Raises UsageError for an algorithm
        whose clients keep a state, as SCAFFOLD's: it may follow from what they sent, which they would not know.
        """
        bits = self.quant_bits
        if bits is None:
            return algorithm
        if leaves(algorithm.init_client(task.x)):
            raise UsageError(
                "quant-bits is for algorithms whose clients keep no state, which could differ from what they sent; "
                f"use compressor quantize:{bits},threshold={self.quant_threshold} instead, where the algorithm takes it"
            )
        layout = Layout(tuple(shape for shape in task.shapes if math.prod(shape)), task.x.dtype)

        def init_server(x: Tensor) -> Counted:
            return Counted(algorithm.init_server(x), torch.zeros_like(x[..., 0], dtype=torch.int64))

        def broadcast(server: Counted, key: Tensor) -> Broadcast:
            sent = algorithm.broadcast(server.inner, key)
            threshold = self.quant_threshold * self.quant_anneal ** server.t.to(torch.float64)
            return Broadcast(SentWithThreshold(sent.content, threshold), sent.bits)

        def client_update(
            sent: SentWithThreshold, client: Tree, batches: Batches, key: Tensor
        ) -> tuple[Message, Tree, Metrics]:
            message, client, metrics = algorithm.client_update(sent.content, client, batches, key)
            sizes: list[Tensor] = []

            def all_at_once(leaf: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
                value, code = quantized(leaf, bits, threshold if self.quant_threshold else 0.0, layout)
                return value, code.bits(leaf.device).expand(leaf.shape[:-1])

            def compressed(leaf: Tensor) -> Tensor:
                if leaf.shape != task.x.shape:
                    sizes.append(float_bits(leaf))
                    return leaf
                value, size = at_once(all_at_once, leaf, sent.threshold)
                sizes.append(size)
                return value

            payload = tree_map(compressed, message.payload)
            return Message(payload, message.weight, torch.stack(sizes).sum()), client, metrics

        def server_update(server: Counted, mean: Mean, key: Tensor) -> tuple[Counted, Mapping[str, Tensor]]:
            inner, reported = algorithm.server_update(server.inner, mean, key)
            return Counted(inner, server.t + 1), reported

        def idle(server: Counted, key: Tensor) -> tuple[Counted, Mapping[str, Tensor]]:
            inner, reported = idled(algorithm, server.inner, key)
            return Counted(inner, server.t + 1), reported

        return nested(algorithm)._replace(
            init_server=init_server, broadcast=broadcast, client_update=client_update, server_update=server_update,
            idle=idle,
        )  # fmt: skip
