"""How the examples of a data set are dealt to clients. M examples, N clients; every example goes to exactly one.

Strategies are written as specs (`PARTITIONS`): `iid`, `sorted`, `rows`, `dirichlet:0.3`, `shards:2`, `labels:2`,
`lognormal:1.0`, `powerlaw:1.5`, `natural`. A result is a function of the labels, the spec, N and the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from vfl.data.container import Packed
from vfl.errors import UsageError
from vfl.spec import resolve

_ATTEMPTS = 100  # draws of a Dirichlet split before its `min` is called out of reach


class Assignment(NamedTuple):
    """Who gets which examples (CSR): client i gets rows order[offsets[i] : offsets[i + 1]]."""

    order: np.ndarray  # [M] int64, a permutation of 0 … M − 1
    offsets: np.ndarray  # [N + 1] int64


def generator(seed: int, stream: str) -> np.random.Generator:
    """Random numbers of a seed ≥ 0; streams of different names are independent. Raises UsageError."""
    if seed < 0:
        raise UsageError(f"the seed must be 0 or larger, not {seed}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=tuple(stream.encode()))))


def partition(
    y: ArrayLike | Tensor, spec: str, clients: int | None, seed: int, users: ArrayLike | None = None
) -> Assignment:
    """Deals M examples with labels y [M] to N clients by a strategy of `PARTITIONS`, written as a spec.

    `clients` is N; None only for `natural`, which takes N from `users` [M]. Raises UsageError for an unknown strategy,
    a parameter out of range, fewer examples than clients, and labels that the strategy needs but y is not.
    """
    if clients is not None and clients < 1:
        raise UsageError(f"the number of clients must be at least 1, not {clients}")
    labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    owners = None if users is None else np.asarray(users)
    rng = generator(seed, "partition")
    return resolve(spec, PARTITIONS, "partition", y=labels, clients=clients, users=owners, rng=rng)


def iid(*, y: np.ndarray, clients: int | None, rng: np.random.Generator) -> Assignment:
    """Uniformly at random; sizes differ by at most one."""
    N = _population(clients, y)
    return Assignment(rng.permutation(len(y)), _even(len(y), N))


def sorted_by_label(*, y: np.ndarray, clients: int | None) -> Assignment:
    """Sorted by label or by target, ties in their order, and cut into N equal parts: as unlike as can be.

    Sizes differ by at most one.
    """
    N = _population(clients, y)
    if y.ndim != 1:
        raise UsageError(f"sorted: needs one label or target an example, not {y.dtype} of shape {list(y.shape)}")
    return Assignment(np.argsort(y, kind="stable"), _even(len(y), N))


def by_row(*, y: np.ndarray, clients: int | None) -> Assignment:
    """In the order of the rows, cut into N equal parts; sizes differ by at most one."""
    return Assignment(np.arange(len(y)), _even(len(y), _population(clients, y)))


def dirichlet(
    alpha: float, min: int = 0, *, y: np.ndarray, clients: int | None, rng: np.random.Generator
) -> Assignment:
    """Each class divided among the clients by its own p ~ Dirichlet_N(α), as in Yurochkin et al. (arXiv 1905.12022, §4)
    and Li et al. (arXiv 2102.02079, §4.1).

    Labels and sizes are both skewed, the more the smaller α, and a client may end empty. (Hsu et al., arXiv 1909.06335,
    draw class proportions per client at equal sizes instead.) With `min`, splits are drawn anew, as Li et al. do, until
    every client has that many examples.
    """
    N = _population(clients, y)
    if not 0 < alpha <= 1e9:
        raise UsageError(f"dirichlet: alpha must be above 0 and at most 1e9 (then `iid` does the same), not {alpha}")
    if min < 0 or min * N > len(y):
        raise UsageError(f"dirichlet: {N} clients cannot each have min={min} of {len(y)} examples")
    groups = _by_label(y, "dirichlet")
    for _ in range(_ATTEMPTS):
        owner = np.empty(len(y), np.int32)
        for rows in groups:
            sizes = np.diff(_proportional(rng.dirichlet(np.full(N, alpha)), len(rows)))
            owner[rng.permutation(rows)] = np.repeat(np.arange(N, dtype=np.int32), sizes)
        if not min or np.bincount(owner, minlength=N).min() >= min:
            return _grouped(owner, N)
    raise UsageError(
        f"dirichlet: none of {_ATTEMPTS} draws gave each of {N} clients min={min} examples; "
        f"take a smaller min, a larger alpha than {alpha:g}, or fewer clients"
    )


def shards(shards: int, *, y: np.ndarray, clients: int | None, rng: np.random.Generator) -> Assignment:
    """The examples sorted by label, cut into N·S shards, S a client (McMahan et al., arXiv 1602.05629, §3: S = 2).

    Shard sizes differ by at most one.
    """
    N = _population(clients, y)
    if shards < 1 or N * shards > len(y):
        raise UsageError(f"shards: {N} clients × {shards} shards must be between {N} and the {len(y)} examples")
    rows = np.concatenate(_by_label(y, "shards"))
    owner = np.repeat(rng.permutation(N * shards) // shards, np.diff(_even(len(y), N * shards)))
    order, offsets = _grouped(owner, N)
    return Assignment(rows[order], offsets)


def labels(labels: int, *, y: np.ndarray, clients: int | None, rng: np.random.Generator) -> Assignment:
    """K distinct labels a client, and each label's examples divided evenly among the clients that hold it
    (“#C = k” of Li et al., arXiv 2102.02079, §4.1).

    One of a client's labels is dealt in turn, so that every label has a holder, and the others are uniformly random.
    A label with fewer examples than holders leaves some of those without it.
    """
    N = _population(clients, y)
    groups = _by_label(y, "labels")
    C = len(groups)
    if not 1 <= labels <= C:
        raise UsageError(f"labels: a client can hold 1 to {C} labels, as many as the data has, not {labels}")
    if N * labels < C:
        raise UsageError(f"labels: {N} clients × {labels} labels cannot hold all {C} labels; take more of either")
    score = rng.random((N, C), dtype=np.float32)  # a client holds the K labels of its lowest scores
    turn = np.arange(max(N, C))
    score[turn % N, rng.permutation(C)[turn % C]] = -1
    held = np.zeros((N, C), bool)
    np.put_along_axis(held, np.argpartition(score, labels - 1, axis=1)[:, :labels], True, axis=1)
    owner = np.empty(len(y), np.int32)
    for rows, holds in zip(groups, held.T, strict=True):
        holders = rng.permutation(np.flatnonzero(holds))  # so that the remainder goes to random ones
        owner[rng.permutation(rows)] = np.repeat(holders, np.diff(_even(len(rows), len(holders))))
    return _grouped(owner, N)


def lognormal(
    sigma: float, min: int = 1, *, y: np.ndarray, clients: int | None, rng: np.random.Generator
) -> Assignment:
    """Sizes ∝ exp(σz), z ~ N(0, 1), above `min` examples for everyone; which examples is uniformly random."""
    N = _population(clients, y)
    if not 0 <= sigma < math.inf:
        raise UsageError(f"lognormal: sigma must be a number from 0 (equal sizes) up, not {sigma}")
    return _sized(sigma * rng.standard_normal(N), min, y, rng, "lognormal")


def powerlaw(
    exponent: float, min: int = 1, *, y: np.ndarray, clients: int | None, rng: np.random.Generator
) -> Assignment:
    """Sizes ∝ rank^(−EXPONENT), the ranks 1 … N dealt at random, above `min` examples for everyone; which examples is
    uniformly random."""
    N = _population(clients, y)
    if not 0 <= exponent < math.inf:
        raise UsageError(f"powerlaw: the exponent must be a number from 0 (equal sizes) up, not {exponent}")
    return _sized(-exponent * np.log(1 + rng.permutation(N)), min, y, rng, "powerlaw")


def natural(*, y: np.ndarray, clients: int | None, users: np.ndarray | None) -> Assignment:
    """One client a user, in the sorted order of the user ids; a client's rows keep their order."""
    if users is None:
        raise UsageError("natural: this data set does not say whose its examples are; choose another partition")
    if users.shape != (len(y),):
        raise UsageError(f"natural: {len(y)} examples need users of shape [{len(y)}], not {list(users.shape)}")
    names, owner = np.unique(users, return_inverse=True)
    check_population(clients, len(names))
    return _grouped(owner, len(names))


PARTITIONS: dict[str, Callable[..., Assignment]] = {
    "iid": iid,
    "sorted": sorted_by_label,
    "rows": by_row,
    "dirichlet": dirichlet,
    "shards": shards,
    "labels": labels,
    "lognormal": lognormal,
    "powerlaw": powerlaw,
    "natural": natural,
}


def check_population(clients: int | None, users: int) -> None:
    """Raises UsageError when a number of clients is asked of a natural split that has another."""
    if clients not in (None, users):
        raise UsageError(f"natural: the data has {users} users, not {clients}; leave the number of clients out")


def hold_out(clients: Packed, fraction: float, seed: int, stream: str) -> tuple[Packed, Packed | None]:
    """Sets a random fraction of each client's examples aside: (the rest, what was taken), both with the same N.

    n examples give ⌊fraction·n + ½⌋, but a client keeps at least one. A fraction of 0 copies nothing and takes None.
    Raises UsageError for a fraction outside [0, 1); `stream` names what it is for, in that error and in the seed.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"{stream}: the fraction must be from 0 to below 1, not {fraction}")
    if not fraction:
        return clients, None
    sizes = clients.sizes()
    taken = np.minimum(np.floor(fraction * sizes + 0.5).astype(np.int64), np.maximum(sizes - 1, 0))
    M = int(sizes.sum())
    owner = np.repeat(np.arange(clients.population), sizes)
    # Random keys in [0, 1) above the owner's number: sorting shuffles each client's rows within its own block.
    shuffled = np.argsort(owner + generator(seed, stream).random(M), kind="stable")
    aside = np.zeros(M, bool)
    aside[shuffled[np.arange(M) - clients.offsets[owner] < taken[owner]]] = True
    rest = clients.take(np.flatnonzero(~aside), _cumulative(sizes - taken))
    return rest, clients.take(np.flatnonzero(aside), _cumulative(taken))


def _population(clients: int | None, y: np.ndarray) -> int:
    if clients is None:
        raise UsageError("this partition needs the number of clients; only `natural` takes it from the data")
    if clients > len(y):
        raise UsageError(f"{clients} clients cannot share {len(y)} examples; take at most {len(y)} clients")
    return clients


def _by_label(y: np.ndarray, what: str) -> list[np.ndarray]:
    """The rows of each label that occurs, in order of the labels."""
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise UsageError(f"{what}: needs one class label an example, not {y.dtype} of shape {list(y.shape)}")
    _, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    narrow = index.astype(np.uint16) if len(counts) < 1 << 16 else index  # numpy sorts 16 bits by radix: 10 × faster
    return np.split(np.argsort(narrow, kind="stable"), np.cumsum(counts)[:-1])


def _cumulative(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def _even(total: int, parts: int) -> np.ndarray:
    """Offsets [parts + 1] that divide 0 … total into sizes that differ by at most one."""
    return np.arange(parts + 1) * total // parts


def _proportional(weights: np.ndarray, total: int) -> np.ndarray:
    """Offsets [len(weights) + 1] that divide 0 … total in proportion to the weights, sizes within one of exact."""
    cumulative = _cumulative(weights)
    offsets = np.floor(cumulative / cumulative[-1] * total).astype(np.int64)
    offsets[-1] = total
    return offsets


def _grouped(owner: np.ndarray, N: int) -> Assignment:
    """The assignment that gives example j to client owner[j]; a client's rows keep their order."""
    return Assignment(np.argsort(owner, kind="stable"), _cumulative(np.bincount(owner, minlength=N)))


def _sized(logits: np.ndarray, least: int, y: np.ndarray, rng: np.random.Generator, what: str) -> Assignment:
    """Random examples, sizes `least` + a share ∝ exp(logits)."""
    N, M = len(logits), len(y)
    if least < 0 or least * N > M:
        raise UsageError(f"{what}: {N} clients cannot each have min={least} of {M} examples")
    shares = np.exp(logits - logits.max())  # the largest is 1, so that none overflows
    return Assignment(rng.permutation(M), _proportional(shares, M - least * N) + least * np.arange(N + 1))
