"""A run's folder: config.yaml, metrics.jsonl, model.safetensors, checkpoints/, curves.png."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vfl.engine import RoundMetrics
from vfl.errors import UsageError

CONFIG, METRICS, MODEL, CHECKPOINTS, CURVES = (
    "config.yaml", "metrics.jsonl", "model.safetensors", "checkpoints", "curves.png",
)  # fmt: skip


def is_run(folder: Path) -> bool:
    """Whether a run lies there."""
    return (folder / CONFIG).exists()


def create(folder: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder of a new run and writes its configuration.

    Raises UsageError when a run lies there already (without `overwrite`) or the folder cannot be written.
    """
    if is_run(folder) and not overwrite:
        raise UsageError(f"{folder} already holds a run; continue it with --resume, replace it with --overwrite, "
                         "or name another folder with --out")  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [folder / METRICS, folder / MODEL, folder / CURVES, *(folder / CHECKPOINTS).glob("*.safetensors")]:
            old.unlink(missing_ok=True)
        write_config(folder, config)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from None


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes a run's options, so that `--config` or `--resume` finds them."""
    write_atomically(folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())


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
        kept = [row for row in read_metrics(folder) if row["round"] <= rounds]
        write_atomically(folder / METRICS, "".join(_line(row) for row in kept).encode())
        self._file = (folder / METRICS).open("a", encoding="utf-8")

    def write(self, metrics: RoundMetrics) -> None:
        """Appends a round."""
        self._file.write(_line(metrics))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(row: RoundMetrics) -> str:
    # NaN is no JSON: null, as other readers expect.
    clean = {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written atomically."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
