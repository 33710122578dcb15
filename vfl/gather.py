"""A cohort's messages in the place of their sum, for rules that no sum can express. S a cohort, D a payload's entries.

Every rank keeps the messages of the clients it computes; then the ranks exchange slices, so that each holds d ≈ D/ranks
entries of every message, and none all entries of all of them.
"""

from __future__ import annotations

import functools
import operator

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfl.base import Combine, Tree, leaves, tree_map
from vfl.distributed import Ranks
from vfl.reduce import Layout

Messages = list[tuple[np.ndarray, Tree]]
"""Of each chunk: the clients' positions in the cohort [C], their payloads [C, ...] and weights [C]."""


def combined(
    rule: Combine, like: Layout, messages: Messages, finite: np.ndarray, ranks: Ranks, device: torch.device
) -> Tree:
    """The cohort's payload by the rule, the same on every rank; `messages` are this rank's, and are used up.

    `finite` [S] says whose messages count, or [R, S] with replicas, each of which is combined on its own. `device` is
    the ranks'; a single rank combines its messages where they were kept.
    """
    if finite.ndim == 1:
        return _combined(rule, like, messages, finite, ranks, device)
    each = []
    for r, present in enumerate(finite):
        mine = [(at[r], tree_map(operator.itemgetter(r), message)) for at, message in messages]
        each.append(_combined(rule, like, mine, present, ranks, device))
    return tree_map(lambda *payloads: torch.stack(payloads), *each)


def _combined(
    rule: Combine, like: Layout, messages: Messages, finite: np.ndarray, ranks: Ranks, device: torch.device
) -> Tree:
    place = messages[0][1][1].device if ranks.world == 1 and messages else device
    table = torch.zeros(2, len(finite), dtype=torch.float64, device=place)  # each client's weight and rank
    for at, (_, weight) in messages:
        table[0, torch.from_numpy(at)] = weight.to(table)
        table[1, torch.from_numpy(at)] = ranks.rank
    weight, owner = ranks.all_reduce(table).cpu()
    present = finite & (weight.numpy() > 0)
    owner = owner.numpy()[present].astype(np.int64)
    sizes = [part.numel() for part in like.payload]
    dtype = functools.reduce(torch.promote_types, [part.dtype for part in like.payload], torch.float32)
    rows = _rows(
        messages, present, torch.empty(int((owner == ranks.rank).sum()), sum(sizes), dtype=dtype, device=place)
    )
    first = 0
    if ranks.world > 1:
        shares = [len(share) for share in np.array_split(np.arange(sum(sizes)), ranks.world)]
        first, d = sum(shares[: ranks.rank]), shares[ranks.rank]
        counts = np.bincount(owner, minlength=ranks.world)
        parts = [part.flatten() for part in rows.split(shares, dim=1)]
        received = torch.cat(ranks.exchange(parts, [int(n) * d for n in counts])).view(len(owner), d)
        # They come rank by rank, from each in the cohort's order.
        rows = received[torch.from_numpy(np.argsort(np.argsort(owner, kind="stable")))]
    payload = rows.new_zeros(sum(sizes))
    if len(rows):  # none in a replica whose clients were all dropped
        mine = rule(rows, weight[torch.from_numpy(present)].to(place), lambda part: ranks.all_reduce(part.clone()))
        payload[first : first + rows.shape[1]] = mine
    parts = ranks.all_reduce(payload.to(device)).split(sizes)
    shaped = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, like.payload, strict=True)]
    return pytree.tree_unflatten(shaped, like.structure)


def _rows(messages: Messages, present: np.ndarray, rows: Tensor) -> Tensor:
    """`rows` [n, D] filled with the messages of the present clients [S] among them, in the cohort's order."""
    here = np.zeros(len(present), dtype=bool)
    for at, _ in messages:
        here[at] = present[at]
    slot = np.cumsum(here) - 1
    while messages:  # each chunk's messages are freed as soon as they are copied
        at, (payload, _) = messages.pop()
        kept = np.flatnonzero(here[at])
        target, source, first = torch.from_numpy(slot[at[kept]]), torch.from_numpy(kept), 0
        for leaf in leaves(payload):
            flat = leaf.reshape(len(at), -1)
            rows[target, first : first + flat.shape[1]] = flat[source].to(rows)
            first += flat.shape[1]
    return rows
