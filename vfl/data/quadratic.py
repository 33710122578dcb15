"""Quadratic objectives with a given spectrum. N clients of n examples, D parameters."""

from __future__ import annotations

import math

import numpy as np
import torch

from vfl.data.container import Dataset, Examples, cast
from vfl.data.partition import generator
from vfl.errors import UsageError


def quadratic(
    dim: int = 20,
    L: float = 2.0,
    mu: float = 1.0,
    examples: int | None = None,
    iid: bool = False,
    spread: float = 1.0,
    *,
    clients: int | None,
    seed: int,
) -> Dataset:
    """f(x) = (1/N) Σ fᵢ(x), fᵢ(x) = (1/n) ½‖Aᵢx − bᵢ‖² in R^dim, L-smooth and μ-strongly convex, for the model linear.

    That is (1/n)‖Aᵢx − bᵢ‖² of FL_PyTorch (Burlachenko et al., arXiv 2202.03099, §4.2) with rows longer by √2. The
    eigenvalues of f's Hessian (1/N) Σ AᵢᵀAᵢ/n are equally spaced from μ to L: A, all the Aᵢ one above the other, is
    U Σ Vᵀ of a Gaussian matrix with Σ replaced. bᵢ = Aᵢ zᵢ, so that fᵢ is least at zᵢ = z + `spread`·N(0, I), where
    z ~ N(0, I): with a spread above 0, ∇fᵢ(x*) ≠ 0. With `iid`, every client has the same Aᵢ and bᵢ. `examples` is n;
    none: 12, with iid at least dim. Rows lie client by client, float64. Raises UsageError.
    """
    N = 100 if clients is None else clients
    n = examples if examples is not None else max(12, dim) if iid else 12
    for name, count in (("dim", dim), ("examples", n), ("clients", N)):
        if count < 1:
            raise UsageError(f"quadratic: {name} must be at least 1, not {count}")
    if not 0 <= mu <= L < math.inf or L == 0 or (dim == 1 and mu != L):
        raise UsageError(f"quadratic: 0 ≤ mu ≤ L with L above 0 is needed, and mu = L in one dimension, "
                         f"not mu={mu:g} and L={L:g}")  # fmt: skip
    if not 0 <= spread < math.inf:
        raise UsageError(f"quadratic: spread must be a finite number ≥ 0, not {spread}")
    rows = n if iid else N * n
    if mu > 0 and rows < dim:
        whose = "a client's" if iid else "all clients'"
        raise UsageError(f"quadratic: mu above 0 in dim={dim} needs as many rows, but {whose} examples are {rows}; "
                         "take more examples or mu=0")  # fmt: skip
    U, _, Vt = np.linalg.svd(generator(seed, "quadratic A").standard_normal((rows, dim)), full_matrices=False)
    A = U * np.sqrt(rows * np.linspace(L, mu, dim)[: min(rows, dim)]) @ Vt
    draw = generator(seed, "quadratic b")
    z = draw.standard_normal(dim) + (0 if iid else spread) * draw.standard_normal((1 if iid else N, dim))
    b = np.einsum("nij,nj->ni", A.reshape(len(z), n, dim), z).ravel()
    if iid:
        A, b = np.tile(A, (N, 1)), np.tile(b, N)
    train = Examples(torch.from_numpy(A), torch.from_numpy(b))
    return Dataset("quadratic", train, None, 0, cast, offsets=np.arange(N + 1) * n, model="linear")
