"""Saving a state and going on from it. R client rows, ... the shape of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfl import runs
from vfl.base import Tree, filled, leaves, named_leaves
from vfl.distributed import Ranks
from vfl.errors import UsageError
from vfl.state import State, Totals

FORMAT = "vfl-checkpoint-1"


def save(folder: Path, state: State, config: dict[str, Any], keep: int, ranks: Ranks = Ranks()) -> None:
    """Writes the state to `folder`/checkpoints and deletes all but the newest `keep`. Every rank calls it.

    `config` holds the options that decide the results; `load` compares them.
    """
    ids, rows = state.store.rows()
    device = state.server.x.device
    gathered = [ranks.gather(torch.from_numpy(ids), device), *(ranks.gather(row, device) for row in rows)]
    if not ranks.first:
        return
    tensors = {"key": state.key, **_prefixed("server", state.server), **_prefixed("buffers", state.buffers)}
    if not state.store.empty:
        all_ids = torch.cat(gathered[0])
        order = all_ids.argsort()
        tensors |= {"client_ids": all_ids[order], **_prefixed("template", state.store.template)}
        names = _prefixed("clients", state.store.template)
        tensors |= {name: torch.cat(parts)[order] for name, parts in zip(names, gathered[1:], strict=True)}
    metadata = {
        "format": FORMAT,
        "round": str(state.round),
        "totals": json.dumps(state.totals._asdict()),
        "config": json.dumps(config),
    }
    runs.write_tensors(of_round(folder, state.round), tensors, metadata)
    for old in every(folder)[:-keep]:
        old.unlink(missing_ok=True)


def of_round(folder: Path, round: int) -> Path:
    """The checkpoint after so many rounds of a run."""
    return folder / runs.CHECKPOINTS / f"round-{round:08d}.safetensors"


def every(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((folder / runs.CHECKPOINTS).glob("round-*.safetensors"), key=round_of)


def round_of(path: Path) -> int:
    """The round after which a checkpoint was written."""
    return int(path.stem.removeprefix("round-"))


def load(path: Path, fresh: State, config: dict[str, Any], ranks: Ranks = Ranks()) -> State:
    """The saved state, in the place of the fresh one of the same run (whose tensors say shapes and devices).

    Raises UsageError when the file is damaged or belongs to another configuration.
    """
    tensors, metadata = runs.read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UsageError(f"{path} is no checkpoint that this version reads ({FORMAT})")
    saved = json.loads(metadata["config"])
    for name in [*config, *saved]:
        if saved.get(name) != json.loads(json.dumps(config.get(name))):
            raise UsageError(
                f"{path} belongs to another configuration: {name.replace('_', '-')} was {saved.get(name)!r} there and "
                f"is {config.get(name)!r} now; resume with the same options or start in another folder"
            )
    server = _restore("server", fresh.server, tensors, path)
    buffers = _restore("buffers", fresh.buffers, tensors, path)
    store = fresh.store
    store.round = int(metadata["round"])
    if not store.empty:
        store.template = _restore("template", store.template, tensors, path)
        rows = [tensors[name] for name in _prefixed("clients", store.template)]
        store.load(tensors["client_ids"].numpy().astype(np.int64), rows, ranks.rank, ranks.world)
    totals = Totals(**json.loads(metadata["totals"]))
    return State(int(metadata["round"]), tensors["key"], server, buffers, store, totals)


def _prefixed(prefix: str, tree: Tree) -> dict[str, Tensor]:
    return {f"{prefix}.{name}".rstrip("."): leaf for name, leaf in named_leaves(tree).items()}


def _restore(prefix: str, like: Tree, tensors: dict[str, Tensor], path: Path) -> Tree:
    restored = []
    for (name, _), leaf in zip(_prefixed(prefix, like).items(), leaves(like), strict=True):
        value = tensors.get(name)
        if value is None or value.shape != leaf.shape or value.dtype != leaf.dtype:
            found = "nothing" if value is None else f"{list(value.shape)} {value.dtype}"
            raise UsageError(f"{path} belongs to another configuration: {name} is {found} there and "
                             f"{list(leaf.shape)} {leaf.dtype} now")  # fmt: skip
        restored.append(value.to(leaf.device))
    return filled(like, restored)
