"""A pretrained start: a model from a file in the place of the one drawn."""

from __future__ import annotations

from pathlib import Path

import torch

from vfl.errors import UsageError
from vfl.runs import read_tensors
from vfl.task import Task


def pretrained(task: Task, path: Path) -> Task:
    """The task whose first parameters and buffers are those of a safetensors file, by the module's own names.

    A run's model.safetensors and best.safetensors are such files. Raises UsageError when the file cannot be read, lacks
    a tensor of the model or holds one of another shape, or one that the model has not.
    """
    try:
        tensors, _ = read_tensors(path)
    except UsageError:
        raise UsageError(f"init-from {path} is no safetensors file that can be read") from None
    held = {name: of for name, of in task.saved.items() if isinstance(of, str)}
    missing, left = sorted(held.keys() - tensors), sorted(tensors.keys() - task.saved.keys())
    if missing or left:
        what = f"has no {missing[0]!r}" if missing else f"has {left[0]!r}, which the model has not"
        raise UsageError(f"init-from {path} {what}: it is another model's")
    wanted = dict(zip(task.names, task.shapes, strict=True))
    wanted |= {name: tuple(b.shape) for name, b in zip(task.buffer_names, task.buffers, strict=True)}
    found = {}
    for name, of in held.items():
        if tuple(tensors[name].shape) != wanted[of]:
            shapes = f"{list(tensors[name].shape)} there and {list(wanted[of])} in the model"
            raise UsageError(f"init-from {path} is another model's: {name} is {shapes}")
        found[of] = tensors[name]
    x = torch.cat([found[name].reshape(-1).to(task.x) for name in task.names])
    buffers = tuple(found[n].to(b) if n in found else b for n, b in zip(task.buffer_names, task.buffers, strict=True))
    return task._replace(x=x, buffers=buffers)
