"""What the compressed-gradient methods share: one gradient a client, compressed, and a step of the server along g.

Letters: D parameters, S a cohort, N the population, K local steps. A client's gradient gᵢ is the mean of its minibatch
gradients along K local steps y ← y − η g: with K = 1, as the papers have it, the gradient at the model it was sent (on
all of its data with batch-size all); with K > 1 it is (x − y)/(Kη), so that γ keeps the scale of a gradient step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from vfl.base import Metrics, Tree
from vfl.compressors import Compressor
from vfl.errors import UsageError
from vfl.local import Batches, float_bits, keep_where
from vfl.optimizers import clip_norm
from vfl.task import Task
from vfl.theory import Setting
from vfl.training import LocalTraining, ModelAndRate, Trainer


class Smoothness(Protocol):
    """The constants of f = (1/N) Σ fᵢ that step sizes depend on."""

    @property
    def L(self) -> float:  # noqa: N802
        """∇f is L-Lipschitz."""
        ...

    @property
    def L_tilde(self) -> float:  # noqa: N802
        """√(mean Lᵢ²), with ∇fᵢ Lᵢ-Lipschitz."""
        ...

    @property
    def L_max(self) -> float:  # noqa: N802
        """The largest Lᵢ."""
        ...

    @property
    def mu(self) -> float:
        """f is μ-strongly convex; 0 where it is not."""
        ...


@dataclass(frozen=True, kw_only=True)
class CompressedGradient(LocalTraining):
    """Clients send compressed gradients; x ← x − γ g with g the server's estimate of the gradient."""

    compressor: str = "rand_k:0.2"
    """How clients compress what they send: rand_k:0.2, natural, ... (see `vfl list compressors`)."""
    weighting: Literal["examples", "uniform", "steps"] = "uniform"
    """A client's weight in the mean: 1, since the methods minimise the clients' plain mean."""
    server_lr: float = 0.1
    """Server step size γ, in x ← x − γ g."""
    local_lr: float = 0.1
    """Client step size η; it matters with more than one local step alone."""

    compresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting != "uniform":
            raise UsageError(f"{self.method} averages its clients uniformly, so weighting cannot be {self.weighting!r}")
        if self.local_optimizer != "sgd":
            raise UsageError(
                f"{self.method} reads gradients off plain local steps, so local-optimizer must be sgd, "
                f"not {self.local_optimizer!r}"
            )

    @property
    def method(self) -> str:
        """The method's name in messages."""
        return type(self).__name__.lower()

    def step_size(self, smoothness: Smoothness, task: Task, population: int, clients: int | None = None) -> float:
        """The γ (server-lr) that the method's theorem allows with full gradients, K = 1 and plain sgd on the server.

        `clients` of the N = population take part in a round; None: all. Raises UsageError where no theorem gives one.
        """
        raise UsageError(f"{self.method} has no step size from theory; tune server-lr")

    def by_theory(self, setting: Setting) -> Self:
        """The same method with `step_size` as server-lr. Raises UsageError with more than one local step."""
        if setting.steps > 1:
            raise UsageError(f"{self.method}'s theorem has one local step a round, not {setting.steps}: use batch-size "
                             "all and one local epoch, or local-steps 1")  # fmt: skip
        clients = None if setting.clients == setting.population else setting.clients
        gamma = self.step_size(setting.smoothness, setting.task, setting.population, clients)
        return replace(self, server_lr=gamma)

    def unbiased(self, trainer: Trainer) -> float:
        """ω of the compressor. Raises UsageError for a biased one."""
        c = trainer.compressor
        if c.omega is None:
            raise UsageError(
                f"{self.method} needs an unbiased compressor, which {c.name} is not: rand_k, natural or qsgd would do, "
                "or the algorithm ef21"
            )
        return c.omega

    def contractive(self, trainer: Trainer) -> float:
        """α of the compressor. Raises UsageError for one that is not known to contract."""
        c = trainer.compressor
        if c.alpha is None:
            raise UsageError(
                f"{self.method} needs a contractive compressor, which {c.name} is not known to be: top_k, rank_k, sign "
                "or compose(top_k:K,natural) would do"
            )
        return c.alpha

    def uncompressed_downlink(self) -> None:
        """Raises UsageError for a compressed downlink."""
        if self.downlink != "identity":
            raise UsageError(
                f"{self.method} compares gradients at the server's last two models, so clients must get these as they "
                f"are: downlink must be identity, not {self.downlink!r}"
            )


@dataclass(frozen=True, kw_only=True)
class ShiftedGradient(CompressedGradient):
    """Clients send compressed differences to a shift hᵢ that both sides know; the server keeps h = (1/N) Σ hᵢ."""

    shifts: Literal["zero", "gradient"] = "zero"
    """Where a client's shift starts: zero, or its own gradient, sent uncompressed when it first takes part."""
    local_direction: Literal["gradient", "corrected"] = "gradient"
    """What several local steps descend: the gradient g, or g − hᵢ + h, for which the server sends h too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shifts not in ("zero", "gradient"):
            raise UsageError(f"shifts must be zero or gradient, not {self.shifts!r}")
        if self.local_direction not in ("gradient", "corrected"):
            raise UsageError(f"local-direction must be gradient or corrected, not {self.local_direction!r}")

    @property
    def corrected(self) -> bool:
        """Whether local steps are corrected for the clients' drift."""
        return self.local_direction == "corrected"


class Sent(NamedTuple):
    """What the server of a shifted method sends."""

    x: Tensor  # [D] the model
    h: Tree  # [D] the mean shift where local steps are corrected, else ()
    lr: Tensor  # [] η of this round


class Shift(NamedTuple):
    """A client's state."""

    h: Tensor  # [D] the shift hᵢ
    started: Tree  # bool [] whether hᵢ has been the client's gradient; () when shifts start at zero


class Difference(NamedTuple):
    """A client's difference to its shift, as the server decodes it."""

    m: Tensor  # [D] C(g − hᵢ), or g as it is when a shift starts
    change: Tree  # [D] of hᵢ where it is not a·m for everyone, else (); the server can tell it from m
    bits: Tensor  # []


def init_shift(config: ShiftedGradient, x: Tensor) -> Shift:
    """The shift of a client that has not taken part yet."""
    return Shift(torch.zeros_like(x), () if config.shifts == "zero" else x.new_zeros((), dtype=torch.bool))


def difference(c: Compressor, g: Tensor, shift: Shift, a: float, key: Tensor) -> tuple[Difference, Shift]:
    """What a client with gradient g [D] sends, and its new shift hᵢ + a·C(g − hᵢ); g itself when the shift starts."""
    m, bits = c.compress(g - shift.h, key)
    if isinstance(shift.started, tuple):
        return Difference(m, (), bits), Shift(torch.add(shift.h, m, alpha=a), ())
    m = torch.where(shift.started, m, g)
    change = torch.where(shift.started, a * m, g)
    bits = torch.where(shift.started, bits, float_bits(g))
    return Difference(m, change, bits), Shift(shift.h + change, torch.ones_like(shift.started))


def local_gradient(
    trainer: Trainer, sent: ModelAndRate, batches: Batches, correction: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """The client's gradient [D] at the model sent: the mean over its local steps y ← y − η (g(y) + correction [D])."""
    y, buffers = sent.x, batches.buffers
    total = loss = examples = sent.x.new_zeros(())
    for k in range(batches.longest):
        g, aux = trainer.task.grad_fn(y, batches.at(k), buffers)
        if trainer.config.clip_norm is not None:
            g = clip_norm(g, trainer.config.clip_norm)
        step = y
        if k + 1 < batches.longest:  # nobody descends from where the last step would lead
            direction = g if correction is None else g + correction
            step = torch.addcmul(y, direction, sent.lr.to(y.dtype), value=-1)
        after = step, g if k == 0 else total + g, aux.buffers
        if k < batches.shortest:
            y, total, buffers = after
        else:  # clients that are done stay where they are
            y, total, buffers = keep_where(k < batches.steps, after, (y, total, buffers))
        loss, examples = loss + aux.loss, examples + aux.examples
    mean = total / batches.steps if batches.longest > 1 else total
    return mean, Metrics(loss, examples, examples, buffers)
