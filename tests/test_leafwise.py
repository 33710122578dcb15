"""Passes over traced programs: vectors stay in pieces, and the numbers stay."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vfl.leafwise import leafwise

SIZES = [6, 1, 3]
aten = torch.ops.aten


def targets(module: torch.fx.GraphModule) -> list:
    return [node.target for node in module.graph.nodes]


def steps(x: torch.Tensor, h: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """Three descent steps on ½‖a b‖² + ‖c‖⁴ with a shift h, as an algorithm writes them: on vectors."""
    y = x
    for _ in range(3):
        a, b, c = y.split(SIZES, dim=-1)
        g = torch.cat([a * b, (a * a).sum(-1, keepdim=True) * b, c**3], dim=-1)
        y = torch.addcmul(y, g - h, lr, value=-1)
    return y - x


def both(function, *inputs: torch.Tensor) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """The traced program before and after the pass, which must give the same numbers."""
    before = make_fx(function)(*inputs)
    after = leafwise(make_fx(function)(*inputs), SIZES)
    for wanted, found in zip(torch.utils._pytree.tree_leaves(before(*inputs)), torch.utils._pytree.tree_leaves(
            after(*inputs)), strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    return before, after


@pytest.mark.parametrize("shape", [(10,), (4, 10)])
def test_local_steps_join_no_vector_until_the_message(shape):
    x, h = torch.randn(2, *shape, dtype=torch.float64).unbind()
    before, after = both(steps, x, h, torch.tensor(0.1, dtype=torch.float64))
    assert targets(before).count(aten.cat.default) == 3
    assert targets(after).count(aten.cat.default) == 1  # the result itself
    assert targets(before).count(aten.split_with_sizes.default) == 3
    assert targets(after).count(aten.split_with_sizes.default) == 2  # x and h


def test_sums_along_and_across_the_vector_are_taken_by_pieces():
    def function(x, lr):
        moved = steps(x, x, lr)
        weight = torch.arange(4.0, dtype=torch.float64)
        return moved.sum(1), (weight[:, None] * moved).sum(0), moved.sum((0, 1)), moved.sum(1, keepdim=True)

    _, after = both(function, torch.randn(4, 10, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))
    assert targets(after).count(aten.cat.default) == 1  # the weighted sum over the clients


@pytest.mark.parametrize("clients", [4, 10])
def test_a_sum_of_clients_vectors_as_a_product_is_one_for_each_piece(clients: int):
    """Ten clients are as many as the vector has entries: their weights are no vector."""

    def function(x, weight, total, lr):
        return (weight @ steps(x, x, lr)).add_(total)

    rows, weight, lr = torch.randn(clients, 10).double(), torch.rand(clients).double(), torch.tensor(0.1).double()
    before, after = both(function, rows, weight, torch.randn(10).double(), lr)
    assert targets(before).count(aten.mm.default) == 1
    assert targets(after).count(aten.mm.default) == (3 if clients == 4 else 1)
    assert targets(after).count(aten.cat.default) == 1  # the result, or the clients' vectors


def test_what_needs_the_whole_vector_gets_it():
    def function(x, lr):
        y = steps(x, x, lr)
        return (
            y.norm(),
            y.flip(0),
            y.sort().values,
            y[2:7],
            y.view(2, 5),
            y @ y,
            (y * x).cumsum(0),
            y[None].expand(3, 10),
        )

    both(function, torch.randn(10, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))


def test_a_cat_or_split_of_other_pieces_is_left_alone():
    def function(x):
        a, b = x.split([4, 6])
        return torch.cat([b, a]) * 2

    before, after = both(function, torch.randn(10, dtype=torch.float64))
    assert targets(after) == targets(before)
