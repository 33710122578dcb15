"""Clients that do harm, to test what an aggregator is worth: shuffled labels, flipped messages. N clients."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vfl.base import Algorithm, Message, Metrics, Tree, tree_map
from vfl.data.container import FederatedData
from vfl.data.partition import generator
from vfl.errors import UsageError
from vfl.local import Batches


def adversaries(data: FederatedData, fraction: float, seed: int = 0) -> np.ndarray:
    """Which clients are adversaries: ⌊fraction·N + ½⌋ of those with examples, or all of these if they are fewer.

    Ascending int64 ids, drawn from `seed`; a larger fraction only adds to them. Raises UsageError for a fraction
    outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise UsageError(f"the fraction of adversaries must be from 0 to 1, not {fraction}")
    able = np.flatnonzero(data.clients.sizes())
    count = math.floor(fraction * data.clients.population + 0.5)
    return np.sort(generator(seed, "adversaries").permutation(able)[:count])


def corrupt_labels(data: FederatedData, fraction: float, seed: int = 0) -> FederatedData:
    """The data with the labels of each adversary's training examples shuffled among these; a copy of y.

    A client whose labels are all the same keeps them. Raises UsageError.
    """
    y, clients = data.clients.y.clone(), data.clients
    for i in adversaries(data, fraction, seed):
        first, last = int(clients.offsets[i]), int(clients.offsets[i + 1])
        order = generator(seed, f"labels of client {i}").permutation(last - first)
        y[first:last] = clients.y[first + torch.from_numpy(order).to(y.device)]
    return data._replace(clients=clients._replace(y=y))


def sign_flipping(
    algorithm: Algorithm, data: FederatedData, fraction: float, seed: int = 0, scale: float = 1.0
) -> Algorithm:
    """The algorithm on this data with adversaries who send −scale times what they should, in every round.

    They are those of `adversaries`, and keep the states of honest clients. Whatever the server does with messages comes
    after. Raises UsageError for a fraction outside [0, 1].
    """
    # A client knows no number of its own, but where its examples start, which no other client's do.
    starts = torch.from_numpy(data.clients.offsets[adversaries(data, fraction, seed)])

    def client_update(sent: Tree, client: Tree, batches: Batches, key: Tensor) -> tuple[Message, Tree, Metrics]:
        message, client, metrics = algorithm.client_update(sent, client, batches, key)
        hostile = (starts.to(batches.start.device) == batches.start).any()
        payload = tree_map(lambda leaf: torch.where(hostile, -scale * leaf, leaf), message.payload)
        return message._replace(payload=payload), client, metrics

    return algorithm._replace(client_update=client_update)
