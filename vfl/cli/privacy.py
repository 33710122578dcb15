"""`vfl privacy`: the noise of a target ε, or the ε of a noise, before a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from vfl.errors import UsageError, flag
from vfl.privacy import Context, Plan, Privacy, epsilons, make_plan, solve_noise_multiplier
from vfl.privacy.accounting import Accountant
from vfl.privacy.options import Mechanism
from vfl.samplers import sampler
from vfl.spec import parse
from vfl.terminal import facts, section, table, terminal

_SHARES = (0.1, 0.25, 0.5, 0.75)  # of the rounds, at which the table shows ε, too


class Words(NamedTuple):
    """How a mechanism's numbers are called."""

    noise: str  # where it is
    unit: str  # what the noise multiplier multiplies
    neighbours: str  # what is as hard to tell apart as ε says


_WORDS = {
    "central": Words("on the mean", "--clip", "one client more or less"),
    "ftrl": Words("of a node", "--clip", "one client's messages more or less"),
    "local": Words("on a message", "--clip", "another data set of the client, seen by who gets all of its messages"),
    "examples": Words("on a minibatch's sum", "--example-clip",
                      "another example in one's place, seen by who gets all of the client's messages"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrivacyCommand:
    """Solves for the noise multiplier with which a run has a target ε, or gives the ε of a noise multiplier."""

    clients: int | None = None
    """Population: how many clients there are."""
    clients_per_round: str = "10"
    """Clients that take part in a round: a count, a fraction of the population (0.1 or 10%), or all."""
    rounds: int = 100
    """Communication rounds of the whole run."""
    local_epochs: int = 1
    """Passes over a client's own examples in a round (examples)."""
    target_epsilon: float | None = None
    """The ε that the whole run may spend."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise, in units of the norm that messages, or gradients of examples, are clipped to."""
    delta: Annotated[float | None, tyro.conf.arg(help_behavior_hint="(default: 1 / (10 clients))")] = None
    """δ, the probability that ε does not hold; well below one over the number of clients, or of a client's examples."""
    sampling: str = "poisson"
    """How clients are drawn: poisson, uniform (known to rdp alone), or fixed (the same ones in every round). Those of
    local and examples are taken to be in every round."""
    accountant: Accountant = "pld"
    """How ε is computed: pld (privacy loss distributions: tight) or rdp (Rényi)."""
    mechanism: Mechanism | Literal["examples"] = "central"
    """central: noise on the clients' sum, drawn afresh in each round; ftrl: that of a binary tree over the rounds;
    local: on each client's message; examples: on the minibatches of epochs (--example-noise), for methods that take
    one gradient of each and send nothing else of the data, such as fedavg."""

    def check(self) -> None:
        """Raises UsageError for a value out of range, and for no noise to give or two."""
        for name in ("clients", "rounds", "local_epochs"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                bound = "at least 1" if value < 1 else f"below {2**31}"
                raise UsageError(f"{flag(name)} must be {bound}, not {value}")
        if self.mechanism == "examples" and self.delta is None:
            raise UsageError(
                "--mechanism examples needs --delta, well below one over the number of a client's examples"
            )
        if self.mechanism != "examples" and self.local_epochs != 1:
            raise UsageError(f"--local-epochs belongs to --mechanism examples, not {self.mechanism}")
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise UsageError("vfl privacy needs one of --target-epsilon, to solve for the noise, and "
                             "--noise-multiplier, to give its ε")  # fmt: skip
        z = self.noise_multiplier
        if z is not None and not (2**-5 <= z < math.inf):
            raise UsageError(f"--noise-multiplier must be a finite number from {2**-5} on, not {z}")

    def plan(self) -> tuple[Plan, Context]:
        """What the accountant is told, and the run that it is told of; of examples, a client that is in every round."""
        if self.mechanism == "examples":
            delta = self.delta or 0.0
            make_plan("fixed", 1, 1, delta, self.accountant)  # refuses what is no δ
            return Plan(1, 1.0, delta, self.accountant, replaced=True), Context(1, 1, "fixed", self.rounds)
        if self.clients is None:
            raise UsageError("vfl privacy needs --clients, the population")
        if parse(self.sampling).args:
            sampler(self.sampling, self.clients_per_round, np.arange(self.clients + 1))  # refuses lists that cannot be
        delta = 1 / (10 * self.clients) if self.delta is None else self.delta
        context = Context(self.clients, self.clients_per_round, self.sampling, self.rounds)
        options = Privacy(clip=1, noise_multiplier=1, mechanism=self.mechanism, delta=delta, accountant=self.accountant)
        return options.plan(context), context

    def run(self) -> None:
        """Prints the noise, and ε as the rounds go by."""
        self.check()
        (plan, context), z, console = self.plan(), self.noise_multiplier, terminal()
        times = self.local_epochs  # noisy sums a round that the client, or the example, is in
        if self.target_epsilon is not None:
            z = solve_noise_multiplier(plan, self.target_epsilon, times * self.rounds)
        z = z or 0.0
        shown = sorted({1, *(math.ceil(share * self.rounds) for share in _SHARES), self.rounds})
        spent = epsilons(plan, z, [times * t for t in shown])
        words, cohort = _WORDS[self.mechanism], 1 if plan.replaced else context.cohort
        pairs = {
            "noise multiplier": f"{math.ceil(z * 1e6) / 1e6:.6f}",
            f"noise {words.noise}": f"N(0, σ²), σ = {z / cohort:.4g} × {words.unit}",
            "ε": f"{spent[-1]:.4f} after {self.rounds:,} rounds",
            "δ": f"{plan.delta:g}",
            "neighbours": "one client replaced" if plan.fixed_size else words.neighbours,
            "accountant": self.accountant,
        }
        if not plan.replaced:
            chosen = f"{cohort:g} of {context.population:,} clients a round, q = {plan.rate:g}"
            pairs["sampling"] = f"{self.sampling}, {chosen}"
        if plan.tree:
            k, left = plan.participations(self.rounds)
            sure = "surely" if left == plan.delta else f"but for a probability of {plan.delta - left:g}, a part of δ"
            pairs["rounds of a client"] = f"at most {k:,}, {sure}"
        if self.mechanism == "examples":
            pairs["minibatches"] = f"{times} a round that hold the example; their order is not taken to hide it"
        whose = "single examples" if self.mechanism == "examples" else f"clients ({self.mechanism})"
        section(console, f"differential privacy of {whose}", facts(pairs))
        rows = table(">rounds", ">ε")
        for t, value in zip(shown, spent, strict=True):
            rows.add_row(f"{t:,}", f"{value:.4f}")
        section(console, "\nε as the rounds go by", rows)
