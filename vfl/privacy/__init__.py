"""Differential privacy: wrappers of algorithms and tasks, and the accounting of what a run spends."""

from vfl.privacy.accounting import Plan, epsilon, epsilons, make_plan, reporting, solve_noise_multiplier
from vfl.privacy.central import Adaptive, private
from vfl.privacy.examples import private_gradients
from vfl.privacy.local import classical_multiplier, locally_private
from vfl.privacy.noise import Noise, independent, tree
from vfl.privacy.options import Context, Privacy

__all__ = [
    "Adaptive",
    "Context",
    "Noise",
    "Plan",
    "Privacy",
    "classical_multiplier",
    "epsilon",
    "epsilons",
    "independent",
    "locally_private",
    "make_plan",
    "private",
    "private_gradients",
    "reporting",
    "solve_noise_multiplier",
    "tree",
]
