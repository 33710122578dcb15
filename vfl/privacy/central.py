"""Central differential privacy: the server clips every message and adds noise to their sum. D parameters, S a cohort.

A client's presence changes the sum of the clipped messages by at most C in norm, so Gaussian noise N(0, (zC)²) on the
sum hides it (Dwork & Roth 2014, section 3.5); z is the noise multiplier. The guarantee is that of the models sent.
The training loss, evaluations on clients' data and the count of clipped clients are the simulation's view and not
covered, and so is what is decided by them (a plateau, an early stop, the best model). Noise in floating point is fit
for studying accuracy, not for releasing models (Mironov, CCS 2012).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfl import random
from vfl.base import (
    Algorithm,
    Broadcast,
    Mean,
    Message,
    Metrics,
    Tree,
    expecting,
    leaves,
    named_leaves,
    nested,
    tree_map,
)
from vfl.errors import UsageError
from vfl.local import Batches, float_bits
from vfl.privacy.noise import Noise, independent

log = logging.getLogger("vfl")

NOISE = 0x6E6F697365  # folded into a key for the noise, so that the algorithm's own draws stay what they are


class Adaptive(NamedTuple):
    """A clipping norm that follows a quantile of the messages' norms (Andrew et al. 1905.03871, Algorithm 1)."""

    quantile: float  # γ, of the clients that are not to be clipped
    count_noise: float  # σ_b, standard deviation of the noise on their count
    lr: float = 0.2  # η_C


class Server(NamedTuple):
    """The server's state."""

    inner: Any  # the algorithm's own
    clip: Tensor  # [] C
    noise: Tree  # the noise's memory
    nothing: Tree = ()  # zeros in the shape of what a client sends: the sum over an empty cohort

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


class Sent(NamedTuple):
    """What the server sends."""

    content: Tree  # the algorithm's own
    clip: Tensor  # [] C


class Clipped(NamedTuple):
    """What a client sends."""

    payload: Tree  # of norm ≤ C
    fits: Tree  # [] where C is adaptive: ½ for a message that was not clipped, −½ for one that was; else ()


def clip_tree(payload: Tree, norm: Tensor | float) -> tuple[Tree, Tensor]:
    """The payload scaled down to this norm over all of its entries if it is longer, and how long it was []."""
    length = torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves(payload)]).norm()
    factor = norm / length.clamp(min=norm)
    return tree_map(lambda leaf: leaf * factor, payload), length


def warn_of_numbers(payload: Tree) -> None:
    """Says which numbers of a payload are clipped and noised with its vectors, what not every method stands."""
    if numbers := [name for name, leaf in named_leaves(payload).items() if not leaf.dim()]:
        log.warning("the numbers that clients send beside vectors (%s) are clipped and get noise as these do, and a "
                    "method that needs them exact will not train", ", ".join(numbers))  # fmt: skip


def refuse_several(message: Message) -> None:
    """Raises UsageError for a client with a weight in each of several means, whose message no noise was made for."""
    if message.weight.dim():
        raise UsageError(
            "privacy is that of one mean, and these clients have a weight in each of several, as late updates and "
            "learned weights give them: wrap the algorithm in privacy alone"
        )


def message_noise(noise_multiplier: float, count_noise: float) -> float:
    """z_Δ, so that messages with noise z_Δ C and count with noise σ_b are together as private as z (1905.03871, Thm 1).

    Raises UsageError where the count alone would give away more: z ≥ 2σ_b.
    """
    if noise_multiplier == 0:
        return 0.0
    if noise_multiplier >= 2 * count_noise:
        raise UsageError(
            f"count-noise must be above half the noise multiplier {noise_multiplier:g}, not {count_noise:g}"
        )
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5


def private(
    algorithm: Algorithm,
    *,
    clip: float,
    noise_multiplier: float,
    cohort: float,
    adaptive: Adaptive | None = None,
    noise: Noise | None = None,
) -> Algorithm:
    """The algorithm on noisy means: (Σ_S clipped messages + N(0, (zC)²)) / m (DP-FedAvg, McMahan et al. 1710.06963).

    `clip` is C, the first one where it is `adaptive`; `noise_multiplier` is z; `cohort` is m, the expected number of
    clients in a round, qN under Poisson sampling, which the algorithm is told in place of the actual one. Clients weigh
    the same. `noise` replaces noise drawn afresh in each round, as `tree` does for DP-FTRL. What a client keeps to
    itself is not clipped. The metric `clipped` is the share of messages that were, `clip` the adaptive norm. A round
    whose cohort is empty has the noise all the same. Raises UsageError for an algorithm whose messages are of another
    kind from round to round.
    """
    if not (clip > 0 and math.isfinite(clip)):
        raise UsageError(f"clip must be a finite number > 0, not {clip}")
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise UsageError(f"noise-multiplier must be a finite number ≥ 0, not {noise_multiplier}")
    if adaptive is not None and noise is not None:
        raise UsageError("an adaptive clipping norm needs noise drawn afresh in each round, not that of a tree")
    z = noise_multiplier if adaptive is None else message_noise(noise_multiplier, adaptive.count_noise)
    source = noise or independent()

    def init_server(x: Tensor) -> Server:
        return Server(algorithm.init_server(x), x.new_tensor(clip), source.init(x))

    def broadcast(server: Server, key: Tensor) -> Broadcast:
        sent = algorithm.broadcast(server.inner, key)
        bits = sent.bits if adaptive is None else sent.bits + float_bits(server.clip)
        return Broadcast(Sent(sent.content, server.clip), bits)

    def client_update(sent: Sent, client: Tree, batches: Batches, key: Tensor) -> tuple[Message, Tree, Metrics]:
        message, client, metrics = algorithm.client_update(sent.content, client, batches, key)
        refuse_several(message)
        payload, length = clip_tree(message.payload, sent.clip)
        longer = (length > sent.clip).to(length.dtype)
        fits, bit = ((), 0) if adaptive is None else (0.5 - longer, 1)
        metrics = metrics._replace(extra={**metrics.extra, "clipped": longer})
        weight = (message.weight > 0).to(message.weight.dtype)
        return Message(Clipped(payload, fits), weight, message.bits + bit), client, metrics

    def server_update(server: Server, mean: Mean, key: Tensor) -> tuple[Server, Mapping[str, Tensor]]:
        like = pytree.tree_structure(server.nothing)
        if leaves(server.nothing) and pytree.tree_structure(mean.payload) != like:
            raise UsageError("what this algorithm asks of its clients alternates from round to round, so that a round "
                             "without clients would show that it had none: it runs without privacy")  # fmt: skip
        noise_key, count_key = random.split(random.fold_in(key, NOISE)).unbind(-1)
        clipped: Clipped = tree_map(lambda leaf: leaf * mean.weight, mean.payload)  # the sum over the cohort
        drawn, memory = source.draw(clipped.payload, server.noise, noise_key)
        payload = tree_map(lambda s, n: (s + z * server.clip * n) / cohort, clipped.payload, drawn)
        m = torch.full_like(mean.weight, cohort)
        inner, reported = algorithm.server_update(server.inner, Mean(payload, m, m), key)
        norm = server.clip
        if adaptive is not None:
            count_noise = adaptive.count_noise if noise_multiplier else 0.0
            count = clipped.fits + count_noise * random.normal(count_key, (), clipped.fits.dtype)
            share = count / cohort + 0.5  # b̃
            norm = norm * torch.exp(-adaptive.lr * (share - adaptive.quantile))
            reported = {**reported, "clip": norm}
        return server._replace(inner=inner, clip=norm, noise=memory), reported

    def expect(server: Server, payload: Clipped) -> Server:
        warn_of_numbers(payload.payload)
        inner = expecting(algorithm, server.inner, payload.payload)
        return server._replace(inner=inner, nothing=payload)

    def idle(server: Server, key: Tensor) -> tuple[Server, Mapping[str, Tensor]]:
        """An empty cohort shows no more than any other: the noise comes all the same."""
        if not leaves(server.nothing):  # no client has data
            return server, {}
        none = torch.zeros_like(server.clip)
        return server_update(server, Mean(server.nothing, none, none), key)

    return nested(algorithm)._replace(
        init_server=init_server,
        broadcast=broadcast,
        client_update=client_update,
        server_update=server_update,
        expect=expect,
        idle=idle,
        late="never",
    )
