"""Linear models, whose constants theory asks for. N clients that have examples, M examples, D features.

    f(x) = (1/N) Σᵢ fᵢ(x),    fᵢ(x) = (1/nᵢ) Σⱼ ℓ(aⱼᵀx, yⱼ) + r(x)

with ℓ half the squared error where the targets are numbers, and the logistic loss where there are two classes.
Everything here is computed in float64 on the host, whatever the run computes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vfl.data.container import FederatedData
from vfl.errors import UsageError
from vfl.models import model
from vfl.regularizers import NONE, Regularizer
from vfl.task import Task, logistic, squared_error, task

Array = NDArray[np.float64]
_NEWTON = 100  # steps, at most; 10 to 20 are usual


class Smoothness(NamedTuple):
    """The constants that step sizes are made of; Lᵢ is the Lipschitz constant of ∇fᵢ."""

    L: float  # of ∇f
    L_tilde: float  # √((1/N) Σ Lᵢ²) ≥ L
    L_max: float  # max Lᵢ
    mu: float  # f's strong convexity; 0 where it has none


class Solution(NamedTuple):
    """The minimum."""

    x: Array | None  # x* [D]; None where f has more than one minimiser
    value: float  # f*


class _Rows(NamedTuple):
    """The training examples of the clients that have any."""

    A: Array  # [M, D]
    y: Array  # [M] targets, or labels 0 and 1
    sizes: NDArray[np.int64]  # [N]
    weights: Array  # [M] 1/(N nᵢ): what each example counts in f


@dataclass(frozen=True, eq=False)
class LinearProblem:
    """A linear model on the clients' training examples; its constants are computed when first asked for.

    Raises UsageError for data with more than two classes, and for targets that are not one number an example.
    """

    data: FederatedData
    regularizer: Regularizer = NONE

    def __post_init__(self) -> None:
        classes, y = self.data.classes, self.data.clients.y
        if classes not in (0, 2) or y.dim() != 1:
            kind = f"{classes} classes" if classes else f"targets of shape {list(y.shape)}"
            raise UsageError(f"a linear problem has two classes or one number as the target, but {self.data.name} has "
                             f"{kind}")  # fmt: skip

    def task(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Task:
        """The problem as a task of the model `linear`, which starts at x = 0."""
        with torch.random.fork_rng(devices=[]):  # its parameters are set to 0, but first drawn
            module = model("linear", tuple(self.data.clients.x.shape[1:]), self.data.classes)
        loss = logistic if self.data.classes else squared_error
        made = task(module, loss, regularizer=self.regularizer, device=device, dtype=dtype)
        return made._replace(problem=self)

    @cached_property
    def smoothness(self) -> Smoothness:
        """L, L̃, L_max and μ, exact: the suprema and, for the squared error with l2, the infimum of the curvature.

        The curvature of ℓ is 1 for half the squared error, and between 0 and 1/4 for the logistic loss, where x = 0
        attains the maximum. Where convexity cannot be known, as under a strong nonconvex regularizer, μ is 0.
        """
        rows, r = self._rows, self.regularizer
        ends = np.cumsum(rows.sizes)[:-1]
        most = 0.25 if self.data.classes else 1.0
        L_i = np.array([most * _curvature(A)[0] / len(A) for A in np.split(rows.A, ends)]) + r.largest
        largest, smallest = _curvature(np.sqrt(rows.weights)[:, None] * rows.A)
        mu = (0.0 if self.data.classes else smallest) + r.smallest
        return Smoothness(
            float(most * largest + r.largest), float(np.sqrt(np.mean(L_i**2))), float(L_i.max()), max(float(mu), 0.0)
        )

    @cached_property
    def solution(self) -> Solution:
        """x* and f*: in closed form for the squared error, by Newton's method for the logistic loss with l2.

        Raises UsageError where they are not known.
        """
        rows, (l2, nonconvex) = self._rows, self.regularizer
        if nonconvex:
            raise UsageError("the minimum of an objective with a nonconvex regularizer is not known")
        if not self.data.classes:
            return _least_squares(rows, l2)
        if not l2:
            raise UsageError("the logistic loss alone may have no minimum; an l2 regularizer gives it one")
        return _newton(rows, l2)

    @cached_property
    def _rows(self) -> _Rows:
        """The examples as the model sees them."""
        x, y, _ = self.data.clients
        A = self.data.transform(x.cpu(), torch.float64).flatten(1).numpy()
        sizes = self.data.clients.sizes()
        sizes = sizes[sizes > 0]
        if not len(sizes):
            raise UsageError(f"no client of {self.data.name} has an example, so there is no objective")
        return _Rows(A, y.cpu().numpy().astype(np.float64), sizes, np.repeat(1 / (len(sizes) * sizes), sizes))


def smoothness(task: Task) -> Smoothness:
    """The constants of a task's objective. Raises UsageError for a task that is no linear problem."""
    return _problem(task, "smoothness").smoothness


def solution(task: Task) -> Solution:
    """x* and f* of a task's objective. Raises UsageError for a task that is no linear problem, or has none known."""
    return _problem(task, "minimum").solution


def _problem(task: Task, what: str) -> LinearProblem:
    if task.problem is None:
        raise UsageError(f"the objective's {what} is known only for the model linear, on two classes or numbers "
                         "(vfl.LinearProblem)")  # fmt: skip
    return task.problem


def _curvature(A: Array) -> tuple[float, float]:
    """The largest and the smallest eigenvalue of AᵀA [D, D], A [n, D], by way of the smaller of AᵀA and AAᵀ."""
    n, D = A.shape
    eigenvalues = np.linalg.eigvalsh(A.T @ A if n >= D else A @ A.T)
    return float(eigenvalues[-1]), float(eigenvalues[0]) if n >= D else 0.0


def _least_squares(rows: _Rows, l2: float) -> Solution:
    """min ½ Σ wⱼ (aⱼᵀx − yⱼ)² + λ/2 ‖x‖², as one least-squares problem."""
    D = rows.A.shape[1]
    scale = np.sqrt(rows.weights)
    A, b = scale[:, None] * rows.A, scale * rows.y
    if l2:
        A, b = np.concatenate([A, np.sqrt(l2) * np.eye(D)]), np.concatenate([b, np.zeros(D)])
    found, _, rank, _ = np.linalg.lstsq(A, b, rcond=None)
    x = found.astype(np.float64)
    return Solution(x if rank == D else None, float(np.square(A @ x - b).sum() / 2))


def _newton(rows: _Rows, l2: float) -> Solution:
    """min Σ wⱼ log(1 + exp(−sⱼ aⱼᵀx)) + λ/2 ‖x‖² with sⱼ = ±1: Newton's method with backtracking.

    Boyd and Vandenberghe, Convex Optimization, algorithm 9.5.
    """
    A, weights, s = rows.A, rows.weights, 2 * rows.y - 1

    def value(x: Array) -> float:
        return float(weights @ np.logaddexp(0, -s * (A @ x)) + l2 / 2 * x @ x)

    x, f = np.zeros(A.shape[1]), value(np.zeros(A.shape[1]))
    for _ in range(_NEWTON):
        p = np.exp(-np.logaddexp(0, s * (A @ x)))  # [M] the probability of the wrong label
        g = l2 * x - A.T @ (weights * s * p)
        H = (A.T * (weights * p * (1 - p))) @ A + l2 * np.eye(len(x))
        step = np.linalg.solve(H, g)
        decrement = float(g @ step)  # about 2 (f(x) − f*)
        if decrement <= 1e-14 * f:  # what is left after this step is its square
            return Solution(x - step, value(x - step))
        t = 1.0
        while (lower := value(x - t * step)) > f - 1e-4 * t * decrement:
            t /= 2
        x, f = x - t * step, lower
    raise UsageError(f"the minimum was not found in {_NEWTON} Newton steps; take a stronger l2 regularizer than {l2:g}")
