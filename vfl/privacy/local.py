"""Local differential privacy, as FLUTE's (2203.13789): every client adds noise before it sends. D parameters.

The payload is brought to a norm S, the weight into [w_min, w_max], and both get noise N(0, σ²), σ = zΔ, where
Δ² = S² + w_max²: the most that the message can differ from no message at all. FLUTE's z = √(2 ln(1.25/δ)) / ε is the
classical calibration (Dwork & Roth 2014, Theorem A.1), proven for ε ≤ 1. Two messages can differ by 2Δ, so they are
as hard to tell apart as z/2 makes them: that is the ε which is accounted (`Plan.replaced`), toward a server that sees
who sends.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from vfl import random
from vfl.base import Algorithm, Message, Metrics, Tree, leaves, tree_map
from vfl.errors import UsageError
from vfl.local import Batches, float_bits
from vfl.privacy.central import NOISE, clip_tree, warn_of_numbers


def classical_multiplier(epsilon: float, delta: float) -> float:
    """z = √(2 ln(1.25/δ)) / ε. Raises UsageError for ε ≤ 0 and for δ outside (0, 1)."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise UsageError(f"the ε of a message must be a finite number > 0, not {epsilon}; without noise, leave it out")
    if not 0 < delta < 1:
        raise UsageError(f"delta must lie between 0 and 1, not {delta}")
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def locally_private(
    algorithm: Algorithm,
    *,
    clip: float,
    noise_multiplier: float,
    weights: tuple[float, float] | None = None,
    scale: bool = False,
) -> Algorithm:
    """The algorithm whose clients send noisy messages: clipped to the norm S = `clip`, or with `scale` brought to it.

    `noise_multiplier` is z. With `weights` (w_min, w_max) the client's weight is clamped to them, noised and clamped
    again; without, clients weigh the same. A noisy payload has no zeros, so its bits are those of all its entries.
    """
    if not (clip > 0 and math.isfinite(clip)):
        raise UsageError(f"clip must be a finite number > 0, not {clip}")
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise UsageError(f"noise-multiplier must be a finite number ≥ 0, not {noise_multiplier}")
    if weights is not None and not 0 < weights[0] <= weights[1] < math.inf:
        raise UsageError(f"the weights need 0 < min-weight ≤ max-weight, not {weights[0]} and {weights[1]}")
    sigma = noise_multiplier * math.hypot(clip, 0 if weights is None else weights[1])

    def client_update(sent: Tree, client: Tree, batches: Batches, key: Tensor) -> tuple[Message, Tree, Metrics]:
        message, client, metrics = algorithm.client_update(sent, client, batches, key)
        payload, length = clip_tree(message.payload, clip)
        if scale:
            longer = clip / length.clamp(min=1e-12, max=clip)  # the short ones, which clipping left as they were
            payload = tree_map(lambda leaf: leaf * longer, payload)
        parts, structure = leaves(payload), pytree.tree_structure(payload)
        keys = random.split(random.fold_in(key, NOISE), len(parts) + 1).unbind(-1)
        noisy = [p + sigma * random.normal(k, p.shape, p.dtype) for p, k in zip(parts, keys, strict=False)]
        weight = (message.weight > 0).to(message.weight.dtype)
        if weights is not None:
            drawn = random.normal(keys[-1], (), message.weight.dtype)
            weight = weight * (message.weight.clamp(*weights) + sigma * drawn).clamp(*weights)
        bits = float_bits(payload) if sigma else message.bits
        clipped = (length > clip).to(length.dtype)
        metrics = metrics._replace(extra={**metrics.extra, "clipped": clipped})
        return Message(pytree.tree_unflatten(noisy, structure), weight, bits), client, metrics

    def expect(server: Any, payload: Tree) -> Any:
        warn_of_numbers(payload)
        return algorithm.expect(server, payload) if algorithm.expect else server

    return algorithm._replace(client_update=client_update, expect=expect)
