"""Attention of many clients as one call of torch's fused operators, which have no rule for `vmap` on a CPU.

Without one, torch warns of a slow fallback and calls them for one client after the other. Attention has no weights, so
many clients are one with all their examples. Letters: C clients, B batch, N heads, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

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
