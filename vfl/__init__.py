"""vfl: a functional, vectorized federated-learning simulator."""

from vfl import data, models, random
from vfl.base import (
    Algorithm,
    Broadcast,
    Mean,
    Message,
    Metrics,
    Tree,
    leaves,
    named_leaves,
    stateless,
    tree_map,
)
from vfl.distributed import Ranks, launched
from vfl.engine import Engine, State
from vfl.errors import ClientError, DivergedError, UsageError
from vfl.evaluation import evaluate, evaluate_clients
from vfl.local import Batches, Work, descend, float_bits, full_gradient, message
from vfl.optimizers import Optimizer, clip_norm, optimizer
from vfl.samplers import Cohort, Sampler, sampler
from vfl.schedules import Schedule, schedule
from vfl.simulate import Evaluation, Result, rounds, simulate
from vfl.task import Aux, Batch, Task, accuracy, cross_entropy, squared_error, task
from vfl.training import AlgorithmConfig, LocalTraining, ModelAndRate, Trainer

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "AlgorithmConfig",
    "Aux",
    "Batch",
    "Batches",
    "Broadcast",
    "ClientError",
    "Cohort",
    "DivergedError",
    "Engine",
    "Evaluation",
    "LocalTraining",
    "Mean",
    "Message",
    "Metrics",
    "ModelAndRate",
    "Optimizer",
    "Ranks",
    "Result",
    "Sampler",
    "Schedule",
    "State",
    "Task",
    "Trainer",
    "Tree",
    "UsageError",
    "Work",
    "accuracy",
    "clip_norm",
    "cross_entropy",
    "data",
    "descend",
    "evaluate",
    "evaluate_clients",
    "float_bits",
    "full_gradient",
    "launched",
    "leaves",
    "message",
    "models",
    "named_leaves",
    "optimizer",
    "random",
    "rounds",
    "sampler",
    "schedule",
    "simulate",
    "squared_error",
    "stateless",
    "task",
    "tree_map",
]
