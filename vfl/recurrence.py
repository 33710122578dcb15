"""Recurrent layers as plain tensor operations, for vmap, where torch's own fall back to one client after the other.

Letters: T positions, B batch, H hidden units, G gates (4 for an LSTM, 3 for a GRU, 1 for a plain RNN).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional

from vfl.errors import UsageError
from vfl.operation import Operation, apply, available, each, vmapped

# An LSTM's positions are one opaque operator, and their gradient another: under vmap all clients run in one plain loop
# without vmap's own work for each of its small operations, and torch.compile sees two nodes, not thousands.


def _lstm(z: Tensor, w: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_t = f ⊙ c_{t−1} + i ⊙ g and h_t = o ⊙ tanh(c_t), where i, f, o = σ and g = tanh of their part of
    a_t = z_t + W h_{t−1}.

    z [..., T, B, 4H], w [..., 4H, H], h and c [..., B, H] → every h and c [..., T, B, H], and a [..., T, B, 4H].
    """
    hs, cs, inputs = [], [], []
    for z_t in z.unbind(-3):
        a = z_t + h @ w.mT
        i, f, _, o = a.sigmoid().chunk(4, -1)
        c = f * c + i * a.chunk(4, -1)[2].tanh()
        h = o * c.tanh()
        hs.append(h)
        cs.append(c)
        inputs.append(a)
    return torch.stack(hs, -3), torch.stack(cs, -3), torch.stack(inputs, -3)


def _lstm_gradient(
    w: Tensor, h: Tensor, c: Tensor, hs: Tensor, cs: Tensor, a: Tensor, dhs: Tensor, dcs: Tensor, das: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of `_lstm`'s outputs to those of z, w, h and c.

    Written by hand so that W's is one product over all positions in place of T small ones. In all, clients under vmap
    take 1/2.1, 1/1.7, 1/1.3 of autograd's time through a plain loop for minibatches of 4, 10, 20 (CPU, H = 256).
    """
    h_before, c_before = (torch.cat([first.unsqueeze(-3), s[..., :-1, :, :]], -3) for first, s in ((h, hs), (c, cs)))
    a_i, a_f, a_g, a_o = a.chunk(4, -1)
    i, f, g, o, tanh_c = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid(), cs.tanh()
    # How the gates' inputs move c_t (those of i, f, g) or, with c_t held, h_t (that of o); and how c_t moves h_t.
    slopes = [g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)]
    slope, through = torch.stack(slopes, -2), o * (1 - tanh_c * tanh_c)  # [..., T, B, 4, H], [..., T, B, H]
    dh, dc, dz = torch.zeros_like(h), torch.zeros_like(c), []
    positions = (slope.unbind(-4), *(s.unbind(-3) for s in (through, f, dhs, dcs, das)))
    for slope_t, through_t, f_t, dh_t, dc_t, da_t in reversed(list(zip(*positions, strict=True))):
        dh = dh + dh_t
        dc = dc + dc_t + dh * through_t
        da = (torch.stack([dc, dc, dc, dh], -2) * slope_t).flatten(-2) + da_t
        dz.append(da)
        dh, dc = da @ w, dc * f_t
    dz = torch.stack(dz[::-1], -3)
    return dz, dz.flatten(-3, -2).mT @ h_before.flatten(-3, -2), dh, dc


_lstm_op = torch.library.custom_op("vfl::lstm", _lstm, mutates_args=())
_lstm_gradient_op = torch.library.custom_op("vfl::lstm_gradient", _lstm_gradient, mutates_args=())


@_lstm_op.register_fake
def _(z, w, h, c):  # pyright: ignore
    state = (*z.shape[:-1], w.shape[-1])
    return z.new_empty(state), z.new_empty(state), z.new_empty(z.shape)


@_lstm_gradient_op.register_fake
def _(w, h, c, hs, cs, a, dhs, dcs, das):  # pyright: ignore
    return tuple(s.new_empty(s.shape) for s in (a, w, h, c))


for _op in (_lstm_op, _lstm_gradient_op):

    @_op.register_vmap
    def _batched(info, in_dims, *inputs, op=_op):  # pyright: ignore
        # Any leading axes are one call, so the vmapped one only moves to the front.
        front = [s.expand(info.batch_size, *s.shape) if d is None else s.movedim(d, 0)
                 for s, d in zip(inputs, in_dims, strict=True)]  # fmt: skip
        outputs = op(*front)
        return outputs, (0,) * len(outputs)


class LSTMRecurrence(torch.autograd.Function):
    """`_lstm` with its gradient; itself differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, w: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_lstm`."""
        return _lstm_op(z, w, h, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what the gradient needs: all but z."""
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        """The gradients of z, w, h and c."""
        return _LSTMGradient.apply(*ctx.saved_tensors, *grad_outputs)


class _LSTMGradient(torch.autograd.Function):
    """`_lstm_gradient` with its gradient, which autograd finds in its formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _lstm_gradient_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(_lstm_gradient, *ctx.saved_tensors)[1](grad_outputs)


def _onednn(*inputs: Tensor, train: bool) -> tuple[Tensor, ...]:
    """One client's layer by oneDNN: (x, W, W, b, b, h, c) → every h, the last h and c, and what its gradient needs."""
    H = inputs[5].shape[-1]
    return torch.ops.aten.mkldnn_rnn_layer(*inputs, False, [], _LSTM, H, 1, True, False, False, train)


def _fused_forward(*given: Tensor) -> tuple[Tensor, ...]:
    inputs = [t.contiguous() for t in given]  # as oneDNN takes for granted
    hs, _, c, _ = _onednn(*inputs, train=False)
    return (torch.cat([hs, c[None]]),)


def _fused_backward(u: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    inputs = [t.contiguous() for t in given]
    # What the first pass could have kept is 16 times as large as its outputs, so that this one makes it again.
    hs, h, c, workspace = _onednn(*inputs, train=True)
    dhs, dc = u[:-1].contiguous(), u[-1].contiguous()
    return torch.ops.aten.mkldnn_rnn_layer_backward(
        *inputs, hs, h, c, dhs, torch.zeros_like(h), dc, False, _LSTM, h.shape[-1], 1, True, True, False, [], False,
        workspace,
    )  # fmt: skip


def _fused_formula(x: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor, h: Tensor, c: Tensor) -> Tensor:
    hs, cs, _ = _lstm(functional.linear(x, w_x, b_x + b_h), w_h, h, c)
    return torch.cat([hs, cs[-1:]])


_LSTM = 2  # torch's number for it
_LEAST = 2**14  # multiplications of a client's position from which on this is faster than the loop over positions
_FUSED = Operation(7, functools.partial(each, _fused_forward), functools.partial(each, _fused_backward), _fused_formula)
"""A layer for float32 on a CPU: x [T, B, ·], w_x [4H, ·], w_h [4H, H], b_x and b_h [4H], h and c [B, H] → every h, and
the last c after them [T + 1, B, H]."""


def _gru(z: Tensor, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """One step: z [B, 3H] from the input, h [B, H] → the new h."""
    (r_x, u_x, n_x), (r_h, u_h, n_h) = z.chunk(3, -1), functional.linear(h, w, b).chunk(3, -1)
    new = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return new + (u_x + u_h).sigmoid() * (h - new)


def _plain(nonlinearity: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    return lambda z, h, w, b: nonlinearity(z + functional.linear(h, w, b))


CELLS = {"GRU": _gru, "RNN_TANH": _plain(torch.tanh), "RNN_RELU": _plain(torch.relu)}
"""The cells that autograd differentiates step by step, by torch's name of the mode."""


def _serves(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN is to compute a layer's many clients, for the numbers of one of them: x [T, B, ·], w [4H, H]."""
    enough = x.shape[1] * w.numel() >= _LEAST and x.numel() > 0
    takes = x.dtype == w.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return enough and takes and vmapped() and available(x)


def _alone() -> bool:
    """Whether this is one client's layer, eagerly: torch's own is the fastest there."""
    return peek_interpreter_stack() is None and get_proxy_mode() is None


class FunctionalRNN(nn.Module):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN` of one direction: its parameters and attributes, inputs and outputs."""

    mode: str
    num_layers: int
    hidden_size: int
    batch_first: bool

    def __init__(self, rnn: nn.RNNBase, between: nn.Module) -> None:
        super().__init__()
        for name in nn.RNNBase.__constants__:  # what a surrounding module may read, to make a first state of zeros, say
            setattr(self, name, getattr(rnn, name))
        self.between = between  # two layers: dropout
        for name, parameter in rnn.named_parameters():
            self.register_parameter(name, parameter)

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """Whether this class can stand in for a layer; torch's own stays where it is bidirectional or projects."""
        return type(layer) in (nn.LSTM, nn.GRU, nn.RNN) and not (layer.bidirectional or layer.proj_size)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """x [B, T, ·] if batch_first, else [T, B, ·] → every h of the last layer, and each layer's last h (and c).

        `state` [layers, B, H], for an LSTM a pair of them, is where the layers begin; None: at zero. Raises UsageError.
        """
        if not isinstance(x, Tensor) or x.dim() != 3:
            found = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise UsageError(f"a recurrent layer needs a batch of sequences, three axes, not {found}")
        x = x.transpose(0, 1) if self.batch_first else x
        zero = x.new_zeros(self.num_layers, x.shape[1], self.hidden_size)
        lstm = self.mode == "LSTM"
        h, c = (zero, zero) if state is None else state if lstm else (state, zero)
        last: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.num_layers):
            x = self.between(x) if layer else x
            x, cs = self._layer(layer, x, h[layer], c[layer])
            last.append((x[-1], cs[-1]))
        h, c = (torch.stack(states) for states in zip(*last, strict=True))
        return (x.transpose(0, 1) if self.batch_first else x), ((h, c) if lstm else h)

    def flatten_parameters(self) -> None:
        """Nothing: there is no packed copy of the parameters to renew."""

    def _layer(self, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One layer over all positions: every h [T, B, H], and for an LSTM every c or the last, else h again."""
        w_x, w_h = (getattr(self, f"weight_{kind}_l{layer}") for kind in ("ih", "hh"))
        b_x, b_h = (getattr(self, f"bias_{kind}_l{layer}", None) for kind in ("ih", "hh"))
        if self.mode == "LSTM" and b_x is not None and b_h is not None and _alone() and x.numel():
            hs, _, c = torch.lstm(x, (h[None], c[None]), [w_x, w_h, b_x, b_h], True, 1, 0.0, False, False, False)
            return hs, c
        if self.mode == "LSTM" and b_x is not None and b_h is not None and _serves(x, w_h):
            found = apply(_FUSED, x, w_x, w_h, b_x, b_h, h, c)[0]
            return found[:-1], found[-1:]
        if self.mode == "LSTM":
            z = functional.linear(x, w_x, None if b_x is None or b_h is None else b_x + b_h)
            hs, cs, _ = LSTMRecurrence.apply(z, w_h, h, c)
            return hs, cs
        states, cell = [h], CELLS[self.mode]
        for z in functional.linear(x, w_x, b_x).unbind(0):
            states.append(cell(z, states[-1], w_h, b_h))
        hs = torch.stack(states[1:])
        return hs, hs
