"""`vfl privacy`: the noise of a target ε, or the ε of a noise, before a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from vfl.errors import UsageError
from vfl.privacy import Context, Plan, epsilons, make_plan, solve_noise_multiplier
from vfl.privacy.accounting import Accountant
from vfl.terminal import facts, section, table, terminal

_SHARES = (0.1, 0.25, 0.5, 0.75)  # of the rounds, at which the table shows ε, too


@dataclass(frozen=True, kw_only=True)
class PrivacyCommand:
    """Solves for the noise multiplier with which a run has a target ε, or gives the ε of a noise multiplier."""

    clients: int
    """Population: how many clients there are."""
    clients_per_round: str = "10"
    """Clients that take part in a round: a count, a fraction of the population (0.1 or 10%), or all."""
    rounds: int = 100
    """Communication rounds of the whole run."""
    target_epsilon: float | None = None
    """The ε that the whole run may spend."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise on the clients' sum, in units of the norm that their messages are clipped to."""
    delta: Annotated[float | None, tyro.conf.arg(help_behavior_hint="(default: 1 / (10 clients))")] = None
    """δ, the probability that ε does not hold; well below one over the number of clients."""
    sampling: str = "poisson"
    """How clients are drawn: poisson, uniform (known to rdp alone), or fixed (the same ones in every round)."""
    accountant: Accountant = "pld"
    """How ε is computed: pld (privacy loss distributions: tight) or rdp (Rényi)."""
    mechanism: Literal["central", "ftrl"] = "central"
    """central: noise drawn afresh in each round; ftrl: that of a binary tree over the rounds."""

    def check(self) -> None:
        """Raises UsageError for a value out of range, and for no noise to give or two."""
        for name, value in (("clients", self.clients), ("rounds", self.rounds)):
            if not 1 <= value < 2**31:
                raise UsageError(f"--{name} must be {'at least 1' if value < 1 else f'below {2**31}'}, not {value}")
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise UsageError("vfl privacy needs one of --target-epsilon, to solve for the noise, and "
                             "--noise-multiplier, to give its ε")  # fmt: skip
        z = self.noise_multiplier
        if z is not None and not (2**-5 <= z < math.inf):
            raise UsageError(f"--noise-multiplier must be a finite number from {2**-5} on, not {z}")

    def plan(self) -> Plan:
        """What the accountant is told."""
        delta = 1 / (10 * self.clients) if self.delta is None else self.delta
        tree = self.mechanism == "ftrl"
        return make_plan(self.sampling, self.clients_per_round, self.clients, delta, self.accountant, tree)

    def run(self) -> None:
        """Prints the noise, and ε as the rounds go by."""
        self.check()
        plan, z, console = self.plan(), self.noise_multiplier, terminal()
        if self.target_epsilon is not None:
            z = solve_noise_multiplier(plan, self.target_epsilon, self.rounds)
        z = z or 0.0
        cohort = Context(self.clients, self.clients_per_round, self.sampling, self.rounds).cohort
        shown = sorted({1, *(math.ceil(share * self.rounds) for share in _SHARES), self.rounds})
        spent = epsilons(plan, z, shown)
        relation = "one client replaced" if plan.fixed_size else "one client more or less"
        pairs = {
            "noise multiplier": f"{math.ceil(z * 1e6) / 1e6:.6f}",
            "noise of a node" if plan.tree else "noise on the mean": f"N(0, σ²), σ = {z / cohort:.4g} × --clip",
            "ε": f"{spent[-1]:.4f} after {self.rounds:,} rounds",
            "δ": f"{plan.delta:g}",
            "sampling": f"{self.sampling}, {cohort:g} of {self.clients:,} clients a round, q = {plan.rate:g}",
            "neighbours": relation,
            "accountant": self.accountant,
        }
        if plan.tree:
            k, left = plan.participations(self.rounds)
            sure = "surely" if left == plan.delta else f"but for a probability of {plan.delta - left:g}, a part of δ"
            pairs["rounds of a client"] = f"at most {k:,}, {sure}"
        section(console, f"{self.mechanism} differential privacy of clients", facts(pairs))
        rows = table(">rounds", ">ε")
        for t, value in zip(shown, spent, strict=True):
            rows.add_row(f"{t:,}", f"{value:.4f}")
        section(console, "\nε as the rounds go by", rows)
