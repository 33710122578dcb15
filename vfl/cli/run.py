"""`vfl run`: an experiment from options to a finished folder."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from vfl import checkpoint, runs
from vfl.cli.options import Call, parse_run
from vfl.data import FederatedData, federated
from vfl.display import progress
from vfl.distributed import Ranks, launched, local_device
from vfl.engine import State
from vfl.errors import UsageError
from vfl.models import model
from vfl.simulate import Evaluation, make_engine, play
from vfl.task import Task, cross_entropy, squared_error, task

log = logging.getLogger("vfl")


def run(argv: Sequence[str]) -> int:
    """Runs the experiment that the arguments after `vfl run` describe; the exit code."""
    call = parse_run(argv)
    device = local_device(call.options.device)
    with launched(device) as ranks:
        return _run(call, device, ranks)


def _run(call: Call, device: torch.device, ranks: Ranks) -> int:
    options, config = call.options, call.config()
    folder, resuming = _folder(call)
    data = federated(
        options.data, partition=options.partition, clients=options.clients, seed=options.seed, root=options.data_root,
        validation=options.validation, held_out=options.held_out,
    )  # fmt: skip
    learning = make_task(call, data, device)
    algorithm = call.algorithm.build(learning, data.clients.population)
    engine = make_engine(
        algorithm, learning, data, batch_size=options.examples_per_batch(), local_epochs=options.local_epochs,
        local_steps=options.local_steps, clients_per_round=options.clients_per_round, sampling=options.sampling,
        execution=options.execution, chunk=options.chunk, client_state=options.client_state,
        on_nonfinite=options.on_nonfinite, ranks=ranks,
    )  # fmt: skip
    state = engine.init(options.seed)
    saved = checkpoint.every(folder) if resuming else []
    if saved:
        state = checkpoint.load(saved[-1], state, call.fingerprint(), ranks)
    if ranks.first:
        if resuming:
            runs.write_config(folder, config)
        else:
            runs.create(folder, config, options.overwrite)
    when = Evaluation(options.eval_every, options.client_eval_every)
    title = f"{call.name} on {data.name}, {data.clients.population:,} clients"
    hidden = options.quiet or not ranks.first
    with (
        _signals() as signalled,
        _recording(folder, state.round, ranks) as record,
        progress(options.rounds, title, quiet=hidden, done=state.round) as show,
    ):
        if resuming and ranks.first:
            log.warning("going on from round %d of %s", state.round, folder)
        rows: list[dict[str, Any]] = []
        stream = play(engine, state, options.rounds, evaluation=when, stop=lambda: signalled() is not None)
        try:
            for state, metrics in stream:
                record(metrics)
                show(metrics)
                rows.append(metrics)
                if options.checkpoint_every and state.round % options.checkpoint_every == 0:
                    checkpoint.save(folder, state, call.fingerprint(), options.keep, ranks)
        finally:
            # Ranks can only save together, and after an error they may not all be here.
            together = state.round == options.rounds or signalled() is not None
            if together or ranks.world == 1:
                checkpoint.save(folder, state, call.fingerprint(), options.keep, ranks)
            if ranks.first:
                _write_model(folder, learning, state, config)
    if ranks.first:
        _close(folder, call, rows, state, signalled(), options.quiet)
    return {None: 0, signal.SIGINT: 130, signal.SIGTERM: 143}[signalled()]


def make_task(call: Call, data: FederatedData, device: torch.device) -> Task:
    """The model, drawn from the seed, with the loss that the data asks for: cross-entropy, or half the squared error.

    Raises UsageError when the model's outputs do not fit the data.
    """
    options, dtype = call.options, getattr(torch, call.options.dtype)
    if "" not in sys.path:
        sys.path.insert(0, "")  # `module:factory` may lie in the current folder
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        module = model(options.model, tuple(data.clients.x.shape[1:]), data.classes)
    loss = cross_entropy if data.classes else squared_error
    try:
        with torch.no_grad():
            few = data.transform(data.clients.x[:2], torch.float32)
            outputs = module.eval()(few)
    except (RuntimeError, ValueError, IndexError) as error:
        shape = "×".join(map(str, data.clients.x.shape[1:]))
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"model {options.model!r} cannot take the inputs of {data.name} ({shape}): {reason}") from None
    if data.classes and outputs.shape[-1] <= int(data.clients.y.max()):
        raise UsageError(f"model {options.model!r} has {outputs.shape[-1]} outputs, too few for the labels 0 to "
                         f"{int(data.clients.y.max())} of {data.name}")  # fmt: skip
    return task(module.train(), loss, device=device, dtype=dtype)


def _folder(call: Call) -> tuple[Path, bool]:
    """Where the run lies, and whether it goes on from what is there."""
    options = call.options
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if options.out is None:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            raise UsageError("under torchrun --max-restarts, --out is needed, so that a restart finds its checkpoints")
        now = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{now}-{call.name}-{options.data.partition(':')[0]}"
        taken = [""] + [f"-{n}" for n in range(2, 1000)]
        return next(f for f in (Path("runs") / (name + suffix) for suffix in taken) if not f.exists()), False
    if options.resume and not runs.is_run(options.out):
        raise UsageError(f"--resume: there is no run in {options.out}; leave --resume out to start one")
    return options.out, runs.is_run(options.out) and (options.resume or restarted)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """Ctrl-C and SIGTERM let the round finish, so that it can be saved; again after two seconds, Ctrl-C means now."""
    received: list[tuple[int, float]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        # torchrun passes a terminal's Ctrl-C on a second time, at once.
        if received and number == signal.SIGINT and time.monotonic() - received[0][1] > 2:
            raise KeyboardInterrupt
        if not received:
            log.warning("finishing this round, then saving; Ctrl-C again to stop at once")
        received.append((number, time.monotonic()))

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0][0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _write_model(folder: Path, learning: Task, state: State, config: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = learning.state_dict(state.server.x, state.buffers)
    about = {"format": "pt", "model": config["model"], "round": str(state.round)}
    runs.write_tensors(folder / runs.MODEL, tensors, about)


def _close(
    folder: Path, call: Call, rows: list[dict[str, Any]], state: State, signalled: int | None, quiet: bool
) -> None:
    """Draws the curves and says where everything is."""
    plot = "curves need `pip install vfl[plots]`"
    with contextlib.suppress(UsageError):  # matplotlib is an extra: a run does not fail without it
        from vfl.plots import learning_curves

        learning_curves({call.name: runs.read_metrics(folder)}, folder / runs.CURVES)
        plot = str(folder / runs.CURVES)
    if quiet:
        return
    scores = {k: v for row in rows for k, v in row.items() if k.startswith("test_")}
    parts = [f"{k.replace('_', ' ')} {v:.2%}" if "accuracy" in k else f"{k.replace('_', ' ')} {v:.4f}"
             for k, v in scores.items()]  # fmt: skip
    seconds = sum(row["seconds"] for row in rows)
    ended = "interrupted" if signalled else "done"
    print(f"{ended} after round {state.round} of {call.options.rounds}: {', '.join(parts) or 'no test set'}; "
          f"{seconds:.1f} s of training")  # fmt: skip
    print(f"run    {folder}\nplot   {plot}")
    if signalled:
        print(f"go on  vfl run --resume --out {folder}")
