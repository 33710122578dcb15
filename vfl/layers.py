"""Functional stand-ins for the torch layers that a vmapped, masked client update cannot take as they are.

Two read what their torch originals lack from a buffer that the task swaps in for one call: batch norm the mask of the
real examples (padding must not enter the statistics), dropout a random key (so that a client draws the same noise in
any chunk and on any rank), within attention too (`vfl.attention`). Recurrent layers (`vfl.recurrence`) are written out,
since vmap has no rule for torch's. Convolutions (`vfl.convolution`) and other norms (`vfl.normalization`) stay what
they are, but choose how many clients' are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfl import attention, random
from vfl.convolution import Wanted, choose_formulation
from vfl.normalization import MaskedBatchNorm, fuse
from vfl.recurrence import FunctionalRNN


class KeyedDropout(nn.Module):
    """Dropout of entries (or of whole channels, as `nn.Dropout*d`) drawn from a key."""

    key: Tensor

    def __init__(self, p: float, channels: bool, index: int) -> None:
        super().__init__()
        self.p, self.channels, self.index = p, channels, index
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return torch.zeros_like(x)
        shape = [*x.shape[:2], *[1] * (x.dim() - 2)] if self.channels else x.shape
        self.key = random.fold_in(self.key, self.index)  # so that a second call in one forward pass draws anew
        keep = random.bernoulli(self.key, 1 - self.p, shape)
        return x * keep / (1 - self.p)


def functionalize(module: nn.Module, convolution: Wanted = "auto") -> nn.Module:
    """The module with every batch norm, dropout and recurrent layer replaced, in place; the new one when it is one.

    Its convolutions compute many clients by `convolution`.
    """
    attention.register()
    swapped: dict[nn.Module, nn.Module] = {}  # a layer that stands in two places stays one
    count = 0

    def swap(layer: nn.Module) -> nn.Module:
        nonlocal count
        if layer in swapped:
            return swapped[layer]
        swapped[layer] = layer
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            swapped[layer] = MaskedBatchNorm(layer)
        elif isinstance(layer, nn.modules.dropout._DropoutNd) and not isinstance(
            layer, (nn.AlphaDropout, nn.FeatureAlphaDropout)
        ):
            count += 1
            swapped[layer] = KeyedDropout(layer.p, not isinstance(layer, nn.Dropout), count)
        elif isinstance(layer, nn.RNNBase) and FunctionalRNN.takes(layer):
            count += 1
            swapped[layer] = FunctionalRNN(layer, KeyedDropout(layer.dropout, False, count))
        elif type(layer) is nn.MultiheadAttention:
            count += 1
            attention.KeyedAttention.of(layer, KeyedDropout(layer.dropout, False, count))
        elif isinstance(layer, nn.modules.conv._ConvNd):
            choose_formulation(layer, convolution)
        elif isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
            fuse(layer)
        else:
            for name, child in layer._modules.items():  # named_children would leave out the second place
                if child is not None:
                    setattr(layer, name, swap(child))
        return swapped[layer]

    return swap(module)
