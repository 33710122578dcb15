"""The options of a private run, and how they wrap an algorithm and a task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from vfl.base import Algorithm
from vfl.errors import UsageError, flag, unknown
from vfl.privacy.accounting import Accountant, Plan, make_plan, reporting, solve_noise_multiplier
from vfl.privacy.central import Adaptive, private
from vfl.privacy.examples import private_gradients, refuse_buffers
from vfl.privacy.local import classical_multiplier, locally_private
from vfl.privacy.noise import Estimator, tree
from vfl.spec import parse
from vfl.task import Task
from vfl.wrappers import Context

Mechanism = Literal["central", "local", "ftrl"]


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Differential privacy of the clients, and of their single examples."""

    clip: float | None = None
    """Largest norm of all that a client sends; longer messages are scaled down to it. None: no privacy of clients."""
    mechanism: Mechanism = "central"
    """central: the server adds noise to the clients' sum; local: each client to what it sends; ftrl: the server adds
    the noise of a binary tree over the rounds, for one vector a client."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise, in units of the norm that a client's message is clipped to."""
    target_epsilon: float | None = None
    """Solve for the noise with which the whole run has this ε, in place of --noise-multiplier."""
    delta: float | None = None
    """δ; where given, ε is reported round by round as the metric epsilon: of a client more or less, or, where cohorts
    are of one size and where noise is local, of another client's data in its place."""
    accountant: Accountant = "pld"
    """How ε is computed: pld (privacy loss distributions: tight) or rdp (Rényi: for --sampling uniform, too)."""
    adaptive_clip_quantile: float | None = None
    """Let the norm follow this quantile of the messages' norms, from --clip on, for instance 0.5 (central)."""
    adaptive_clip_lr: float = 0.2
    """Step of the adaptive norm, which moves by a factor of at most its exponential in a round."""
    count_noise: float | None = None
    """Noise on the number of clients that are not clipped, of which the adaptive norm learns. None: cohort / 20."""
    tree_estimator: Estimator = "honaker"
    """How ftrl estimates its prefix sums: honaker (from the whole subtree: less noise) or binary."""
    message_epsilon: float | None = None
    """ε of a single message against none, σ = √(2 ln(1.25/δ))·Δ/ε as in FLUTE, in place of --noise-multiplier
    (local)."""
    scale_messages: bool = False
    """Scale shorter messages up to the norm, too (local)."""
    max_weight: float | None = None
    """Send the clients' weights with noise, too, clamped to at most this (local). None: clients weigh the same."""
    min_weight: float = 1e-3
    """Least weight of a client where weights are sent with noise (local)."""
    example_clip: float | None = None
    """Largest norm of a single example's gradient in the clients' local steps (DP-SGD). None: examples are not
    clipped."""
    example_noise: float = 0.0
    """Standard deviation of the noise on a minibatch's sum of gradients, in units of --example-clip."""

    def __post_init__(self) -> None:
        for name in ("clip", "target_epsilon", "message_epsilon", "count_noise", "max_weight", "example_clip",
                     "min_weight"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{flag(name)} must be a finite number > 0, not {value}")
        for name in ("noise_multiplier", "adaptive_clip_lr", "example_noise"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"{flag(name)} must be a finite number ≥ 0, not {value}")
        for name in ("delta", "adaptive_clip_quantile"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UsageError(f"{flag(name)} must lie between 0 and 1, not {value}")
        for name, kinds in (("mechanism", Mechanism), ("accountant", Accountant), ("tree_estimator", Estimator)):
            if getattr(self, name) not in get_args(kinds):
                raise unknown(name, str(getattr(self, name)), get_args(kinds))
        self._check_combination()

    def _check_combination(self) -> None:
        """Raises UsageError for options that need or exclude each other."""
        noises = [n for n in ("noise_multiplier", "target_epsilon", "message_epsilon") if getattr(self, n) is not None]
        if len(noises) > 1:
            raise UsageError(f"{flag(noises[0])} and {flag(noises[1])} both say how much noise; give one of them")
        if self.clip is None:
            given = [*noises, *(n for n in ("adaptive_clip_quantile", "delta") if getattr(self, n) is not None)]
            given += ["mechanism"] if self.mechanism != "central" else []
            if given:
                raise UsageError(f"{flag(given[0])} needs --clip, the largest norm of what a client sends")
        for name in ("target_epsilon", "message_epsilon"):
            if getattr(self, name) is not None and self.delta is None:
                raise UsageError(f"{flag(name)} needs --delta, such as one over ten times the number of clients")
        for mechanism, names in _ONLY.items():
            for name in names:
                if self.mechanism != mechanism and getattr(self, name) != getattr(Privacy, name):
                    raise UsageError(f"{flag(name)} belongs to --mechanism {mechanism}, not {self.mechanism}")
        if self.delta is not None and not any(getattr(self, n) for n in noises):
            raise UsageError("--delta asks for ε, which is infinite without noise; give --noise-multiplier or "
                             "--target-epsilon, or leave it out")  # fmt: skip
        for name in ("adaptive_clip_lr", "count_noise"):
            if getattr(self, name) != getattr(Privacy, name) and self.adaptive_clip_quantile is None:
                raise UsageError(f"{flag(name)} belongs to an adaptive norm; give --adaptive-clip-quantile, too")
        for name, needed in (("accountant", "delta"), ("min_weight", "max_weight")):
            if getattr(self, name) != getattr(Privacy, name) and getattr(self, needed) is None:
                raise UsageError(f"{flag(name)} needs {flag(needed)}, without which it has no effect")
        if self.max_weight is not None and self.min_weight > self.max_weight:
            raise UsageError(f"--min-weight {self.min_weight:g} is above --max-weight {self.max_weight:g}")
        if self.example_noise and self.example_clip is None:
            raise UsageError("--example-noise needs --example-clip, the largest norm of an example's gradient")

    def gradients(self, task: Task) -> Task:
        """The task with private gradients of single examples; itself without --example-clip.

        An algorithm must be built from it. Raises UsageError for a model with buffers.
        """
        return task if self.example_clip is None else private_gradients(task, self.example_clip, self.example_noise)

    def wrap(self, algorithm: Algorithm, task: Task, context: Context) -> Algorithm:
        """The algorithm with the privacy of its clients; itself without --clip.

        Raises UsageError where the model has buffers, where ε is asked for and the sampler or the algorithm is not what
        the accountant assumes, where dp-accounting is missing, and for --example-clip and a task without it.
        """
        if self.example_clip is not None and not task.private:
            raise UsageError("--example-clip changes the task's gradients: build the algorithm from the task that "
                             "Privacy.gradients returns, and play with it")  # fmt: skip
        if self.clip is None:
            return algorithm
        refuse_buffers(task)
        name = parse(context.sampling).name
        if name in ("replacement", "weighted"):
            raise UsageError(f"--sampling {name} lets a client count more than once, so that clipping does not bound "
                             "what it changes; use --sampling poisson, uniform or fixed")  # fmt: skip
        if algorithm.everyone is not None and context.cohort < context.population:
            raise UsageError("this algorithm asks all clients in some rounds and a sample in others, while noise and "
                             "accounting need one rate; use --clients-per-round all")  # fmt: skip
        if algorithm.combine is not None or algorithm.receive is not None:
            raise UsageError("privacy is that of a noisy mean of clipped messages; leave --aggregator at mean")
        plan = None if self.delta is None else self.plan(context)
        z = self.multiplier(plan, context.rounds)
        wrapped = self._wrapped(algorithm, z, self.clip, context)
        return wrapped if plan is None or z == 0 else reporting(wrapped, plan, z, context.rounds)

    def plan(self, context: Context) -> Plan:
        """What the accountant is told. Raises UsageError without --delta and for a sampler that it does not know."""
        if self.delta is None:
            raise UsageError("accounting needs --delta, such as one over ten times the number of clients")
        if self.mechanism == "local":  # at most in every round, where the server sees whose message it is
            return Plan(context.population, 1.0, self.delta, self.accountant, replaced=True)
        tree = self.mechanism == "ftrl"
        return make_plan(
            context.sampling, context.clients_per_round, context.population, self.delta, self.accountant, tree
        )

    def multiplier(self, plan: Plan | None, rounds: int) -> float:
        """z: as given, as solved for, or 0."""
        if self.target_epsilon is not None and plan is not None:
            return solve_noise_multiplier(plan, self.target_epsilon, rounds)
        if self.message_epsilon is not None and self.delta is not None:
            return classical_multiplier(self.message_epsilon, self.delta)
        return self.noise_multiplier or 0.0

    def _wrapped(self, algorithm: Algorithm, z: float, clip: float, context: Context) -> Algorithm:
        if self.mechanism == "local":
            weights = None if self.max_weight is None else (self.min_weight, self.max_weight)
            return locally_private(algorithm, clip=clip, noise_multiplier=z, weights=weights, scale=self.scale_messages)
        adaptive = None
        if self.adaptive_clip_quantile is not None:
            count_noise = context.cohort / 20 if self.count_noise is None else self.count_noise
            adaptive = Adaptive(self.adaptive_clip_quantile, count_noise, self.adaptive_clip_lr)
        noise = tree(context.rounds.bit_length(), self.tree_estimator) if self.mechanism == "ftrl" else None
        return private(algorithm, clip=clip, noise_multiplier=z, cohort=context.cohort, adaptive=adaptive, noise=noise)


_ONLY: dict[str, tuple[str, ...]] = {
    "central": ("adaptive_clip_quantile", "adaptive_clip_lr", "count_noise"),
    "local": ("message_epsilon", "scale_messages", "max_weight", "min_weight"),
    "ftrl": ("tree_estimator",),
}
