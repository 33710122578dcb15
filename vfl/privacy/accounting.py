"""(ε, δ) of a run, by Google's dp-accounting. N population, q sampling rate, z noise multiplier.

What a round releases is the Gaussian mechanism on a sample of the clients; what the sample is, is part of the theorem.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from vfl.base import Algorithm, Mean, idled, nested
from vfl.errors import UsageError, unknown
from vfl.samplers import SAMPLERS, Amount, cohort_rate, cohort_size
from vfl.spec import parse

Accountant = Literal["pld", "rdp"]
INTERVAL = 1e-3  # of ε, between the points of a privacy loss distribution, which is rounded to the safe side
_LITTLE = 0.3  # a noise multiplier below which ε grows as 1/z², and the interval with it, else the points would abound
_POINTS = 100  # about how many rounds of a run have an ε of their own; those between get the next one's


class Plan(NamedTuple):
    """What an accountant must know about a run, but for the noise.

    Neighbours are two populations of which one has a client more (for uniform sampling: of which one client differs).
    A plan may also be that of one client's messages (local), with neighbours that differ in one of its data sets for
    another, or of the minibatches of its training (DP-SGD), with one example for another: `replaced`.
    """

    population: int  # N
    rate: float  # q, each client's probability to take part in a round
    delta: float  # δ
    accountant: Accountant = "pld"
    fixed_size: bool = False  # cohorts of one size without replacement, in place of Poisson's
    tree: bool = False  # DP-FTRL: the noise is a tree's, and sampling does not amplify
    replaced: bool = False  # without sampling, neighbours' sums differ by twice the norm: another comes in one's place

    @property
    def cohort(self) -> float:
        """The expected number of clients in a round."""
        return self.rate * self.population

    def participations(self, rounds: int) -> tuple[int, float]:
        """In how many rounds a client takes part at most, but for a probability; and δ less that probability."""
        if self.rate == 1:
            return rounds, self.delta
        from scipy.stats import binom  # which dp-accounting brings

        return max(int(binom.isf(self.delta / 2, rounds, self.rate)), 1), self.delta / 2

    def gaussian(self, rounds: int) -> tuple[float, float] | None:
        """By what so many rounds divide z where together they are one Gaussian mechanism, and its δ; None: sampled."""
        if self.tree:
            # A client is in at most depth nodes of the tree a time, so k times change all their sums by k √depth.
            k, delta = self.participations(rounds)
            return k * math.sqrt(rounds.bit_length()), delta
        return (math.sqrt(rounds) * (2 if self.replaced else 1), self.delta) if self.rate == 1 else None


def make_plan(
    sampling: str, clients_per_round: Amount, population: int, delta: float, accountant: Accountant, tree: bool = False
) -> Plan:
    """The plan of a run with this sampler, which the accountant must know.

    Poisson sampling and a cohort of everyone are known to both accountants, uniform sampling to rdp alone; listed
    clients are never hidden among others, so that q = 1. Raises UsageError for other samplers.
    """
    if not 0 < delta < 1:
        raise UsageError(f"delta must lie between 0 and 1, not {delta}")
    if accountant not in get_args(Accountant):
        raise unknown("accountant", accountant, get_args(Accountant))
    name = parse(sampling).name
    if name == "poisson":
        return Plan(population, cohort_rate(clients_per_round, population), delta, accountant, False, tree)
    if name == "fixed":
        return Plan(population, 1.0, delta, accountant, False, tree)
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    if name != "uniform":
        raise UsageError(f"no accountant knows --sampling {name}; use --sampling poisson")
    rate = cohort_size(clients_per_round, population) / population
    sampled = rate < 1 and not tree
    if sampled and accountant == "pld":
        raise UsageError("the accountant pld knows no cohorts of one size, which --sampling uniform draws; "
                         "use --sampling poisson, or --accountant rdp, whose ε is larger")  # fmt: skip
    return Plan(population, rate, delta, accountant, sampled, tree)


def epsilon(plan: Plan, noise_multiplier: float, rounds: int) -> float:
    """ε after so many rounds; infinite without noise."""
    if noise_multiplier == 0:
        return math.inf
    whole = plan.gaussian(rounds)
    if whole is not None and plan.accountant == "pld":  # known exactly, and the distribution of a large ε is long
        return float(_library().get_epsilon_gaussian(noise_multiplier / whole[0], whole[1]))
    delta = plan.delta if whole is None else whole[1]
    with _quiet():
        return float(
            _accountant(plan, noise_multiplier).compose(_event(plan, noise_multiplier, rounds)).get_epsilon(delta)
        )


def epsilons(plan: Plan, noise_multiplier: float, rounds: Sequence[int]) -> list[float]:
    """ε after each of these numbers of rounds, in less time than one by one."""
    if noise_multiplier == 0 or plan.gaussian(1) is not None:
        return [epsilon(plan, noise_multiplier, t) for t in rounds]
    library = _library()
    with _quiet():
        if plan.accountant == "rdp":
            one = _accountant(plan, noise_multiplier).compose(_event(plan, noise_multiplier, 1))
            return [float(library.rdp.compute_epsilon(one.orders, t * one.rdp, plan.delta)[0]) for t in rounds]
        from dp_accounting.pld import privacy_loss_distribution

        one = privacy_loss_distribution.from_gaussian_mechanism(
            noise_multiplier, sampling_prob=plan.rate, value_discretization_interval=_interval(noise_multiplier)
        )
        return [float(one.self_compose(t).get_epsilon_for_delta(plan.delta)) for t in rounds]


def solve_noise_multiplier(plan: Plan, target_epsilon: float, rounds: int) -> float:
    """The smallest z, up to a ten-thousandth, with which so many rounds have ε ≤ target_epsilon.

    Raises UsageError for a target that no noise from 2⁻⁵ to 2²⁰ meets.
    """
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise UsageError(f"target-epsilon must be a finite number > 0, not {target_epsilon}")
    library, whole = _library(), plan.gaussian(rounds)
    if whole is not None and plan.accountant == "pld":
        return float(library.get_sigma_gaussian(target_epsilon, whole[1])) * whole[0] * (1 + 1e-9)
    low = 1.0
    if epsilon(plan, low, rounds) > target_epsilon:
        while epsilon(plan, 2 * low, rounds) > target_epsilon:
            low *= 2
            if low > 2**20:
                raise UsageError(
                    f"no noise gives ε ≤ {target_epsilon:g} over {rounds} rounds; allow more, or play fewer"
                )
    else:
        low /= 2
        while epsilon(plan, low, rounds) <= target_epsilon:
            low /= 2
            if low < 2**-5:
                raise UsageError(f"ε = {target_epsilon:g} over {rounds} rounds is no protection; ask for less")
    delta = plan.delta if whole is None else whole[1]
    with _quiet():
        return float(
            library.calibrate_dp_mechanism(
                lambda: _accountant(plan, low), lambda z: _event(plan, z, rounds), target_epsilon, delta,
                library.ExplicitBracketInterval(low, 2 * low), tol=1e-4 * low,
            )
        )  # fmt: skip


class Server(NamedTuple):
    """The server's state."""

    inner: Any  # the algorithm's own
    t: Tensor  # [] int64 rounds done

    @property
    def x(self) -> Tensor:
        """The model [D]."""
        return self.inner.x


def reporting(algorithm: Algorithm, plan: Plan, noise_multiplier: float, rounds: int) -> Algorithm:
    """The algorithm that reports, as the metric `epsilon`, what its rounds so far have spent.

    The numbers of a run of so many `rounds` are computed beforehand, of the first rounds one by one, then of rounds in
    geometric progression, the last one among them; those between get the next one's, which is a few percent more at
    most and never less. Past the run's end ε is infinite.
    """
    at = np.unique(np.geomspace(1, rounds, _POINTS).round().astype(np.int64))
    spent = epsilons(plan, noise_multiplier, at.tolist())
    table = torch.tensor([0.0, *np.asarray(spent)[np.searchsorted(at, np.arange(1, rounds + 1))], math.inf],
                         dtype=torch.float64)  # fmt: skip

    def init_server(x: Tensor) -> Server:
        return Server(algorithm.init_server(x), x.new_zeros((), dtype=torch.int64))

    wrapped = nested(algorithm)

    def counted(server: Server, reported: Mapping[str, Tensor]) -> tuple[Server, Mapping[str, Tensor]]:
        t = server.t + 1
        return server._replace(t=t), {**reported, "epsilon": table.to(t.device)[t.clamp(max=rounds + 1)]}

    def server_update(server: Server, mean: Mean, key: Tensor) -> tuple[Server, Mapping[str, Tensor]]:
        return counted(*wrapped.server_update(server, mean, key))

    def idle(server: Server, key: Tensor) -> tuple[Server, Mapping[str, Tensor]]:
        return counted(*idled(wrapped, server, key))

    return wrapped._replace(init_server=init_server, server_update=server_update, idle=idle)


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise UsageError("privacy accounting needs dp-accounting; run `pip install vfl[privacy]`") from None
    return dp_accounting


def _event(plan: Plan, z: float, rounds: int) -> Any:
    """So many rounds, as the library describes them."""
    library, whole = _library(), plan.gaussian(rounds)
    if whole is not None:
        return library.GaussianDpEvent(z / whole[0])
    if plan.fixed_size:  # another client in its place: the sum changes by up to twice the norm
        event = library.SampledWithoutReplacementDpEvent(
            plan.population, round(plan.cohort), library.GaussianDpEvent(z / 2)
        )
    else:
        event = library.PoissonSampledDpEvent(plan.rate, library.GaussianDpEvent(z))
    return library.SelfComposedDpEvent(event, rounds)


def _accountant(plan: Plan, z: float) -> Any:
    library = _library()
    relations = library.NeighboringRelation
    relation = relations.REPLACE_ONE if plan.fixed_size else relations.ADD_OR_REMOVE_ONE
    if plan.accountant == "rdp":
        return library.rdp.RdpAccountant(neighboring_relation=relation)
    return library.pld.PLDAccountant(relation, value_discretization_interval=_interval(z))


def _interval(z: float) -> float:
    return INTERVAL * max(1.0, (_LITTLE / z) ** 2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings that it leaves out a Rényi order, which makes ε no smaller than it is."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
