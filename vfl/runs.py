"""A run's folder: config.yaml, metrics.jsonl, model.safetensors, best.safetensors, checkpoints/, curves.png."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vfl.engine import RoundMetrics
from vfl.errors import UsageError

CONFIG, METRICS, MODEL, CHECKPOINTS, CURVES, TRACE, BEST = FILES = (
    "config.yaml", "metrics.jsonl", "model.safetensors", "checkpoints", "curves.png", "trace.json", "best.safetensors",
)  # fmt: skip
LAUNCH = ".launch"


def is_run(folder: Path) -> bool:
    """Whether a run lies there."""
    return (folder / CONFIG).exists()


def create(
    folder: Path,
    config: dict[str, Any],
    *,
    overwrite: bool = False,
    numbered: bool = False,
    launch: str | None = None,
) -> Path:
    """Makes the folder of a new run, writes its configuration there, and returns the folder.

    `numbered` goes on to folder-2, folder-3, … where the name is taken. `launch` is what `launched_by` will compare.
    Raises UsageError when a run lies there already (without `overwrite`) or the folder cannot be written.
    """
    with _writing(folder, "name another folder with --out"):
        if numbered:
            folder = _unused(folder)
        elif not overwrite and any((folder / name).exists() for name in FILES):
            raise UsageError(f"{folder} already holds a run; continue it with --resume, replace it with --overwrite, "
                             "or name another folder with --out")  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        old = [folder / name for name in (METRICS, MODEL, BEST, CURVES, TRACE, LAUNCH)]
        old += folder.glob(".*_id")  # by which trackers knew the run that was here
        for path in [*old, *(folder / CHECKPOINTS).glob("*.safetensors"), *_unfinished(folder)]:
            path.unlink(missing_ok=True)
        if launch is not None:
            (folder / LAUNCH).write_text(launch, encoding="utf-8")
        write_atomically(folder / CONFIG, _yaml(config))
    return folder


def reopen(folder: Path, config: dict[str, Any]) -> None:
    """Prepares the folder of an earlier run to go on in: its options now, and no files that a killed writer left."""
    with _writing(folder):
        for path in _unfinished(folder):
            path.unlink(missing_ok=True)
        write_atomically(folder / CONFIG, _yaml(config))


def launched_by(folder: Path, launch: str) -> bool:
    """Whether the run there was created by this launch, in an earlier attempt."""
    return (folder / LAUNCH).exists() and (folder / LAUNCH).read_text(encoding="utf-8") == launch


def _unused(folder: Path) -> Path:
    """This folder, or the first of folder-2, folder-3, … that does not exist; made at once, so that no one takes it."""
    found, n = folder, 1
    while True:
        try:
            found.mkdir(parents=True)
            return found
        except FileExistsError:
            n += 1
            found = folder.with_name(f"{folder.name}-{n}")


def _yaml(config: dict[str, Any]) -> bytes:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file of options. Raises UsageError when it is missing, unreadable or no mapping."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise UsageError(f"{path} must hold one `option: value` a line, as the config.yaml of a run does")
    return config


def read_metrics(folder: Path) -> list[RoundMetrics]:
    """The rounds recorded so far; a last line cut short by a crash is left out."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # a complete line ends with a newline
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error.msg}); remove the line to go on") from None
    return rows


class MetricsLog:
    """metrics.jsonl, one object a round, on disk as soon as the round is over."""

    def __init__(self, folder: Path, rounds: int = 0) -> None:
        """Keeps the first `rounds` rounds of what is there; later ones will be played again."""
        self._path = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["round"] <= rounds]
        with _writing(self._path):
            write_atomically(self._path, "".join(_line(row) for row in kept).encode())
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, metrics: RoundMetrics) -> None:
        """Appends a round."""
        with _writing(self._path):
            self._file.write(_line(metrics))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(row: RoundMetrics) -> str:
    # NaN and infinity are no JSON: null, as other readers expect.
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written atomically. Raises UsageError when it cannot be written."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen: set[int] = set()
    for name, t in contiguous.items():  # the format holds no two names of one memory
        if t.untyped_storage().data_ptr() in seen:
            contiguous[name] = t.clone()
        seen.add(t.untyped_storage().data_ptr())
    with _writing(path):
        write_atomically(path, to_safetensors(contiguous, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors (on the host) and metadata. Raises UsageError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete it to go on from the one before") from None


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content or, after a crash, what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _unfinished(folder: Path) -> list[Path]:
    """What writers left that were killed before they were done."""
    return [*folder.glob(".*.tmp"), *(folder / CHECKPOINTS).glob(".*.tmp")]


@contextlib.contextmanager
def _writing(path: Path, hint: str = "then --resume goes on from the newest checkpoint") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; {hint}") from None
