"""Trackers: consumers of a run's metric stream that show it in TensorBoard, MLflow or Weights & Biases.

All of them write below the run's folder and need no network, unless the environment says otherwise, as their own
documentation has it: MLFLOW_TRACKING_URI (which Azure ML sets for its jobs), WANDB_MODE=online.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from vfl.errors import UsageError, unknown

Track = Callable[[Mapping[str, Any]], None]
"""Takes one round's metrics, among which `round` says which."""

_MOST = 100  # parameters of one MLflow request
_LONGEST = 500  # characters of a parameter in MLflow


@contextlib.contextmanager
def trackers(spec: str, folder: Path, config: Mapping[str, Any]) -> Iterator[Track]:
    """One consumer of the metric stream for all trackers of `spec`, such as `tensorboard,mlflow`; empty: none.

    `folder` is the run's, in which they write, and by whose name it is called; a run that is resumed there goes on as
    the same one. `config` is recorded with it. Numbers are tracked, texts and lists are not. Raises UsageError for an
    unknown name, one given twice, and a library that is missing.
    """
    with contextlib.ExitStack() as stack:
        tracks = [stack.enter_context(TRACKERS[name](folder, config)) for name in tracker_names(spec)]

        def track(metrics: Mapping[str, Any]) -> None:
            for each in tracks:
                each(metrics)

        yield track


def tracker_names(spec: str) -> list[str]:
    """The trackers that `tensorboard,mlflow` names, whose libraries are there; raises UsageError as `trackers` does."""
    names = [name.strip() for name in spec.split(",")] if spec.strip() else []
    for n, name in enumerate(names):
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if name in names[:n]:
            raise UsageError(f"trackers {spec!r} names {name} twice; write it once")
    for name in names:
        _library(name)
    return names


@contextlib.contextmanager
def tensorboard(folder: Path, config: Mapping[str, Any]) -> Iterator[Track]:
    """TensorBoard's event files in FOLDER/tensorboard: `tensorboard --logdir runs` shows the runs together."""
    SummaryWriter = _library("tensorboard").SummaryWriter
    written: list[Any] = []

    def track(metrics: Mapping[str, Any]) -> None:
        if not written:  # what an earlier attempt wrote of this round and later ones is played again
            written.append(SummaryWriter(str(folder / "tensorboard"), purge_step=metrics["round"]))
            written[0].add_text("config", f"```\n{yaml.safe_dump(dict(config), sort_keys=False)}```")
        for name, value in _numbers(metrics).items():
            written[0].add_scalar(name, value, metrics["round"])

    try:
        yield track
    finally:
        for writer in written:
            writer.close()


@contextlib.contextmanager
def mlflow(folder: Path, config: Mapping[str, Any]) -> Iterator[Track]:
    """An MLflow run, in FOLDER/mlflow unless MLFLOW_TRACKING_URI names a server; in an Azure ML job, the job's own."""
    library = _library("mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").absolute().as_uri()
    with _setting("MLFLOW_ALLOW_FILE_STORE", "true"):  # newer versions ask whether files are meant
        client = library.MlflowClient(uri)
        mine, given = _remembered(folder, "mlflow"), os.environ.get("MLFLOW_RUN_ID")
        if mine is None or given not in (None, mine):
            mine = given or _new_run(client, folder.name)
            _remember(folder, "mlflow", mine)
            # A sweep may have said its choices already, and MLflow refuses another text for the same parameter.
            said = client.get_run(mine).data.params if given else {}
            told = {name: str(value)[:_LONGEST] for name, value in config.items() if name not in said}
            parameters = [library.entities.Param(name, value) for name, value in told.items()]
            for first in range(0, len(parameters), _MOST):
                client.log_batch(mine, params=parameters[first : first + _MOST])
        elif not given:
            client.update_run(mine, status="RUNNING")

        def track(metrics: Mapping[str, Any]) -> None:
            at, step = int(time.time() * 1000), metrics["round"]
            numbers = {name: value for name, value in _numbers(metrics).items() if math.isfinite(value)}
            client.log_batch(mine, [library.entities.Metric(n, value, at, step) for n, value in numbers.items()])

        end = "FAILED"
        try:
            yield track
            end = "FINISHED"
        finally:
            if not given:  # who gave the run ends it
                client.set_terminated(mine, end)


def _new_run(client: Any, name: str) -> str:
    """The id of a run of this name in the experiment that MLFLOW_EXPERIMENT_NAME names, else vfl."""
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vfl")
    experiment = client.get_experiment_by_name(title)
    number = experiment.experiment_id if experiment else client.create_experiment(title)
    return client.create_run(number, run_name=name).info.run_id


@contextlib.contextmanager
def wandb(folder: Path, config: Mapping[str, Any]) -> Iterator[Track]:
    """A Weights & Biases run, in FOLDER/wandb for `wandb sync` to send later; WANDB_MODE=online sends it at once."""
    library = _library("wandb")
    mine = _remembered(folder, "wandb") or secrets.token_hex(4)
    _remember(folder, "wandb", mine)
    mode = os.environ.get("WANDB_MODE", "offline")
    run = library.init(
        project=os.environ.get("WANDB_PROJECT", "vfl"),
        name=folder.name,
        id=mine,
        resume="allow",
        dir=str(folder),
        config=dict(config),
        mode=mode,
        # It would copy what the terminal shows, and write into a display that stays in place.
        settings=library.Settings(console="off", silent=mode == "offline"),
    )
    code = 1
    try:
        yield lambda metrics: run.log(_numbers(metrics), step=metrics["round"])
        code = 0
    finally:
        run.finish(exit_code=code)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], AbstractContextManager[Track]]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
}
"""The trackers by name; each is an extra, `pip install vfl[NAME]`."""


def _library(extra: str) -> Any:
    """The module that a tracker needs."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if extra == "tensorboard" else extra)
    except ImportError as error:
        raise UsageError(f"tracking with {extra} needs its library ({error}); run `pip install vfl[{extra}]`") from None


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "round"
    }


def _remembered(folder: Path, name: str) -> str | None:
    """By which id the tracker knows the run of this folder."""
    path = folder / f".{name}_id"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _remember(folder: Path, name: str, mine: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".{name}_id").write_text(mine, encoding="utf-8")


@contextlib.contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    """An environment variable with this value for the time being, unless it is set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
