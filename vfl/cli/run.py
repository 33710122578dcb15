"""`vfl run`: an experiment from options to a finished folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vfl import checkpoint, runs
from vfl.cli.launch import follow_launcher, launch, rank_count
from vfl.cli.options import Call, parse_run
from vfl.cli.signals import first_signal
from vfl.data import FederatedData, federated
from vfl.display import progress
from vfl.distributed import Ranks, launched, local_device
from vfl.engine import State
from vfl.errors import ClientError, DivergedError, UsageError
from vfl.evaluation import check_metrics
from vfl.models import model
from vfl.plots import score
from vfl.problems import LinearProblem
from vfl.profiling import summary, traced
from vfl.regularizers import regularizer
from vfl.replicas import by_setting, parse_grid
from vfl.simulate import Evaluation, make_engine, play
from vfl.spec import parse
from vfl.task import Loss, Task, cross_entropy, logistic, squared_error, task
from vfl.terminal import number as shown

log = logging.getLogger("vfl")

_SAID = ("test", "")  # the splits whose scores a run ends with: the test set, and the objective


def run(argv: Sequence[str]) -> int:
    """Runs the experiment that the arguments after `vfl run` describe; the exit code."""
    call = parse_run(argv)
    count = rank_count(call.options.wanted_ranks(), call.options.device)
    if count > 1:
        return launch(argv, count)
    follow_launcher()
    device = local_device(call.options.device)
    with launched(device) as ranks:
        return _run(call, device, ranks)


def _run(call: Call, device: torch.device, ranks: Ranks) -> int:
    options = call.options
    data_seed = options.seed if options.data_seed is None else options.data_seed
    data = federated(
        options.data, partition=options.partition, clients=options.clients, seed=data_seed, root=options.data_root,
        validation=options.validation, held_out=options.held_out,
    )  # fmt: skip
    if options.model == "auto":  # the configuration names the model that was trained
        options = dataclasses.replace(options, model=data.model)
        call = call._replace(options=options)
    learning = make_task(call, data, device)
    replicas, x = options.replication(), learning.x
    if replicas is not None:  # each has a model of its own seed
        models = {s: make_task(call, data, device, options.seed + s).x for s in range(replicas.seeds)}
        x = torch.stack([models[int(setting["replica"])] for setting in replicas.settings()])
    engine = make_engine(
        call.algorithm, learning, data, batch_size=options.batch_size, local_epochs=options.local_epochs,
        local_steps=options.local_steps, draw=options.draw, reshuffle=options.reshuffle,
        clients_per_round=options.clients_per_round, sampling=options.sampling,
        execution=options.execution, chunk=options.chunk, client_state=options.client_state,
        on_nonfinite=options.on_nonfinite, profile=options.profile, replicas=replicas, ranks=ranks,
    )  # fmt: skip
    when = Evaluation(options.eval_every, options.client_eval_every, options.chosen_metrics())
    check_metrics(when.metrics, learning)
    folder, start = _open(call, engine.init(options.seed, x), device, ranks)
    state = start
    title = f"{call.name} on {data.name}, {data.clients.population:,} clients"

    def save() -> None:
        checkpoint.save(folder, state, call.fingerprint(), options.keep, ranks)

    def say() -> None:
        log.warning("finishing this round, then saving; Ctrl-C again to stop now, without saving")

    def finish() -> None:
        save()
        if ranks.first:
            about = {"format": "pt", "model": options.model, "round": str(state.round)}
            runs.write_tensors(folder / runs.MODEL, learning.state_dict(state.server.x, state.buffers), about)

    with (
        first_signal(say) as signalled,
        _recording(folder, start.round, ranks) as record,
        progress(options.rounds, title, quiet=options.quiet or not ranks.first, done=start.round) as show,
        traced(folder / runs.TRACE if options.profile and ranks.first else None) as step,
    ):
        if start.round:
            log.warning("going on from round %d of %s", start.round, folder)
        try:
            for state, metrics in play(engine, start, options.rounds, evaluation=when, stop=lambda: bool(signalled())):
                record(metrics)
                show(metrics)
                step()
                if options.checkpoint_every and state.round % options.checkpoint_every == 0:
                    save()
        except Exception as error:
            # A divergence, which all ranks see, and a client's failure leave the state as it was; after other errors
            # the clients' states may be a round ahead. Ranks can only save together.
            alone = ranks.world == 1 and (isinstance(error, ClientError) or state.store.empty)
            if alone or isinstance(error, DivergedError):
                finish()
            raise
        finish()
    number = signalled() or (signal.SIGTERM if state.round < options.rounds else None)  # or another rank's signal
    if ranks.first:
        _report(call, folder, state.round)
    return 128 + number if number else 0


def _open(call: Call, fresh: State, device: torch.device, ranks: Ranks) -> tuple[Path, State]:
    """The run's folder, ready to be written to, and the state to start from: the fresh one or the newest saved.

    Raises UsageError when the folder cannot be used, and leaves it then as it was.
    """
    options, launch = call.options, _launch()
    if options.out is None and launch is not None:
        raise UsageError("under torchrun --max-restarts, --out is needed, so that a restart finds its checkpoints")
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{call.name.replace(':', '.')}-{options.data.partition(':')[0]}"
    folder, state = options.out or Path("runs") / name, fresh
    restarted = launch is not None and runs.launched_by(folder, launch)
    resuming = options.resume or restarted
    # The first rank decides: what the others see of a shared folder may be older.
    saved = checkpoint.every(folder) if resuming and ranks.first else []
    after = torch.tensor([1 + checkpoint.round_of(saved[-1]) if saved else 0], device=device)
    if rounds := int(ranks.all_reduce(after)):
        state = checkpoint.load(checkpoint.of_round(folder, rounds - 1), fresh, call.fingerprint(), ranks)
    if state.round > options.rounds:
        raise UsageError(f"the run in {folder} has done {state.round} rounds, more than --rounds {options.rounds}; "
                         "ask for more or leave --rounds out")  # fmt: skip
    refusal: UsageError | None = None
    if ranks.first:
        try:
            if resuming:
                runs.reopen(folder, call.config())
            else:
                numbered = options.out is None
                folder = runs.create(
                    folder, call.config(), overwrite=options.overwrite, numbered=numbered, launch=launch
                )
        except UsageError as error:
            refusal = error
    if int(ranks.all_reduce(torch.tensor([int(refusal is not None)], device=device))):
        raise refusal or UsageError(f"the first rank cannot write {folder}")
    return folder, state


def _launch() -> str | None:
    """What this torchrun's restarts share and others do not; None where nothing restarts the run."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {socket.gethostname()} {os.getppid()}"


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
    mixed = options.dtype == "bfloat16"
    made = task(
        module, loss, regularizer=penalty if options.regularizer else None, device=device,
        dtype=torch.float32 if mixed else getattr(torch, options.dtype), compute=torch.bfloat16 if mixed else None,
    )  # fmt: skip
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


@contextlib.contextmanager
def _recording(folder: Path, rounds: int, ranks: Ranks) -> Iterator[Callable[[dict[str, Any]], None]]:
    if not ranks.first:
        yield lambda metrics: None
        return
    file = runs.MetricsLog(folder, rounds)
    try:
        yield file.write
    finally:
        file.close()


def _score(name: str, value: float, std: float | None) -> str:
    """A metric in words, with its deviation over replicas."""
    write = (lambda v: f"{v:.2%}") if "accuracy" in name else shown
    return f"{name.replace('_', ' ')} {write(value)}" + ("" if std is None else f" ± {write(std)}")


def _report(call: Call, folder: Path, done: int) -> None:
    """Draws the curves, and says how the run ended and where everything is."""
    history, wanted = runs.read_metrics(folder), call.options.rounds
    try:
        from vfl.plots import learning_curves

        grid = parse_grid(call.options.grid)
        curves = by_setting(history, list(grid)) if grid else {call.name: history}
        plot = str(learning_curves(curves, folder / runs.CURVES))
    except UsageError as error:  # matplotlib is an extra: a run does not fail without it
        plot = f"none: {error}"
    if call.options.quiet:
        return
    known = {k: v for row in history for k, v in row.items() if v is not None and (s := score(k)) and s.split in _SAID}
    parts = [_score(name, value, history[-1].get(f"{name}_std")) for name, value in known.items()]
    if call.options.profile:
        Console().print(summary(history))
    seconds = sum(row["seconds"] for row in history)
    ended = "interrupted" if done < wanted else "done"
    print(f"{ended} after round {done} of {wanted}: {', '.join(parts) or 'no test set'}; {seconds:.1f} s of training")
    print(f"run    {folder}\nplot   {plot}")
    if done < wanted:
        print(f"go on  vfl run --resume --out {shlex.quote(str(folder))}")
