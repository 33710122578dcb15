"""vfl: a functional, vectorized federated-learning simulator."""

from vfl import data, models, random
from vfl.adversaries import adversaries, corrupt_labels, sign_flipping
from vfl.base import (
    Algorithm,
    Broadcast,
    Combine,
    Mean,
    Message,
    Metrics,
    Model,
    Personal,
    Receive,
    Tree,
    leaves,
    named_leaves,
    stateless,
    tree_map,
)
from vfl.compressors import Compressed, Compressor, compressor
from vfl.delays import Delays
from vfl.devices import Devices
from vfl.distributed import Ranks, launched
from vfl.engine import Engine
from vfl.errors import ClientError, DivergedError, UsageError
from vfl.evaluation import evaluate, evaluate_clients, objective
from vfl.learned_weights import LearnedWeights
from vfl.local import Batches, Work, descend, float_bits, full_gradient, keep_where, message
from vfl.optimizers import Optimizer, clip_norm, optimizer
from vfl.partial import Part, personal_part
from vfl.personal import FineTuning, evaluate_personal
from vfl.plateau import Plateau
from vfl.pretrained import pretrained
from vfl.problems import LinearProblem, Smoothness, Solution, smoothness, solution
from vfl.regularizers import Regularizer, regularizer
from vfl.rehearsal import Rehearsal, rehearsed
from vfl.replicas import Replication
from vfl.robust import Aggregator, aggregator
from vfl.samplers import Cohort, Sampler, sampler
from vfl.schedules import Schedule, schedule
from vfl.simulate import Evaluation, Result, rounds, simulate
from vfl.state import State
from vfl.stopping import Stopping
from vfl.task import Aux, Batch, Task, accuracy, binary_accuracy, cross_entropy, logistic, squared_error, task
from vfl.theory import Setting, by_theory
from vfl.training import AlgorithmConfig, LocalTraining, ModelAndRate, Trainer
from vfl.wrappers import Context

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Algorithm",
    "AlgorithmConfig",
    "Aux",
    "Batch",
    "Batches",
    "Broadcast",
    "ClientError",
    "Cohort",
    "Combine",
    "Compressed",
    "Compressor",
    "Context",
    "Delays",
    "Devices",
    "DivergedError",
    "Engine",
    "Evaluation",
    "FineTuning",
    "LearnedWeights",
    "LinearProblem",
    "LocalTraining",
    "Mean",
    "Message",
    "Metrics",
    "Model",
    "ModelAndRate",
    "Optimizer",
    "Part",
    "Personal",
    "Plateau",
    "Ranks",
    "Receive",
    "Regularizer",
    "Rehearsal",
    "Replication",
    "Result",
    "Sampler",
    "Schedule",
    "Setting",
    "Smoothness",
    "Solution",
    "State",
    "Stopping",
    "Task",
    "Trainer",
    "Tree",
    "UsageError",
    "Work",
    "accuracy",
    "adversaries",
    "aggregator",
    "binary_accuracy",
    "by_theory",
    "clip_norm",
    "compressor",
    "corrupt_labels",
    "cross_entropy",
    "data",
    "descend",
    "evaluate",
    "evaluate_clients",
    "evaluate_personal",
    "float_bits",
    "full_gradient",
    "keep_where",
    "launched",
    "leaves",
    "logistic",
    "message",
    "models",
    "named_leaves",
    "objective",
    "optimizer",
    "personal_part",
    "pretrained",
    "random",
    "regularizer",
    "rehearsed",
    "rounds",
    "sampler",
    "schedule",
    "sign_flipping",
    "simulate",
    "smoothness",
    "solution",
    "squared_error",
    "stateless",
    "task",
    "tree_map",
]
