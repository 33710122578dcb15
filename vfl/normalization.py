"""Normalizations of many clients at once, each with a scale and an offset of its own, by torch's fused calls.

Letters: C clients, B batch, H channels, n pixels (any number of axes, or none).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from vfl.operation import Operation, apply, available, each, vmapped

aten = torch.ops.aten
_ALL = [True, True, True]  # gradients that a library call is asked for
# Entries of a client's x from which on an operation's fused calls gain more than what its own rules cost.
_LEAST_ROWS, _LEAST_GROUPS, _LEAST_CHANNELS = 2**16, 2**14, 2**14


class _ClientLayerNorm(nn.LayerNorm):
    """A layer norm whose weights may be one client's of many."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None or self.bias is None or not _serves(input, _LEAST_ROWS):
            return super().forward(input)
        return apply(layer_norm(self.eps), input, self.weight, self.bias)[0]


class _ClientGroupNorm(nn.GroupNorm):
    """A group norm whose weights may be one client's of many."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None or self.bias is None or not _serves(input, _LEAST_GROUPS):
            return super().forward(input)
        return apply(group_norm(self.num_groups, self.eps), input, self.weight, self.bias)[0]


class MaskedBatchNorm(nn.Module):
    """Batch norm over the examples whose mask is true; equations, options and state names of `nn.BatchNorm*d`."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    mask: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum = norm.eps, norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.register_buffer("mask", torch.ones((), dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, ...]
        w = x.new_ones(x.shape[1]) if self.weight is None else self.weight
        b = x.new_zeros(x.shape[1]) if self.bias is None else self.bias
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return _scaled(x, self.running_mean, self.running_var, w, b, self.eps)
        mask = self.mask.expand(x.shape[0])
        if x.numel() >= _LEAST_CHANNELS and available(x):
            y, mean, _, unbiased = apply(batch_norm(self.eps), x, w, b, mask)
        else:
            y, mean, unbiased = _masked(x, w, b, mask, self.eps)
        if self.training:
            self._track(mean.detach(), unbiased.detach(), mask.sum() * x[0, 0].numel())
        return y

    def _track(self, mean: Tensor, unbiased: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        seen = count > 0  # a batch of padding alone leaves no trace
        self.num_batches_tracked = self.num_batches_tracked + seen
        a = self.momentum
        if a is None:
            a = 1 / self.num_batches_tracked.clamp(min=1).to(mean.dtype)
        self.running_mean = torch.where(seen, (1 - a) * self.running_mean + a * mean, self.running_mean)
        self.running_var = torch.where(seen, (1 - a) * self.running_var + a * unbiased, self.running_var)


def fuse(layer: nn.Module) -> None:
    """Lets a layer or group norm compute many clients' at once; one of a subclass stays as it is."""
    kinds: dict[type, type[nn.Module]] = {nn.LayerNorm: _ClientLayerNorm, nn.GroupNorm: _ClientGroupNorm}
    layer.__class__ = kinds.get(type(layer), type(layer))  # which keeps all that the user has put on it


def _serves(x: Tensor, least: int) -> bool:
    return x.numel() >= least and vmapped() and available(x)


@functools.cache
def layer_norm(eps: float) -> Operation:
    """x [..., *s], w and b [*s] → y like x, normalized over s (Ba et al., arXiv 1607.06450)."""

    def forward(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return torch.native_layer_norm(x, w.shape, w, b, eps)

    def backward(u: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        return aten.native_layer_norm_backward(u, x, w.shape, mean, rstd, w, b, _ALL)

    def formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return _standard(x, tuple(range(-w.dim(), 0)), eps) * w + b

    return Operation(3, functools.partial(each, forward), functools.partial(each, backward), formula)


@functools.cache
def group_norm(groups: int, eps: float) -> Operation:
    """x [B, H, *n], w and b [H] → y like x, normalized over groups of channels (Wu & He, arXiv 1803.08494)."""

    def sizes(x: Tensor) -> tuple[int, int, int, int]:
        # Every example of every client is so many channels of one large example, whose weights are repeated for it.
        C, B, H = x.shape[:3]
        return 1, C * B * H, math.prod(x.shape[3:]), C * B * groups

    def repeated(w: Tensor, B: int) -> Tensor:
        return w[:, None].expand(-1, B, -1).flatten()

    def forward(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        B = x.shape[1]
        y, mean, rstd = torch.native_group_norm(x.contiguous(), repeated(w, B), repeated(b, B), *sizes(x), eps)
        return y.view_as(x), mean.view(len(x), -1), rstd.view(len(x), -1)

    def backward(u: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        C, B, H = x.shape[:3]
        dx, dw, db = aten.native_group_norm_backward(
            u.contiguous(), x.contiguous(), mean.view(1, -1), rstd.view(1, -1), repeated(w, B), *sizes(x), _ALL
        )
        return dx.view_as(x), dw.view(C, B, H).sum(1), db.view(C, B, H).sum(1)

    def formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        apart = x.unflatten(1, (groups, -1))
        return _standard(apart, tuple(range(2, apart.dim())), eps).flatten(1, 2) * _channels(w, x) + _channels(b, x)

    return Operation(3, forward, backward, formula)


@functools.cache
def batch_norm(eps: float) -> Operation:
    """x [B, H, *n], w and b [H], mask [B] → y like x, normalized over the examples whose mask is true (Ioffe & Szegedy,
    arXiv 1502.03167), 0 for the others; and the channels' mean, 1/√(variance + eps) and unbiased variance [H].
    """

    def forward(x: Tensor, w: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        some = _some(mask, x)
        if some.numel() == 0:
            return torch.zeros_like(x), *(torch.zeros_like(w) for _ in range(3))
        mean, variance = torch.zeros_like(w), torch.zeros_like(w)
        y, center, scale = torch.native_batch_norm(some, w, b, mean, variance, True, 1.0, eps)
        if some.numel() == some.shape[1]:
            variance.zero_()  # of one value a channel, which torch would divide by 0
        return _all(mask, y), center, scale, variance

    def backward(
        u: Tensor, x: Tensor, w: Tensor, b: Tensor, mask: Tensor, center: Tensor, scale: Tensor, variance: Tensor
    ) -> tuple[Tensor, ...]:
        some = _some(mask, x)
        if some.numel() == 0:
            return torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(b)
        dx, dw, db = aten.native_batch_norm_backward(
            _some(mask, u), some, w, None, None, center, scale, True, eps, _ALL
        )
        return _all(mask, dx), dw, db

    def formula(x: Tensor, w: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        return torch.where(_like(mask, x), _masked(x, w, b, mask, eps)[0], 0)

    return Operation(4, functools.partial(each, forward), functools.partial(each, backward), formula)


def _standard(x: Tensor, over: tuple[int, ...], eps: float) -> Tensor:
    """x with mean 0 and variance 1 over these axes."""
    apart = x - x.mean(over, keepdim=True)
    return apart * (apart.square().mean(over, keepdim=True) + eps).rsqrt()


def _masked(x: Tensor, w: Tensor, b: Tensor, mask: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same y but for the others, with the mean and the unbiased variance, in operations for any device."""
    over = [0, *range(2, x.dim())]
    counts = _like(mask, x).to(x.dtype)
    count = mask.sum() * x[0, 0].numel()
    mean = (x * counts).sum(over) / count.clamp(min=1)
    variance = ((x - _channels(mean, x)) * counts).square().sum(over) / count.clamp(min=1)
    return _scaled(x, mean, variance, w, b, eps), mean, variance * count / (count - 1).clamp(min=1)


def _scaled(x: Tensor, mean: Tensor, variance: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    normalized = (x - _channels(mean, x)) * (_channels(variance, x) + eps).rsqrt()
    return normalized * _channels(w, x) + _channels(b, x)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """One value a channel [H] as it meets x [B, H, *n]."""
    return values.reshape([1, -1] + [1] * (x.dim() - 2))


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """One value an example [B] as it meets x [B, H, *n]."""
    return mask.reshape([-1] + [1] * (x.dim() - 1))


def _some(mask: Tensor, x: Tensor) -> Tensor:
    """The examples whose mask is true."""
    return x if bool(mask.all()) else x[mask]


def _all(mask: Tensor, some: Tensor) -> Tensor:
    """These examples among all, the others 0."""
    if len(some) == len(mask):
        return some
    every = some.new_zeros(len(mask), *some.shape[1:])
    every[mask] = some
    return every
