"""Optimizers as pure functions of one flat vector x [D], for the server's step and the clients' local steps alike.

Letters: D parameters, L layers. Every tensor may carry a vmap axis; nothing is changed in place. `g` is the direction
to descend: a gradient, or the server's pseudo-gradient (old model minus mean of the new ones), for which Reddi et al.
(2003.00295) write −Δ. Meant for float32 and float64; a counter in half precision would stop counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vfl.base import Tree
from vfl.errors import UsageError
from vfl.spec import resolve

OptState = Tree
"""An optimizer's memory: a NamedTuple of tensors, `()` when there is none."""

_Rule = Callable[[Tensor, Tensor], Tensor]


class Optimizer(NamedTuple):
    """`init(x) -> state` and `step(g, state, x, lr) -> (x⁺, state⁺)`; lr [] is a number, or a tensor on x's device."""

    init: Callable[[Tensor], OptState]
    step: Callable[[Tensor, OptState, Tensor, Tensor | float], tuple[Tensor, OptState]]


class Momentum(NamedTuple):
    """Memory of sgd and lars with momentum."""

    m: Tensor  # [D]
    first: Tree = ()  # [] 1 before the first step, 0 after it; () without dampening


class Moments(NamedTuple):
    """Memory of the Adam family."""

    m: Tree  # [D] running mean of g; () when b1 = 0
    v: Tensor  # [D] running mean (adagrad: sum) of g²
    count: Tree  # [] steps taken; () without bias correction


class RMSProp(NamedTuple):
    """Memory of rmsprop."""

    v: Tensor  # [D] running mean of g²
    mean: Tree  # [D] running mean of g; () unless centered
    m: Tree  # [D] momentum; () without


def sgd(momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    """Gradient descent; m ← momentum·m + (1 − dampening)·g, and m = g in the first step, as torch.optim.SGD.

    Without momentum the state is `()` and a step is one axpy. FedAvgM (Hsu et al. 1909.06335) is `sgd:momentum=0.9`.
    """
    _fractions("sgd", momentum=momentum, dampening=dampening)
    _not_negative("sgd", weight_decay=weight_decay)
    if not momentum and (nesterov or dampening):
        raise UsageError(f"sgd: {'nesterov' if nesterov else 'dampening'} needs a momentum > 0")
    if nesterov and dampening:
        raise UsageError(f"sgd: nesterov needs dampening = 0, not {dampening}")

    def init(x: Tensor) -> OptState:
        if not momentum:
            return ()
        return Momentum(torch.zeros_like(x), x.new_ones(()) if dampening else ())

    def step(g: Tensor, state: OptState, x: Tensor, lr: Tensor | float) -> tuple[Tensor, OptState]:
        g = _decayed(g, x, weight_decay)
        if not momentum:
            return _descend(x, g, lr), state
        fresh, first = g, state.first
        if dampening:
            fresh, first = g * (1 - dampening * (1 - first)), torch.zeros_like(first)
        m = torch.add(fresh, state.m, alpha=momentum)
        u = torch.add(g, m, alpha=momentum) if nesterov else m
        return _descend(x, u, lr), Momentum(m, first)

    return Optimizer(init, step)


def adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    initial_v: float = 0.0,
) -> Optimizer:
    """Adam (Kingma & Ba 1412.6980); `weight_decay` is an L2 term in the gradient.

    FedAdam (Reddi et al. 2003.00295, Algorithm 2) with τ = 1e-3 has no bias correction and v₋₁ = τ²:
    `adam:b2=0.99,eps=1e-3,bias_correction=false,initial_v=1e-6`.
    """
    return _adaptive("adam", _mean_square(b2), b1, b2, eps, initial_v, bias_correction, weight_decay)


def adamw(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    initial_v: float = 0.0,
) -> Optimizer:
    """Adam with decoupled weight decay, x ← x − lr·(u + weight_decay·x) (Loshchilov & Hutter 1711.05101)."""
    _not_negative("adamw", weight_decay=weight_decay)

    def rescale(u: Tensor, x: Tensor) -> Tensor:
        return _decayed(u, x, weight_decay)

    return _adaptive("adamw", _mean_square(b2), b1, b2, eps, initial_v, bias_correction, rescale=rescale)


def yogi(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-3,
    weight_decay: float = 0.0,
    bias_correction: bool = False,
    initial_v: float = 1e-6,
) -> Optimizer:
    """Yogi, v ← v − (1 − b2)·g²·sign(v − g²) (Zaheer et al., NeurIPS 2018, Algorithm 2); no bias correction there.

    FedYogi (Reddi et al. 2003.00295, Algorithm 2) with τ = 1e-3 is `yogi:b2=0.99`.
    """

    def second(v: Tensor, g: Tensor) -> Tensor:
        square = g * g
        return torch.addcmul(v, square, torch.sign(v - square), value=b2 - 1)

    return _adaptive("yogi", second, b1, b2, eps, initial_v, bias_correction, weight_decay)


def adagrad(eps: float = 1e-10, initial_v: float = 0.0, weight_decay: float = 0.0, b1: float = 0.0) -> Optimizer:
    """Adagrad, v ← v + g² (Duchi et al., JMLR 2011), with a running mean of g in its place when b1 > 0.

    FedAdagrad (Reddi et al. 2003.00295, Algorithm 2) with τ = 1e-3 is `adagrad:eps=1e-3,initial_v=1e-6`; the
    algorithm has a b1, which its experiments set to 0.
    """

    def second(v: Tensor, g: Tensor) -> Tensor:
        return torch.addcmul(v, g, g)

    return _adaptive("adagrad", second, b1, 0.0, eps, initial_v, False, weight_decay)


def rmsprop(
    alpha: float = 0.99, eps: float = 1e-8, momentum: float = 0.0, centered: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """RMSProp (Hinton's lecture 6e; centered: Graves 1308.0850, eq. 38 to 45), as torch.optim.RMSprop."""
    _fractions("rmsprop", alpha=alpha, momentum=momentum)
    _positive("rmsprop", eps=eps)
    _not_negative("rmsprop", weight_decay=weight_decay)
    second = _mean_square(alpha)

    def init(x: Tensor) -> OptState:
        mean = torch.zeros_like(x) if centered else ()
        return RMSProp(torch.zeros_like(x), mean, torch.zeros_like(x) if momentum else ())

    def step(g: Tensor, state: OptState, x: Tensor, lr: Tensor | float) -> tuple[Tensor, OptState]:
        g = _decayed(g, x, weight_decay)
        v, mean, m = second(state.v, g), state.mean, state.m
        variance = v
        if centered:
            mean = torch.lerp(mean, g, 1 - alpha)
            variance = torch.addcmul(v, mean, mean, value=-1).clamp(min=0)  # rounding may leave it below zero
        u = g / (variance.sqrt() + eps)
        if momentum:
            u = m = torch.add(u, m, alpha=momentum)
        return _descend(x, u, lr), RMSProp(v, mean, m)

    return Optimizer(init, step)


def lamb(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    *,
    sizes: Sequence[int] | None = None,
) -> Optimizer:
    """LAMB (You et al. 1904.00962, Algorithm 2, φ the identity): Adam's u + weight_decay·x, scaled by layer to ‖x‖.

    `sizes` [L] are the layers' lengths in x (None: x is one layer). A layer whose ‖x‖ or ‖u‖ is 0 has trust ratio 1.
    """
    _not_negative("lamb", weight_decay=weight_decay)

    def rescale(u: Tensor, x: Tensor) -> Tensor:
        u = _decayed(u, x, weight_decay)
        return _scale_layers(u, _trust(_layer_norms(x, sizes), _layer_norms(u, sizes)), sizes)

    return _adaptive("lamb", _mean_square(b2), b1, b2, eps, 0.0, True, rescale=rescale)


def lars(
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    trust: float = 1e-3,
    *,
    sizes: Sequence[int] | None = None,
) -> Optimizer:
    """LARS (You et al. 1708.03888, Algorithm 1): m ← momentum·m + lr·λ·(g + βx), x ← x − m, β the weight decay.

    Each layer has its λ = trust·‖x‖ / (‖g‖ + β‖x‖), and λ = 1 where ‖x‖ or ‖g‖ is 0. `sizes` [L] are the layers'
    lengths in x (None: x is one layer).
    """
    _fractions("lars", momentum=momentum)
    _not_negative("lars", weight_decay=weight_decay)
    _positive("lars", trust=trust)

    def init(x: Tensor) -> OptState:
        return Momentum(torch.zeros_like(x)) if momentum else ()

    def step(g: Tensor, state: OptState, x: Tensor, lr: Tensor | float) -> tuple[Tensor, OptState]:
        norm_x, norm_g = _layer_norms(x, sizes), _layer_norms(g, sizes)
        local = _trust(trust * norm_x, torch.where(norm_g > 0, norm_g + weight_decay * norm_x, 0.0))
        u = _scale_layers(_decayed(g, x, weight_decay), local, sizes)
        if not momentum:
            return _descend(x, u, lr), state
        m = momentum * state.m + lr * u  # lr inside the momentum, as in the paper
        return x - m, Momentum(m)

    return Optimizer(init, step)


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "yogi": yogi,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "lamb": lamb,
    "lars": lars,
}


def optimizer(spec: str, sizes: Sequence[int] | None = None) -> Optimizer:
    """The optimizer written as `sgd:momentum=0.9`; `sizes` [L] are the layers' lengths in x, for lamb and lars.

    Raises UsageError for an unknown name or a bad argument.
    """
    return resolve(spec, OPTIMIZERS, "optimizer", sizes=sizes)


def clip_norm(g: Tensor, max_norm: Tensor | float) -> Tensor:
    """g·min(1, max_norm / ‖g‖) for g [D] and max_norm > 0 [] (a number, or a tensor on g's device)."""
    if not isinstance(max_norm, Tensor) and not max_norm > 0:
        raise UsageError(f"clip_norm: max_norm must be > 0, not {max_norm}")
    return g / torch.clamp(torch.linalg.vector_norm(g) / max_norm, min=1)  # no 0/0 at g = 0


def _adaptive(
    who: str,
    second: _Rule,
    b1: float,
    b2: float,
    eps: float,
    initial_v: float,
    bias_correction: bool,
    weight_decay: float = 0.0,
    rescale: _Rule | None = None,
) -> Optimizer:
    """The Adam family, x ← x − lr·u with u = m / (√v + eps).

    `second` (v, g) -> v is the rule of the second moment, `b2` its decay; `weight_decay` is an L2 term in g;
    `rescale` (u, x) -> u has the last word on the direction.
    """
    _fractions(who, b1=b1, b2=b2)
    _positive(who, eps=eps)
    _not_negative(who, initial_v=initial_v, weight_decay=weight_decay)

    def init(x: Tensor) -> OptState:
        m = torch.zeros_like(x) if b1 else ()
        return Moments(m, torch.full_like(x, initial_v), x.new_zeros(()) if bias_correction else ())

    def step(g: Tensor, state: OptState, x: Tensor, lr: Tensor | float) -> tuple[Tensor, OptState]:
        g = _decayed(g, x, weight_decay)
        m = torch.lerp(state.m, g, 1 - b1) if b1 else g
        v = second(state.v, g)
        count = state.count
        if bias_correction:
            count = count + 1
            u = m / (_unbias(b1, count) * ((v / _unbias(b2, count)).sqrt() + eps))
        else:
            u = m / (v.sqrt() + eps)
        if rescale is not None:
            u = rescale(u, x)
        return _descend(x, u, lr), Moments(m if b1 else (), v, count)

    return Optimizer(init, step)


def _mean_square(b: float) -> _Rule:
    """v ← b·v + (1 − b)·g²."""
    return lambda v, g: torch.addcmul(b * v, g, g, value=1 - b)


def _unbias(b: float, count: Tensor) -> Tensor:
    """1 − b^count; expm1, because in float32 the plain difference for b = 0.999 is 6e-5 off in the first step."""
    return -torch.expm1(count * (math.log(b) if b else -math.inf))


def _decayed(g: Tensor, x: Tensor, weight_decay: float) -> Tensor:
    return torch.add(g, x, alpha=weight_decay) if weight_decay else g


def _descend(x: Tensor, u: Tensor, lr: Tensor | float) -> Tensor:
    """x − lr·u in one kernel."""
    if isinstance(lr, Tensor):
        return torch.addcmul(x, u, lr.to(x.dtype), value=-1)  # vmap would let a float64 lr [] promote x
    return torch.add(x, u, alpha=-lr)


def _layer_norms(x: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """The norm of each layer, [L]."""
    layers = [x] if sizes is None else x.split(list(sizes))
    return torch.stack([torch.linalg.vector_norm(layer) for layer in layers])


def _scale_layers(u: Tensor, ratio: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """Each layer of u [D] times its ratio [L]."""
    if sizes is None:
        return u * ratio
    return torch.cat([r * layer for r, layer in zip(ratio.unbind(), u.split(list(sizes)), strict=True)])


def _trust(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 1 where either is zero."""
    ratio = above / torch.where(below > 0, below, 1.0)
    return torch.where((above > 0) & (below > 0), ratio, 1.0)


def _fractions(who: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UsageError(f"{who}: {name} must be at least 0 and below 1, not {value}")


def _not_negative(who: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UsageError(f"{who}: {name} must be a number of at least 0, not {value}")


def _positive(who: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UsageError(f"{who}: {name} must be a number above 0, not {value}")
