"""Late updates: what a client sends reaches the server some rounds after the one whose model it started from.

Letters: T the largest delay in rounds, τ a client's, D parameters, S a cohort. A client draws τ from its key; its
message has the weight w at place τ of [T + 1] weights and 0 elsewhere. So the cohort's sums come one for each round in
which they arrive, and no client holds more than its own message; the server keeps the sums that are still to come.

A late update counts s(τ) times: 1, 1/√(1 + τ) (FedBuff's choice, Nguyen et al. 2106.06639) or 1/(1 + τ). The sum is
divided by Σ w without s, as there, so that a round of stale updates alone takes a shorter step. That means something
for clients that send changes; with `staleness_scales` weight, s is part of the weights, and a mean stays a mean.

Where the server waits for a full buffer (`vfl.fedbuff`), s takes in the place of τ how many steps the server has taken
since it sent the client its model, as FedBuff does. That is known on arrival alone, so A = T + 1 sums, one for each age
in steps, wait in the place of A = 1.

Clients' states change in the round in which they work, and uplink bits are counted there. The module's buffers (batch
norm) are averaged over the clients that are in time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfl import random
from vfl.base import Algorithm, Mean, Message, Metrics, Tree, expecting, leaves, nested, tree_map
from vfl.devices import SECONDS
from vfl.errors import UsageError, unknown
from vfl.fedbuff import buffered, check_late, step_where
from vfl.local import Batches, keep_where
from vfl.spec import resolve
from vfl.task import Task
from vfl.wrappers import Context

Staleness = Literal["none", "sqrt", "inverse"]
Scales = Literal["update", "weight"]
_LATE, _TAU = 0x1A7E, 0xDE1A  # streams of a client's key that no algorithm uses
_LONGEST = 1000  # rounds; the server keeps a sum for each


class Delay(NamedTuple):
    """How late a late client is."""

    longest: int  # T
    draw: Callable[[Tensor, Metrics], Tensor]  # key [], its metrics → τ [] int64 from 0 to T
    deadline: float | None = None  # simulated seconds a round, where that is what says who is late


def fixed(tau: int) -> Delay:
    """Always τ rounds."""
    _longest(tau)
    return Delay(tau, lambda key, metrics: torch.full_like(key, tau))


def uniform(longest: int) -> Delay:
    """1 … T rounds, each as likely."""
    _longest(longest)
    return Delay(longest, lambda key, metrics: 1 + random.randint(key, (), longest))


def geometric(p: float, longest: int) -> Delay:
    """P(τ = k) ∝ p (1 − p)^(k − 1) for k = 1 … T: geometric, truncated at T and renormalised."""
    _longest(longest)
    if not 0 < p < 1:
        raise UsageError(f"delay geometric: p is a probability above 0 and below 1, not {p}")
    inside = 1 - (1 - p) ** longest  # of the untruncated law

    def draw(key: Tensor, metrics: Metrics) -> Tensor:
        u = random.uniform(key, (), torch.float64)
        tau = 1 + torch.floor(torch.log1p(-inside * u) / math.log1p(-p))
        return tau.clamp(1, longest).to(torch.int64)  # rounding may reach T + 1

    return Delay(longest, draw)


def speed(deadline: float, longest: int = 10) -> Delay:
    """As the client's simulated device says: rounds last `deadline` seconds, and τ more begin before it is done.

    A client that would need more than T more counts as T late.
    """
    _longest(longest)
    if not (deadline > 0 and math.isfinite(deadline)):
        raise UsageError(f"delay speed: deadline is a number of seconds above 0, not {deadline}")

    def draw(key: Tensor, metrics: Metrics) -> Tensor:
        if SECONDS not in metrics.peaks:
            raise UsageError("delay speed reads the clients' simulated times: choose device-speeds, equal at least")
        tau = torch.ceil(metrics.peaks[SECONDS] / deadline) - 1
        return tau.clamp(0, longest).to(torch.int64)

    return Delay(longest, draw, deadline)


DELAYS: Mapping[str, Callable[..., Delay]] = {f.__name__: f for f in (fixed, uniform, geometric, speed)}


class Delayed(NamedTuple):
    """The server's state, with what is still to come."""

    inner: Any  # the algorithm's own
    payload: Tree  # [T, A, ...] Σ w payload of those that arrive in the next round, in the one after, …, by age
    weight: Tensor  # [T, A] their Σ w
    clients: Tensor  # [T, A] how many they are

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


def delayed(
    algorithm: Algorithm,
    probability: float,
    delay: Delay,
    staleness: Staleness = "none",
    scales: Scales = "update",
    version: Callable[[Any], Tensor] | None = None,
) -> Algorithm:
    """The algorithm with clients that are late, each with this probability, on its own.

    Staleness counts rounds, or the steps that `version` reads off the algorithm's server [], at most one a round.
    Metrics, beside the algorithm's: `late`, how many of the cohort will arrive in a later round; `arrived`, how many
    updates arrived in this one; `pending`, how many are still to come: after the last round these are lost.
    Raises UsageError for an algorithm whose messages count in their own round alone, or not in part where there is a
    discount; whose rounds ask for different things, so that a late answer would be taken for another one; and for an
    aggregator that needs each message.
    """
    T = delay.longest
    A = 1 if version is None or staleness == "none" else T + 1
    check_late(algorithm)
    if algorithm.late == "whole" and staleness != "none":
        raise UsageError("this algorithm's server needs all of every update, since what a discount leaves out of its "
                         f"memory or of logits never comes again: staleness must be none, not {staleness}")  # fmt: skip
    if algorithm.everyone is not None:
        raise UsageError("this algorithm asks all clients in some rounds, and then needs their answers in the same "
                         "round: it runs without delays")  # fmt: skip
    if algorithm.combine is not None:
        raise UsageError("late updates wait as their sum, and this aggregator needs each of them: it runs without "
                         "delays")  # fmt: skip

    def init_server(x: Tensor) -> Delayed:
        return Delayed(algorithm.init_server(x), (), x.new_zeros(T, A), x.new_zeros(T, A))

    def expect(server: Delayed, payload: Tree) -> Delayed:
        inner = expecting(algorithm, server.inner, payload)
        return server._replace(inner=inner, payload=tree_map(lambda p: p.new_zeros((T, A, *p.shape)), payload))

    def client_update(sent: Tree, client: Tree, batches: Batches, key: Tensor) -> tuple[Message, Tree, Metrics]:
        message, client, metrics = algorithm.client_update(sent, client, batches, key)
        if message.weight.dim():
            raise UsageError("late updates are averaged by the round they come in, and these clients have a weight in "
                             "each of several means already: they run without delays")  # fmt: skip
        late = random.bernoulli(random.fold_in(key, _LATE), probability, ())
        tau = torch.where(late, delay.draw(random.fold_in(key, _TAU), metrics), 0)
        weight = message.weight * (torch.arange(T + 1, device=tau.device) == tau)
        counts = {**metrics.counts, "late": ((tau > 0) & (message.weight > 0)).to(message.weight.dtype)}
        peaks = dict(metrics.peaks)
        if SECONDS in peaks:  # the server waits until the deadline where there is one, else for those in time
            now = peaks[SECONDS]
            peaks[SECONDS] = torch.full_like(now, delay.deadline) if delay.deadline else torch.where(tau > 0, 0, now)
        return message._replace(weight=weight), client, metrics._replace(counts=counts, peaks=peaks)

    def server_update(server: Delayed, mean: Mean, key: Tensor) -> tuple[Delayed, dict[str, Tensor]]:
        if pytree.tree_structure(mean.payload) != pytree.tree_structure(server.payload):
            raise UsageError("what this algorithm asks of its clients alternates from round to round, so that a late "
                             "answer would be taken for another one: it runs without delays")  # fmt: skip
        sums = mean._replace(payload=tree_map(lambda p: _along(mean.weight, p) * p, mean.payload))
        return arrive(server, _discounted(sums, staleness, scales) if A == 1 else sums, key)

    def idle(server: Delayed, key: Tensor) -> tuple[Delayed, dict[str, Tensor]]:
        if not leaves(server.payload):  # there are no clients with data
            return server, {}
        nothing = server.weight.new_zeros(T + 1)
        sums = tree_map(lambda p: p.new_zeros((T + 1, *p.shape[2:])), server.payload)
        return arrive(server, Mean(sums, nothing, nothing), key)

    def arrive(server: Delayed, new: Mean, key: Tensor) -> tuple[Delayed, dict[str, Tensor]]:
        """The round's end: sums [T + 1, ...], of age 0, join what was to come, and what is due meets the server."""

        def joined(waiting: Tensor, joins: Tensor) -> Tensor:
            come = torch.cat([waiting, torch.zeros_like(waiting[:1])])
            older = torch.zeros_like(come[:, 1:])
            return come + torch.cat([joins[:, None].to(come.dtype), older], 1)

        both = tree_map(joined, Mean(server.payload, server.weight, server.clients), new)
        due, later = tree_map(lambda a: a[0], both), tree_map(lambda a: a[1:], both)
        sums = tree_map(lambda a: a.sum(0), due if A == 1 else _discounted(due, staleness, scales))
        inner, reported = step_where(sums.weight > 0, algorithm, server.inner, sums, key)
        if A > 1 and version is not None:
            stepped = version(inner) > version(server.inner)
            later = keep_where(stepped, tree_map(_older, later), later)
        arrived = {"arrived": sums.clients, "pending": later.clients.sum()}
        return Delayed(inner, *later), {**reported, **arrived}

    return nested(algorithm)._replace(
        init_server=init_server,
        client_update=client_update,
        server_update=server_update,
        idle=idle,
        expect=expect,
    )


def discount(staleness: Staleness, tau: Tensor) -> Tensor:
    """s(τ) of delays τ [...] in rounds or steps: float64."""
    tau = tau.to(torch.float64)
    if staleness == "none":
        return torch.ones_like(tau)
    return 1 / (1 + tau).sqrt() if staleness == "sqrt" else 1 / (1 + tau)


@dataclass(frozen=True, kw_only=True)
class Delays:
    """Clients whose updates arrive in a later round, and a server that waits for a number of them."""

    delay_probability: float = 0.0
    """Probability that a client of the cohort is late; 0: none is."""
    delay: str = "uniform:5"
    """How many rounds a late client is late: fixed:3, uniform:5 (1 to 5), geometric:0.5,5 (truncated at 5), or
    speed:60 (as its device needs more than rounds of 60 simulated seconds, with delay-probability 1)."""
    staleness: Staleness = "none"
    """What an update counts that is τ rounds late, or with a buffer τ server steps: 1 (none), 1/√(1+τ) (sqrt), or
    1/(1+τ) (inverse)."""
    staleness_scales: Scales = "update"
    """What that factor scales: the update in a mean by the full weights, as in FedBuff, or its weight in the mean."""
    buffer_size: int = 1
    """The server steps once at least so many updates have come in since its last step (FedBuff's K)."""

    def __post_init__(self) -> None:
        if not 0 <= self.delay_probability <= 1:
            raise UsageError(f"delay-probability must be from 0 to 1, not {self.delay_probability}")
        for name, kinds in (("staleness", Staleness), ("staleness_scales", Scales)):
            if getattr(self, name) not in get_args(kinds):
                raise unknown(name.replace("_", "-"), str(getattr(self, name)), get_args(kinds))
        if self.buffer_size < 1:
            raise UsageError(f"buffer-size must be at least 1, not {self.buffer_size}")
        if self.distribution().deadline is not None and self.delay_probability != 1:
            raise UsageError("with delay speed the devices say who is late, so delay-probability must be 1, "
                             f"not {self.delay_probability}")  # fmt: skip

    def distribution(self) -> Delay:
        """How late a late client is."""
        return resolve(self.delay, DELAYS, "delay")

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The algorithm under these delays; itself without any. Wrapped after `Devices`, whose times speed reads."""
        version = None
        if self.buffer_size > 1:
            algorithm, version = buffered(algorithm, self.buffer_size), operator.attrgetter("version")
        if self.delay_probability > 0:
            algorithm = delayed(
                algorithm, self.delay_probability, self.distribution(), self.staleness, self.staleness_scales, version
            )
        return algorithm


def _discounted(sums: Mean, staleness: Staleness, scales: Scales) -> Mean:
    """The sums [T + 1, ...], those at place τ times s(τ)."""
    s = discount(staleness, torch.arange(len(sums.weight), device=sums.weight.device)).to(sums.weight.dtype)
    payload = tree_map(lambda p: _along(s, p) * p, sums.payload)
    return sums._replace(payload=payload, weight=s * sums.weight if scales == "weight" else sums.weight)


def _older(sums: Tensor) -> Tensor:
    """What waits [T, A, ...], a step later. None is of the largest age yet: it would have arrived."""
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)


def _along(factor: Tensor, rows: Tensor) -> Tensor:
    """One factor a row [T + 1, 1, …] for rows [T + 1, ...]."""
    return factor.reshape(-1, *[1] * (rows.dim() - 1)).to(rows.dtype)


def _longest(rounds: int) -> None:
    if not 1 <= rounds <= _LONGEST:
        raise UsageError(f"delay: rounds must be from 1 to {_LONGEST}, not {rounds}")
