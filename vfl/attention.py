"""Attention of many clients: as one call of torch's fused operators, and with dropout that a key decides.

Without a rule for `vmap`, which on a CPU they lack, torch warns of a slow fallback and calls them for one client after
the other. Attention has no weights, so many clients are one with all their examples.

Letters: C clients, B batch, N heads, T queries, S keys, E width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.nn import functional

FUSED = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
"""The operators that this module gives a rule, for the whole process, where torch has none."""
_HERE = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
_library = torch.library.Library("aten", "IMPL")


def _rule(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The rule of an operator on queries [B, N, T, ·], keys and values, and more of that kind."""

    def mapped(*inputs: Any, attn_mask: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
        level = retrieve_current_functorch_interpreter().level()
        pairs: list[tuple[Any, int | None]] = [
            _unwrap_batched(t, level) if isinstance(t, Tensor) else (t, None) for t in (*inputs, attn_mask)
        ]
        C = next(t.shape[dim] for t, dim in pairs if dim is not None)

        def stacked(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(C, *t.shape) if dim is None else t.movedim(dim, 0)

        *given, (mask, dim) = pairs
        with torch._C._ExcludeDispatchKeyGuard(_HERE):  # what is called here is for the next level
            each = [stacked(*pair) if isinstance(pair[0], Tensor) else pair[0] for pair in given]
            B = each[0].shape[1]
            if mask is not None:
                mask = stacked(mask, dim)
                mask = mask[:, None, None] if mask.dim() == 3 else mask  # [T, S] of each client: for all heads
                mask = mask.expand(-1, B, -1, -1, -1).flatten(0, 1)
            joined = (t.flatten(0, 1) if isinstance(t, Tensor) else t for t in each)
            outputs = [o.unflatten(0, (C, B)) for o in operator(*joined, attn_mask=mask, **options)]
        return tuple(_add_batch_dim(o, 0, level) for o in outputs)

    return mapped


def register() -> None:
    """Gives the operators their rules. Once is enough; more does no harm."""
    for name in FUSED:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "FuncTorchBatched"):
            _library.impl(name, _rule(getattr(torch.ops.aten, name)), "FuncTorchBatched")


class KeyedAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose dropout is a layer of its own: `drop`, which draws from the minibatch's key."""

    drop: nn.Module

    @staticmethod
    def of(layer: nn.MultiheadAttention, drop: nn.Module) -> None:
        """Makes the layer one, in place; it keeps all that the user has put on it."""
        layer.__class__ = KeyedAttention
        assert isinstance(layer, KeyedAttention)
        layer.drop = drop

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: [B, T, E] if batch_first, else [T, B, E], or one sequence [T, E]; and the weights, if needed."""
        if not (self.training and self.dropout):
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask,
                                   average_attn_weights, is_causal)  # fmt: skip
        alone, first = query.dim() == 2, self.batch_first
        q, k, v = (t[None] if alone else t if first else t.transpose(0, 1) for t in (query, key, value))
        padding = key_padding_mask[None] if alone and key_padding_mask is not None else key_padding_mask
        q, k, v = self._projected(q, k, v)
        if self.bias_k is not None and self.bias_v is not None:  # one more key, and below perhaps one of zeros
            k, v = (torch.cat([t, b.expand(len(t), -1, -1)], 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, N, ·, E/N]
        if self.add_zero_attn:
            k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # [B, N, T, S]
        if attn_mask is not None:  # [T, S], or one a head [B·N, T, S]
            heads = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask
            scores = scores + _added(heads, scores)
        if padding is not None:  # [B, S]
            scores = scores + _added(padding[:, None, None], scores)
        weights = self.drop(scores.softmax(-1))
        y = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        y = y[0] if alone else y if first else y.transpose(0, 1)
        if not need_weights:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights[0] if alone else weights

    def _projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        w = own if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        b = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (functional.linear(*parts) for parts in zip((q, k, v), w, b, strict=True))
        return q, k, v


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask, true where a query must not see a key or a number to add, as numbers for all keys."""
    number = (
        torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
    )
    return functional.pad(number, (0, scores.shape[-1] - mask.shape[-1]))  # the keys that the layer itself adds
