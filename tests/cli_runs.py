"""What the tests of `vfl run` share: small experiments through the command line, and what they leave on disk."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from torch import Tensor

from vfl.cli import _main

# With the execution and the chunk given, a run's floats are the same to the bit whenever it is played.
SMALL = (
    *("--data", "synthetic:features=6,classes=3,examples=10,test=30", "--clients", "10", "--clients-per-round", "6"),
    *("--model", "mlp:5", "--batch-size", "4", "--dtype", "float64", "--execution", "vmap", "--chunk", "3"),
)
OF_THE_MACHINE = ("seconds", "chunk", "execution", "memory")  # metrics that are no results


def vfl(*arguments: object) -> int:
    """`vfl run` in this process: its exit code."""
    try:
        return _main(["run", *map(str, arguments)])
    except SystemExit as ended:  # after --help
        return int(ended.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, whose modules are forgotten in the end; the curves are not drawn, which takes long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr("vfl.plots.learning_curves", lambda histories, path: path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rounds in metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds."""
    return safetensors.torch.load_file(path)


def newest(folder: Path) -> Path:
    """A run's newest checkpoint."""
    return max((folder / "checkpoints").iterdir())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files by their content, folders as None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def assert_same_run(found: Path, wanted: Path, tolerance: float = 0.0) -> None:
    """Both folders hold the same rounds, model and newest state, up to the tolerance (0: bit by bit)."""
    rows, expected = metrics(found), metrics(wanted)
    assert [row["round"] for row in rows] == list(range(1, len(expected) + 1)), "each round once"
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - set(OF_THE_MACHINE):
            np.testing.assert_allclose(row[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)
    for path in ("model.safetensors", f"checkpoints/{newest(wanted).name}"):
        have, want = tensors(found / path), tensors(wanted / path)
        assert have.keys() == want.keys()
        for name, tensor in want.items():
            np.testing.assert_allclose(have[name], tensor, rtol=tolerance, atol=tolerance, err_msg=f"{path} {name}")
