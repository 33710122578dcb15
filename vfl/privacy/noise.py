"""The noise that the server adds to sums: afresh in every round, or along a binary tree over the rounds.

Letters: D parameters, L levels of the tree. Everything is in units of the standard deviation of one draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfl import random
from vfl.base import Tree, leaves
from vfl.errors import UsageError

Estimator = Literal["honaker", "binary"]


class Noise(NamedTuple):
    """A source of Gaussian noise, round after round."""

    init: Callable[[Tensor], Tree]  # the model x [D] → the memory before the first round
    draw: Callable[[Tree, Tree, Tensor], tuple[Tree, Tree]]  # (sum to be hidden, memory, key []) → (noise, memory)


def independent() -> Noise:
    """Noise of its own in every round, N(0, I) on all entries of the sum."""

    def draw(hidden: Tree, memory: Tree, key: Tensor) -> tuple[Tree, Tree]:
        parts, structure = leaves(hidden), pytree.tree_structure(hidden)
        drawn = [random.normal(random.fold_in(key, n), p.shape, p.dtype) for n, p in enumerate(parts)]
        return pytree.tree_unflatten(drawn, structure), memory

    return Noise(lambda x: (), draw)


class Nodes(NamedTuple):
    """The tree's memory. Step t ends the subtrees that stand for the ones among t's binary digits."""

    steps: Tensor  # [] int64 steps of the present tree
    nodes: Tensor  # [L, D] the noise of each such subtree, zero where the digit is 0


def tree(levels: int, estimator: Estimator = "honaker") -> Noise:
    """Noise whose sum over rounds 1 … t, and not that of one round, is what a binary tree of L = `levels` adds.

    DP-FTRL (Kairouz et al. 2103.00039, section 3): binary is the plain tree, whose noise after step t has the variance
    popcount(t); honaker is its estimator from below (ibid., section B.2), Σ 1 / (2 − 2⁻ᵏ) over the digits k of t that
    are 1. The draw of round t is the difference of two such sums, so the server's step may be any. A tree holds
    2ᴸ − 1 steps; then another begins, and the noise of the one before stays. For a sum that is one vector [D].
    """
    weights, deviations = estimates(levels, estimator)

    def init(x: Tensor) -> Nodes:
        return Nodes(x.new_zeros((), dtype=torch.int64), x.new_zeros((levels, *x.shape)))

    def draw(hidden: Tree, memory: Nodes, key: Tensor) -> tuple[Tree, Nodes]:
        shape = memory.nodes.shape[1:]
        if not (isinstance(hidden, Tensor) and hidden.shape == shape):
            raise UsageError(f"tree noise is for algorithms whose clients send one vector {list(shape)}, as in fedavg")
        full = memory.steps == 2**levels - 1
        nodes = torch.where(full, 0, memory.nodes)
        steps = torch.where(full, 0, memory.steps) + 1
        digits = 2 ** torch.arange(levels, device=steps.device)
        ended = steps & -steps  # the digit that turns 1; those below it turn 0
        done = (digits == ended).to(nodes.dtype)  # [L] one-hot
        drawn = random.normal(key, shape, nodes.dtype)
        node = (done @ weights.to(nodes)) @ nodes + (done @ deviations.to(nodes)) * drawn
        after = torch.where((digits < ended)[:, None], 0, nodes) + done[:, None] * node
        return after.sum(0) - nodes.sum(0), Nodes(steps, after)

    return Noise(init, draw)


def estimates(levels: int, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """How a subtree's noise is made as it ends: the weights [L, L] of the nodes held, and the deviation [L] of a draw.

    Honaker's estimate of a node k levels up is aₖ ξₖ + (1 − aₖ)(left + right), with ξₖ the node's own noise and
    aₖ = 1 / (2 − 2⁻ᵏ), the inverse variances. The left child is held, the right one has just been made in the same way
    from the nodes held, so that what is not held is one Gaussian, sₖ² = aₖ² + (1 − aₖ)² sₖ₋₁².
    """
    weights, deviations = torch.zeros(levels, levels, dtype=torch.float64), torch.ones(levels, dtype=torch.float64)
    if estimator == "honaker":
        for k in range(1, levels):
            a = 1 / (2 - 2.0**-k)
            weights[k] = (1 - a) * weights[k - 1]
            weights[k, k - 1] = 1 - a
            deviations[k] = (a**2 + (1 - a) ** 2 * deviations[k - 1] ** 2) ** 0.5
    return weights, deviations
