"""A learning problem as pure functions of one flat vector. D parameters, B batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional

from vfl.convolution import Wanted
from vfl.errors import UsageError, unknown
from vfl.formulations import FORMULATIONS
from vfl.layers import KeyedDropout, functionalize
from vfl.names import in_norms, select
from vfl.normalization import MaskedBatchNorm
from vfl.operation import vmapped
from vfl.recompute import recompute as forgetting
from vfl.slots import Stateless
from vfl.transforms import pulled_back

if TYPE_CHECKING:
    from vfl.problems import LinearProblem

IGNORED = -100  # the label of what counts for nothing, as in torch

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [B, ...], targets [B, ...]) → one loss an example [B]."""

Weight = Tensor | tuple[()]
"""What each example's loss counts in the minibatch's mean; (), which vmap takes as no argument at all: 1."""


class Batch(NamedTuple):
    """A minibatch; rows whose mask is false are padding and count for nothing."""

    x: Tensor  # [B, ...] model inputs
    y: Tensor  # [B, ...] targets
    mask: Tensor  # [B] bool
    key: Tensor  # [] random key of this batch (dropout)
    weight: Weight = ()  # [B]


class Aux(NamedTuple):
    """What a gradient brings along."""

    loss: Tensor  # [] sum of the losses of the batch's examples, weighted where the batch is
    examples: Tensor  # [] how many there were
    buffers: tuple[Tensor, ...]  # the module's buffers after the forward pass


GradFn = Callable[[Tensor, Batch, tuple[Tensor, ...]], tuple[Tensor, Aux]]
"""(x [D], batch, buffers) → (gradient [D] of the batch's mean loss at x, aux); the mean is Σ weightⱼ ℓⱼ / B."""


class Outputs(Protocol):
    """The module's outputs [B, ...]: (x [D], batch, buffers) → outputs, as in evaluation unless `training`."""

    def __call__(
        self, x: Tensor, batch: Batch, buffers: tuple[Tensor, ...], /, *, training: bool = False
    ) -> Tensor: ...


class Task(NamedTuple):
    """A module and a loss, as functions of the flat parameter vector x [D]."""

    x: Tensor  # [D] the module's initial parameters
    buffers: tuple[Tensor, ...]  # the module's initial buffers
    grad_fn: GradFn
    evaluate: Callable[[Tensor, Batch, tuple[Tensor, ...]], dict[str, Tensor]]  # metric name → one value an example [B]
    names: tuple[str, ...]  # the parameters' names, in the order of x
    shapes: tuple[tuple[int, ...], ...]  # and their shapes
    buffer_names: tuple[str, ...]
    saved: Mapping[str, str | Tensor]  # state dict entry → the parameter or buffer it holds, or a constant
    outputs: Outputs
    norms: frozenset[str] = frozenset()  # names of the parameters and buffers of normalization layers
    problem: LinearProblem | None = None  # what theory knows about the objective on the run's data
    private: bool = False  # whether grad_fn hides single examples (`vfl.privacy.private_gradients`)

    @property
    def sizes(self) -> list[int]:
        """Entries of x that belong to each named parameter."""
        return [math.prod(shape) for shape in self.shapes]

    def refuse_private(self, method: str) -> None:
        """Raises UsageError where gradients hide single examples, for a method that compares two of one minibatch."""
        if self.private:
            raise UsageError(f"{method} compares two gradients of one minibatch, which get the same noise, so that "
                             "their difference would show single examples: it runs without --example-clip")  # fmt: skip

    def parameters(self, x: Tensor) -> dict[str, Tensor]:
        """The named parameters in the flat vector x [..., D], as views."""
        # One split, not one slice a tensor: the slices' gradients would each be a vector of D entries.
        parts = x.split(self.sizes, dim=-1)
        return {
            n: p.unflatten(-1, s) if s else p.squeeze(-1)
            for n, p, s in zip(self.names, parts, self.shapes, strict=True)
        }

    def state_dict(self, x: Tensor, buffers: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What `module.load_state_dict` of the original module takes."""
        state = self.parameters(x) | dict(zip(self.buffer_names, buffers, strict=True))
        values = {name: state[held] if isinstance(held, str) else held for name, held in self.saved.items()}
        return {name: value.detach().clone().contiguous() for name, value in values.items()}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy an example [B], in nats: outputs [B, classes], or [B, T, classes] (mean over T)."""
    scores, labels = outputs.flatten(0, -2), targets.flatten()
    if vmapped() and get_proxy_mode() is None:  # torch's takes dozens of calls there, compiled programs none
        real = labels != IGNORED
        found = functional.log_softmax(scores, -1).gather(-1, labels.where(real, 0)[:, None])
        losses = (-found[:, 0]).where(real, 0)
    else:
        losses = functional.cross_entropy(scores, labels, reduction="none", ignore_index=IGNORED)
    return losses if targets.dim() == 1 else _by_example(losses, targets).mean(1)


def logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logistic loss an example [B], in nats: log(1 + e^−z) for the label 1 and log(1 + e^z) for 0, z [B, 1] or [B]."""
    return -functional.logsigmoid((2 * targets - 1) * outputs.reshape(targets.shape))


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error an example [B], summed over the outputs."""
    return 0.5 * _by_example((outputs - targets.reshape(outputs.shape).to(outputs.dtype)).square(), outputs).sum(1)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the target's [B]; the share of positions for sequences [B, T]."""
    return _by_example((outputs.argmax(-1) == targets).to(outputs.dtype), targets).mean(1)


def binary_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where one output z [B, 1] or [B] is above 0 for the label 1, and not for 0 [B]."""
    z = outputs.reshape(targets.shape)
    return ((z > 0) == (targets > 0)).to(z.dtype)


def _by_example(values: Tensor, like: Tensor) -> Tensor:
    """One row an example [B, ...]; reshape(B, −1) could not tell how many columns an empty batch has."""
    return values.reshape(like.shape[0], math.prod(like.shape[1:]))


def task(
    module: nn.Module,
    loss: Loss = cross_entropy,
    metrics: Mapping[str, Loss] | None = None,
    *,
    frozen: str | None = None,
    regularizer: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    convolution: Wanted = "auto",
    recompute: Sequence[str] = (),
) -> Task:
    """A task from any module and any loss; the module itself is copied and left alone.

    `metrics` are evaluated beside the loss, one value an example; the default is accuracy under cross-entropy and under
    the logistic loss. A `regularizer` r(x) of the parameters x [D] is part of every example's loss, and so of the mean
    loss and gradient of any minibatch, of a client's and of a test set's loss: once, however many examples there are.
    With `compute`, such as torch.bfloat16, the layers that gain by it compute in that dtype (`torch.autocast`), while
    parameters, gradients, losses and all sums stay in `dtype`.
    `convolution` says how convolutions with weights of each client's own are computed, which changes nothing but the
    speed: `each` by one call of the library a client, `grouped` by one for all, `unfold` by a matrix product over
    unfolded inputs, `auto` by whichever is fastest here, which is timed once for every shape.
    `frozen` names parameters that are not trained, as patterns (`0.*`, `*,!last`; see `vfl.names`).
    They and those with `requires_grad` false are constants outside x, so they are neither sent nor counted; a frozen
    batch norm normalizes by its running statistics and leaves them. Batch norm ignores padding, and dropout
    draws from the batch's key. Submodules named in `recompute` keep their inputs alone and compute their activations
    again for the gradient: less memory a client, more time (`vfl.recompute`). Raises UsageError for a module with
    nothing to train and an unknown `convolution`, and `grad_fn` and `evaluate` raise it for a loss or a metric that is
    not one value an example.
    """
    if convolution not in (known := ("auto", *FORMULATIONS)):
        raise unknown("convolution", convolution, known)
    if metrics is None:
        known = accuracy if loss is cross_entropy else binary_accuracy if loss is logistic else None
        metrics = {"accuracy": known} if known else {}
    module = forgetting(functionalize(copy.deepcopy(module), convolution).to(device, dtype).train(), recompute)
    norms = in_norms(module)
    if frozen is not None:
        _freeze(module, frozen, norms)
    evaluated = copy.deepcopy(module).eval()
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise UsageError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to train")
    masks = [f"{n}.mask".lstrip(".") for n, m in module.named_modules() if isinstance(m, MaskedBatchNorm)]
    keys = [f"{n}.key".lstrip(".") for n, m in module.named_modules() if isinstance(m, KeyedDropout)]
    buffers = {n: b.detach() for n, b in module.named_buffers() if n not in {*masks, *keys}}
    held = {id(t): n for n, t in (*module.named_parameters(), *module.named_buffers()) if n in trained or n in buffers}
    entries = module.state_dict(keep_vars=True).items()
    saved = {name: held[id(t)] if id(t) in held else t.detach() for name, t in entries}
    names, shapes = tuple(trained), tuple(tuple(p.shape) for p in trained.values())
    x0 = torch.cat([p.reshape(-1) for p in trained.values()])

    def forward(
        net: Stateless, parameters: dict[str, Tensor], batch: Batch, buffers: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple]:
        # Layers may write buffers in place, which vmap allows only on tensors of its own.
        state = {n: b.clone() for n, b in zip(buffer_names, buffers, strict=True)}
        injected = dict.fromkeys(masks, batch.mask) | dict.fromkeys(keys, batch.key)
        if compute is None:
            outputs, left = net(parameters | state | injected, batch.x)
        else:
            # The cache would keep casts of one gradient's parameters for another's.
            with torch.autocast(x0.device.type, compute, cache_enabled=False):
                outputs, left = net(parameters | state | injected, batch.x)
            outputs = outputs.to(x0.dtype)
        return outputs, tuple(left[n].detach() for n in buffer_names)

    def each(name: str, function: Loss, outputs: Tensor, batch: Batch) -> Tensor:
        values = function(outputs, batch.y)
        if values.shape != batch.mask.shape:  # a mean over the batch would silently count the padding
            wanted, got = list(batch.mask.shape), list(values.shape)
            raise UsageError(f"{name} must be one value an example, {wanted}, not {got}; reduction='none' may give it")
        return values

    def losses(parameters: dict[str, Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        values = each("loss", loss, outputs, batch)
        if isinstance(batch.weight, Tensor):
            values = values * batch.weight
        if regularizer is None:
            return values
        return values + regularizer(torch.cat([p.reshape(-1) for p in parameters.values()]))

    def grad_fn(x: Tensor, batch: Batch, buffers: tuple[Tensor, ...]) -> tuple[Tensor, Aux]:
        def learn(leaves: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
            parameters = dict(zip(names, leaves, strict=True))
            outputs, after = forward(learning, parameters, batch, buffers)
            return losses(parameters, outputs, batch), after

        examples = batch.mask.sum()
        # The mean's gradient is the losses' gradients with these weights, so the mean itself is not computed.
        share = batch.mask.to(x.dtype) / examples.clamp(min=1)
        pieces, values, after = pulled_back(learn, list(made.parameters(x).values()), share)
        g = torch.cat([piece.flatten() for piece in pieces])
        return g, Aux(torch.where(batch.mask, values, 0).sum(), examples, after)

    def evaluate(x: Tensor, batch: Batch, buffers: tuple[Tensor, ...]) -> dict[str, Tensor]:
        parameters = made.parameters(x)
        outputs, _ = forward(evaluating, parameters, batch, buffers)
        values = {name: each(name, f, outputs, batch) for name, f in metrics.items()}
        return {"loss": losses(parameters, outputs, batch)} | values

    def outputs(x: Tensor, batch: Batch, buffers: tuple[Tensor, ...], *, training: bool = False) -> Tensor:
        return forward(learning if training else evaluating, made.parameters(x), batch, buffers)[0]

    buffer_names = tuple(buffers)
    learning, evaluating = (Stateless(net, [*names, *buffer_names, *masks, *keys]) for net in (module, evaluated))
    made = Task(x0, tuple(buffers.values()), grad_fn, evaluate, names, shapes, buffer_names, saved, outputs, norms)
    return made


def _freeze(module: nn.Module, patterns: str, norms: frozenset[str]) -> None:
    """Makes the parameters that the patterns name constants of the module, and a batch norm's statistics with them."""
    parameters = dict(module.named_parameters())
    chosen = select(patterns, list(parameters), [n for n, _ in module.named_buffers()], norms, "frozen")
    for name in chosen & parameters.keys():
        parameters[name].requires_grad_(False)
    for prefix, layer in module.named_modules():
        if isinstance(layer, MaskedBatchNorm) and f"{prefix}.running_mean".lstrip(".") in chosen:
            layer.eval()
