"""`vfl run`: an experiment from options to a finished folder."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vfl import checkpoint, runs
from vfl.cli.call import Call, parse_run
from vfl.cli.experiment import evaluation, experiment
from vfl.cli.launch import follow_launcher, launch, rank_count
from vfl.cli.signals import first_signal
from vfl.display import progress
from vfl.distributed import Ranks, launched, local_device
from vfl.errors import ClientError, DivergedError, UsageError
from vfl.evaluation import check_metrics
from vfl.judging import check_judges, scheduled
from vfl.plateau import Plateau
from vfl.plots import score
from vfl.precision import tf32
from vfl.profiling import summary, traced
from vfl.replicas import by_setting, parse_grid
from vfl.simulate import play
from vfl.state import State
from vfl.stopping import Standing, Stopping, agreed
from vfl.terminal import number as shown
from vfl.tracking import tracker_names, trackers

log = logging.getLogger("vfl")

_SAID = ("test", "")  # the splits whose scores a run ends with: the test set, and the objective


def run(argv: Sequence[str]) -> int:
    """Runs the experiment that the arguments after `vfl run` describe; the exit code."""
    call = parse_run(argv)
    if int(os.environ.get("RANK", "0")) == 0:  # the one that tracks; said before there is a folder
        tracker_names(call.options.track or "")
    count = rank_count(call.options.wanted_ranks(), call.options.device)
    if count > 1:
        return launch(argv, count)
    follow_launcher()
    device = local_device(call.options.device)
    with launched(device) as ranks, tf32(call.options.dtype == "tf32" and device.type == "cuda"):
        return _run(call, device, ranks)


def _run(call: Call, device: torch.device, ranks: Ranks) -> int:
    call, learning, data, engine, start = experiment(call, device, ranks)
    options, when = call.options, evaluation(call.options)
    stopping: Stopping = call.groups["stopping"]
    plateau: Plateau = call.groups["plateau"]
    check_metrics(when.metrics, learning)
    check_judges([*stopping.judges, *plateau.judges], engine, when)
    folder, start = _open(call, start, device, ranks)
    state = start
    before = runs.read_metrics(folder) if ranks.first and start.round else []
    judged = (scheduled(row, when) for row in before if row["round"] <= start.round)
    standing = agreed(stopping.standing(judged), ranks, device)
    judge = stopping.criterion.metric if stopping.criterion else ""
    title = f"{call.name} on {data.name}, {data.clients.population:,} clients"

    def save() -> None:
        checkpoint.save(folder, state, call.fingerprint(), options.keep, ranks)

    def say() -> None:
        log.warning("finishing this round, then saving; Ctrl-C again to stop now, without saving")

    def write_model(name: str, **more: str) -> None:
        if ranks.first:
            about = {"format": "pt", "model": options.model, "round": str(state.round), **more}
            runs.write_tensors(folder / name, learning.state_dict(state.server.x, state.buffers), about)

    def finish() -> None:
        save()
        write_model(runs.MODEL)

    with first_signal(say) as signalled:  # until all is said: a launcher ends a rank when another has ended
        with (
            _recording(folder, start.round, ranks) as record,
            trackers((options.track or "") if ranks.first else "", folder, call.config()) as track,
            progress(options.rounds, title, quiet=options.quiet or not ranks.first, done=start.round) as show,
            traced(folder / runs.TRACE if options.profile and ranks.first else None) as step,
        ):
            if start.round:
                log.warning("going on from round %d of %s", start.round, folder)
            if ranks.first and standing.best is not None and not _kept(folder, judge, standing.round):
                log.warning("the best model by %s so far, that of round %d, was not kept; %s will hold the next better "
                            "one", judge, standing.round, runs.BEST)  # fmt: skip
            try:
                for state, metrics in play(
                    engine, start, options.rounds, evaluation=when, stopping=stopping, plateau=plateau,
                    stop=lambda: bool(signalled()), standing=standing,
                ):  # fmt: skip
                    record(metrics)
                    show(metrics)
                    track(metrics)
                    standing = stopping.after(standing, scheduled(metrics, when))
                    if standing.round == state.round:
                        write_model(runs.BEST, best_by=judge)
                    step()
                    if options.checkpoint_every and state.round % options.checkpoint_every == 0:
                        save()
            except Exception as error:
                # A divergence, which all ranks see, and a client's failure leave the state as it was; after other
                # errors the clients' states may be a round ahead. Ranks can only save together.
                alone = ranks.world == 1 and (isinstance(error, ClientError) or state.store.empty)
                if alone or isinstance(error, DivergedError):
                    finish()
                raise
            finish()
        reason = stopping.reason(standing)
        early = reason is None and state.round < options.rounds
        number = signalled() or (signal.SIGTERM if early else None)  # or another rank's signal
        if ranks.first:
            _report(call, folder, state.round, reason, standing)
    return 128 + number if number else 0


def _kept(folder: Path, judge: str, round: int) -> bool:
    """Whether best.safetensors is the model of that round, by this metric, or of a later one, to be played again."""
    path = folder / runs.BEST
    about = runs.read_tensors(path)[1] if path.exists() else {}
    return about.get("best_by") == judge and int(about["round"]) >= round


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


def _report(call: Call, folder: Path, done: int, reason: str | None, standing: Standing) -> None:
    """Draws the curves, and says how the run ended, for what `reason` if early, and where everything is."""
    judge = call.groups["stopping"].criterion
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
    interrupted = done < wanted and reason is None
    if reason is not None:
        print(f"stopped early: {reason}")
    ended, results = "interrupted" if interrupted else "done", ", ".join(parts) or "no test set"
    print(f"{ended} after round {done} of {wanted}: {results}; {seconds:.1f} s of training")
    print(f"run    {folder}\nplot   {plot}")
    if judge is not None and standing.best is not None:
        print(f"best   {_score(judge.metric, standing.best, None)} in round {standing.round}: {folder / runs.BEST}")
    if interrupted:
        print(f"go on  vfl run --resume --out {shlex.quote(str(folder))}")
