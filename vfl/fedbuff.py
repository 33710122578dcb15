"""FedBuff's buffer (Nguyen et al., 2106.06639): the server steps once at least K updates have come in. D parameters.

All updates of a round come in together, so a step may use more than K. Its versions are what staleness counts there:
how many steps the server has taken between sending a client its model and using the client's update. An aggregator that
needs each message combines those of a round, and the buffer averages what comes of it over the rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfl.base import Algorithm, Mean, Tree, expecting, idled, nested, tree_map
from vfl.errors import UsageError
from vfl.local import keep_where


class Buffered(NamedTuple):
    """The server's state, with the updates that it has not used yet."""

    inner: Any  # the algorithm's own
    payload: Tree  # [...] Σ w payload since the last step
    weight: Tensor  # [] Σ w
    clients: Tensor  # [] how many they are
    version: Tensor  # [] steps so far

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


def buffered(algorithm: Algorithm, size: int) -> Algorithm:
    """The algorithm whose server steps once at least `size` updates have come in (Algorithm 1, K).

    The metric `buffered` is how many wait after the round; the algorithm's own metrics are NaN in rounds without a
    step. Raises UsageError for an algorithm whose messages cannot wait.
    """
    check_late(algorithm)

    def init_server(x: Tensor) -> Buffered:
        zero = x.new_zeros(())
        return Buffered(algorithm.init_server(x), (), zero, zero, zero)

    def expect(server: Buffered, payload: Tree) -> Buffered:
        inner = expecting(algorithm, server.inner, payload)
        return server._replace(inner=inner, payload=tree_map(torch.zeros_like, payload))

    def server_update(server: Buffered, mean: Mean, key: Tensor) -> tuple[Buffered, dict[str, Tensor]]:
        if mean.weight.dim():
            raise UsageError("a buffer adds up one mean, and these clients have a weight in each of several: they run "
                             "without a buffer")  # fmt: skip
        if pytree.tree_structure(mean.payload) != pytree.tree_structure(server.payload):
            raise UsageError("what this algorithm asks of its clients alternates from round to round, so that answers "
                             "of different rounds do not add up: it runs without a buffer")  # fmt: skip
        payload = tree_map(lambda a, b: a + (b * mean.weight).to(a.dtype), server.payload, mean.payload)
        held = payload, server.weight + mean.weight, server.clients + mean.clients
        full = held[-1] >= size
        inner, reported = step_where(full, algorithm, server.inner, Mean(*held), key)
        payload, weight, clients = keep_where(full, tree_map(torch.zeros_like, held), held)
        after = Buffered(inner, payload, weight, clients, server.version + full)
        return after, {**reported, "buffered": clients}

    def idle(server: Buffered, key: Tensor) -> tuple[Buffered, Mapping[str, Tensor]]:
        inner, reported = idled(algorithm, server.inner, key)
        return server._replace(inner=inner), {**reported, "buffered": server.clients}

    return nested(algorithm)._replace(
        init_server=init_server,
        server_update=server_update,
        idle=idle,
        expect=expect,
    )


def check_late(algorithm: Algorithm) -> None:
    """Raises UsageError for an algorithm whose messages are of no use after their round."""
    if algorithm.late == "never":
        raise UsageError(
            "this algorithm's messages count in their own round alone, as answers to what the server asks in it, or as "
            "privacy accounts for them: it runs without delays and without a buffer"
        )


def step_where(
    due: Tensor, algorithm: Algorithm, server: Any, sums: Mean, key: Tensor
) -> tuple[Any, dict[str, Tensor]]:
    """The server's step along the mean of these sums where `due` [], else the server's round without any; no branch."""
    scale = torch.where(sums.weight > 0, 1 / sums.weight, 0)
    mean = sums._replace(payload=tree_map(lambda p: (p * scale).to(p.dtype), sums.payload))
    stepped, reported = algorithm.server_update(server, mean, key)
    rested, meanwhile = idled(algorithm, server, key)
    named = {
        name: torch.where(due, value.to(torch.float64), meanwhile.get(name, torch.nan))
        for name, value in reported.items()
    }
    return keep_where(due, stepped, rested), named
