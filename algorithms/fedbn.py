"""FedBN (Li et al., arXiv 2102.07623): FedPer whose personal part are the normalization layers.

Their scales, shifts and running statistics are each client's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from algorithms.fedper import FedPer


@dataclass(frozen=True, kw_only=True)
class FedBN(FedPer):
    """FedBN: normalization layers stay on the clients (Li et al., 2102.07623)."""

    personal: str = "norm"
    """Which parameters and buffers never leave the client (see fedper)."""
