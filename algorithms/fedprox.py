"""FedProx (Li et al., arXiv 1812.06127): FedAvg whose clients minimise Fᵢ(y) + μ/2 ‖y − x‖² (their equation 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import vfl
from algorithms.fedavg import fedavg


@dataclass(frozen=True, kw_only=True)
class FedProx(vfl.LocalTraining):
    """FedProx: FedAvg with a proximal term that holds clients near the global model (Li et al., 1812.06127)."""

    mu: float = 0.01
    """Proximal coefficient μ ≥ 0; 0 is FedAvg."""

    compresses: ClassVar[bool] = True
    aggregates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.mu >= 0 and math.isfinite(self.mu)):
            raise vfl.UsageError(f"mu must be a finite number ≥ 0, not {self.mu}")

    def build(self, task: vfl.Task, population: int) -> vfl.Algorithm:
        """The algorithm for this task."""
        if self.mu == 0:
            return fedavg(self, task)
        return fedavg(self, task, lambda g, y, x: g + self.mu * (y - x))
