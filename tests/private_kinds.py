"""A private algorithm of each kind, for the tests of the wrappers themselves and of ranks."""

from helpers import N

import vfl
from algorithms.fedavg import FedAvgM
from algorithms.scaffold import Scaffold
from vfl.privacy import Adaptive, locally_private, private, tree

KINDS = ("central", "adaptive", "ftrl", "local")


def private_kind(kind: str, task: vfl.Task) -> vfl.Algorithm:
    """With state on the clients or on the server, for a cohort of 6 out of the N clients."""
    several, single = Scaffold().build(task, N), FedAvgM().build(task, N)
    if kind == "local":
        return locally_private(several, clip=0.2, noise_multiplier=0.5, weights=(1, 4))
    algorithm = several if kind == "central" else single
    adaptive = Adaptive(0.5, 1.0) if kind == "adaptive" else None
    noise = tree(3) if kind == "ftrl" else None
    return private(algorithm, clip=0.2, noise_multiplier=0.5, cohort=6, adaptive=adaptive, noise=noise)
