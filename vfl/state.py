"""What a run needs to go on, and nothing else. Letters: D parameters, R replicas."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vfl.base import tree_map
from vfl.store import Store, Stores


class Totals(NamedTuple):
    """Sums over all rounds so far; one number a replica where there are any."""

    bits_up: float | list[float] = 0.0
    bits_down: float | list[float] = 0.0
    gradients: float | list[float] = 0.0


class State(NamedTuple):
    """Everything a run needs to go on; with replicas, its tensors are [R, ...]."""

    round: int  # rounds done
    key: Tensor  # [] the run's key, on the host
    server: Any  # the algorithm's server state; its field x [D] is the model
    buffers: tuple[Tensor, ...]  # the module's buffers
    store: Store | Stores  # client states
    totals: Totals

    def replica(self, r: int) -> State:
        """Replica r's state, as a run of its own would have it."""
        key, server, buffers = tree_map(operator.itemgetter(r), (self.key, self.server, self.buffers))
        store = self.store.each[r] if isinstance(self.store, Stores) else self.store
        return State(self.round, key, server, buffers, store, Totals(*(np.asarray(t)[r].item() for t in self.totals)))
