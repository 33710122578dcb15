"""The parts of an experiment, made from its options: data, model, algorithm, engine and first state."""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfl.adversaries import corrupt_labels
from vfl.cli.call import Call
from vfl.cli.options import RunOptions
from vfl.data import FederatedData, federated
from vfl.distributed import Ranks
from vfl.engine import Engine
from vfl.errors import UsageError
from vfl.models import model
from vfl.pretrained import pretrained
from vfl.problems import LinearProblem
from vfl.regularizers import regularizer
from vfl.simulate import Evaluation, make_engine
from vfl.spec import parse
from vfl.state import State
from vfl.task import Loss, Task, cross_entropy, logistic, squared_error, task
from vfl.terminal import number as shown
from vfl.theory import by_theory

log = logging.getLogger("vfl")


class Experiment(NamedTuple):
    """What a run plays with."""

    call: Call  # as given, with what was left to auto and to theory filled in
    task: Task
    data: FederatedData
    engine: Engine
    state: State  # before the first round


def experiment(call: Call, device: torch.device, ranks: Ranks) -> Experiment:
    """The experiment that the call describes. Raises UsageError where its parts do not fit together."""
    options = call.options
    data_seed = options.seed if options.data_seed is None else options.data_seed
    data = federated(
        options.data, partition=options.partition, clients=options.clients, seed=data_seed, root=options.data_root,
        validation=options.validation, held_out=options.held_out,
    )  # fmt: skip
    if options.corrupt_labels:
        data = corrupt_labels(data, options.corrupt_labels, data_seed)
    if options.model == "auto":  # the configuration names the model that was trained
        options = dataclasses.replace(options, model=data.model)
        call = call._replace(options=options)
    learning = make_task(call, data, device)
    if options.step_size == "theory":
        call = _by_theory(call, learning, data)
    plateau = call.groups["plateau"]
    if call.groups["fine_tuning"].fine_tune_steps and not options.client_eval_every:
        raise UsageError("--fine-tune-steps is for what --client-eval-every evaluates, which is 0: never; give it, too")
    learning = call.groups["privacy"].gradients(learning)
    replicas, x = options.replication(), learning.x
    if replicas is not None:  # each has a model of its own seed
        models = {s: make_task(call, data, device, options.seed + s).x for s in range(replicas.seeds)}
        x = torch.stack([models[int(setting["replica"])] for setting in replicas.settings()])
    engine = make_engine(
        plateau.configure(call.algorithm), learning, data, rounds=options.rounds,
        batch_size=options.batch_size, local_epochs=options.local_epochs,
        local_steps=options.local_steps, draw=options.draw, reshuffle=options.reshuffle, wrappers=call.wrappers,
        clients_per_round=options.clients_per_round, sampling=options.sampling,
        execution=options.execution, chunk=options.chunk, client_state=options.client_state,
        on_nonfinite=options.on_nonfinite, profile=options.profile, replicas=replicas, ranks=ranks,
    )  # fmt: skip
    return Experiment(call, learning, data, engine, engine.init(options.seed, x))


def evaluation(options: RunOptions) -> Evaluation:
    """What is evaluated when."""
    return Evaluation(options.eval_every, options.client_eval_every, options.chosen_metrics(), options.validation_every)


def _by_theory(call: Call, task: Task, data: FederatedData) -> Call:
    """The call with its method's theorem's step sizes."""
    options, given = call.options, call.algorithm
    found = by_theory(given, task, data, clients_per_round=options.clients_per_round, work=options.work())
    named = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}  # pyright: ignore[reportArgumentType]
    changed = [f"{n.replace('_', '-')} {shown(v)}" for n, v in named.items() if v != getattr(given, n)]
    log.warning("by theory: %s", ", ".join(changed))
    return call._replace(algorithm=found)


def make_task(call: Call, data: FederatedData, device: torch.device, seed: int | None = None) -> Task:
    """The model, drawn from the seed (--seed), with the loss that the data asks for, and the regularizer.

    The loss is half the squared error for numbers as targets, the logistic loss for two classes and a model with one
    output, else cross-entropy. Raises UsageError when the model cannot take the data's inputs or its outputs do not fit
    the targets.
    """
    options = call.options
    if "" not in sys.path:
        sys.path.insert(0, "")  # `module:factory` may lie in the current folder
    with torch.random.fork_rng():
        torch.manual_seed(options.seed if seed is None else seed)
        x_shape, y_shape = (tuple(part.shape[1:]) for part in (data.clients.x, data.clients.y))
        module = model(options.model, x_shape, data.classes, y_shape)
    penalty = regularizer(options.regularizer)
    loss = _loss(module, data, options.model)
    mixed, dtype = options.dtype == "bfloat16", torch.float64 if options.dtype == "float64" else torch.float32
    made = task(
        module, loss, regularizer=penalty if options.regularizer else None, device=device,
        dtype=dtype, compute=torch.bfloat16 if mixed else None, frozen=options.frozen, recompute=options.forgetful(),
    )  # fmt: skip
    if options.init_from is not None:
        made = pretrained(made, options.init_from)
    return made._replace(problem=LinearProblem(data, penalty)) if parse(options.model).name == "linear" else made


def _loss(module: nn.Module, data: FederatedData, name: str) -> Loss:
    """The loss, tried on two examples, so that a model that does not fit the data is refused before the run begins."""
    x, y = data.clients.x[:2], data.clients.y[:2]
    shape = "×".join(map(str, x.shape[1:]))
    with torch.no_grad():
        try:
            outputs = module.eval()(data.transform(x, torch.float32))
        except Exception as error:  # the model is anyone's code
            raise UsageError(
                f"model {name!r} cannot take the inputs of {data.name} ({shape}): {_first(error)}"
            ) from None
        found = outputs.shape[-1] if isinstance(outputs, Tensor) and outputs.dim() else None
        loss = squared_error if not data.classes else logistic if (data.classes, found) == (2, 1) else cross_entropy
        if loss is cross_entropy and found is not None:
            labels = [split.y for split in (data.clients, data.test, data.validation, data.held_out) if split]
            largest = max(int(y.max()) for y in labels if y.numel())
            if found <= largest:
                raise UsageError(
                    f"model {name!r} has {found} outputs, too few for the labels 0 to {largest} of {data.name}"
                )
        try:
            fits = loss(outputs, y).shape == (len(y),)
        except Exception as error:
            raise UsageError(
                f"model {name!r} has outputs that the loss of {data.name} cannot take: {_first(error)}"
            ) from None
        if not fits:
            raise UsageError(f"model {name!r} must give one row of outputs an example")
    return loss


def _first(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
