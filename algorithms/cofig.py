"""COFIG (Zhao, Burlachenko, Li & Richtárik, arXiv 2112.13097, Algorithm 1). N clients, S the cohort.

Client: it sends uᵢ = C(gᵢ − hᵢ) with gᵢ its gradient at x;   hᵢ ← hᵢ + a uᵢ with a = 1/(1 + ω).
Server: g = h + mean_S uᵢ,   h ← h + (a/N) Σ_S uᵢ,   x ← x − γ g. It sends x.
The paper's second sample, of clients that renew their shifts, is here the first one: S̃ = S, as it allows. What remains
is DIANA on a sample of the clients; the step sizes that make it converge are this paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import vfl
from algorithms.diana import Diana
from vfl.compressed import Smoothness


@dataclass(frozen=True, kw_only=True)
class Cofig(Diana):
    """COFIG: compressed differences to shifts, with a sample of the clients a round (Zhao et al., 2112.13097)."""

    def step_size(self, smoothness: Smoothness, task: vfl.Task, population: int, clients: int | None = None) -> float:
        """γ = min(1/2, S/(5(1 + ω)N^⅔), S/(5(1 + ω)^{3/2}√N))/L_max (the nonconvex theorem of 2112.13097)."""
        S, N, q = clients or population, population, 1 + self.unbiased(self.trainer(task))
        return min(1 / 2, S / (5 * q * N ** (2 / 3)), S / (5 * q**1.5 * math.sqrt(N))) / smoothness.L_max
