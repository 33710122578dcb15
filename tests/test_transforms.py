"""The library's own vmap and gradients against torch's, and what they refuse."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from vfl import random
from vfl.base import Tree
from vfl.transforms import mapped, pulled_back

C, B, F = 3, 5, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


class Client(NamedTuple):
    w: Tensor  # [F]
    data: tuple[Tensor, Tensor]  # [B, F], [B]
    state: tuple[()] = ()


CLIENTS = Client(normal(C, F), (normal(C, B, F, seed=1), normal(C, B, seed=2)))
WEIGHT = normal(B, seed=3)


def losses(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x @ w.tanh() - y).square()


def gradient(client: Client) -> tuple[tuple[Tensor, ...], Tensor, Tree]:
    """Gradients by w and by a number that the losses do not depend on, the losses, and what comes beside."""
    x, y = client.data

    def function(leaves: list[Tensor]) -> tuple[Tensor, Tree]:
        return losses(leaves[0], x, y), {"largest": x.abs().max()}

    return pulled_back(function, [client.w, y[0]], WEIGHT)


def expected(c: int) -> tuple[Tensor, Tensor]:
    x, y = (t[c] for t in CLIENTS.data)
    values, pull = vjp(lambda w: losses(w, x, y), CLIENTS.w[c])
    return pull(WEIGHT)[0], values


def of_client(c: int) -> Client:
    return Client(CLIENTS.w[c], (CLIENTS.data[0][c], CLIENTS.data[1][c]))


def test_mapped_is_vmap_and_keeps_trees() -> None:
    def function(client: Client) -> tuple[Client, Tensor]:
        return client._replace(w=client.w * 2), losses(client.w, *client.data).sum()

    found, sums = mapped(function, CLIENTS, C)
    assert isinstance(found, Client) and found.state == () and torch.equal(found.w, 2 * CLIENTS.w)
    assert torch.equal(sums, vmap(lambda w, x, y: losses(w, x, y).sum())(CLIENTS.w, *CLIENTS.data))
    assert torch.equal(mapped(lambda client: torch.zeros(2), CLIENTS, C), torch.zeros(C, 2))  # every client's the same


def test_mapped_refuses_what_depends_on_a_value_and_random_numbers_of_no_key() -> None:
    with pytest.raises(RuntimeError, match="data-dependent"):
        mapped(lambda w: w if w.sum() > 0 else -w, CLIENTS.w, C)
    with pytest.raises(RuntimeError, match="random"):
        mapped(lambda w: w + torch.rand(F), CLIENTS.w, C)
    assert torch.equal(mapped(lambda w: w, CLIENTS.w, C), CLIENTS.w)  # the level is closed again


def test_gradients_are_torchs_with_and_without_a_client_axis() -> None:
    together = mapped(gradient, CLIENTS, C)
    for c in range(C):
        g, values = expected(c)
        for (mine, none), found, beside in (gradient(of_client(c)), *[_part(together, c)]):
            torch.testing.assert_close((mine, none, found), (g, torch.zeros_like(none), values))
            assert torch.equal(beside["largest"], CLIENTS.data[0][c].abs().max())


def _part(tree: tuple[tuple[Tensor, ...], Tensor, Tree], c: int) -> tuple[tuple[Tensor, ...], Tensor, Tree]:
    pieces, values, beside = tree
    return tuple(piece[c] for piece in pieces), values[c], {name: t[c] for name, t in beside.items()}


def test_nothing_is_kept_for_a_second_gradient_that_nobody_asks_for() -> None:
    recorded: list[bool] = []

    def function(leaves: list[Tensor]) -> tuple[Tensor, Tree]:
        values = losses(leaves[0], *(t[0] for t in CLIENTS.data))
        values.register_hook(lambda g: recorded.append(torch.is_grad_enabled()))
        return values, ()

    def square(w: Tensor) -> Tensor:
        return pulled_back(function, [w], WEIGHT)[0][0].square().sum()

    square(CLIENTS.w[0])
    mapped(square, CLIENTS.w, C)
    assert recorded == [False, False]
    grad(square)(CLIENTS.w[0])
    assert recorded[2] is True


def test_a_gradient_of_gradients_is_torchs() -> None:
    def length(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return gradient(Client(w, (x, y)))[0][0].square().sum()

    def torchs(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return grad(lambda w: losses(w, x, y) @ WEIGHT)(w).square().sum()

    found, wanted = (vmap(grad(f))(CLIENTS.w, *CLIENTS.data) for f in (length, torchs))
    torch.testing.assert_close(found, wanted)
