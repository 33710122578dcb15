"""Differential privacy: wrappers of algorithms and tasks."""

from vfl.privacy.central import Adaptive, private
from vfl.privacy.examples import private_gradients
from vfl.privacy.local import classical_multiplier, locally_private
from vfl.privacy.noise import Noise, independent, tree

__all__ = [
    "Adaptive",
    "Noise",
    "classical_multiplier",
    "independent",
    "locally_private",
    "private",
    "private_gradients",
    "tree",
]
