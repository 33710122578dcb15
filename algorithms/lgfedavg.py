"""LG-FedAvg (Liang et al., arXiv 2001.01523): FedPer the other way round.

The body, a representation of the client's own data, is personal; the head on top of it is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

from algorithms.fedper import FedPer


@dataclass(frozen=True, kw_only=True)
class LGFedAvg(FedPer):
    """LG-FedAvg: local representations under a global head (Liang et al., 2001.01523)."""

    personal: str = "*,!last"
    """Which parameters never leave the client (see fedper); all but the last layer."""
