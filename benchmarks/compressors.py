"""Compressors beside the primitive that bounds each: a part of `benchmarks.algorithms`.

Which primitive that is, is seen rather than declared: of those that a compressor calls (a draw of random numbers, a
selection, a decomposition), the one whose calls together are dearest, replayed on the same numbers; at least a copy.
A compressor that is a kernel of its own runs by torch's operators while it is watched, so that what it cannot do
without is seen and replayed by torch, however it is computed when its time is taken.
A reduction or a subset says only what is to be written, so that a copy is counted on top of it.
C vectors at once, D entries each.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import statistics
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vfl
from benchmarks.measuring import in_turn, seconds
from benchmarks.tables import Column, Row, mark, number
from vfl.errors import UsageError
from vfl.transforms import mapped

ALLOWED = 1.5
"""How many times as long as its primitive a compressor may take."""
MODULE = "vfl.compressors"
ARGUMENTS = {"k: str": "1%", "k: int": "2", "p: float": "0.1", "s: int": "16", "bits: int": "8"}
"""What a compressor is given for parameters without a default."""
PRIMITIVES = {
    "vfl.uniform": "uniform", "vfl.normal": "normal", "vfl.subset": "subset", "vfl.positions": "subset",
    "aten.topk": "topk", "aten.sort": "sort",
    "aten.kthvalue": "kthvalue", "aten._linalg_svd": "svd", "aten.linalg_qr": "qr", "aten.mm": "product",
    "aten.bmm": "product", "aten.sum": "reduction", "aten.amin": "reduction", "aten.amax": "reduction",
    "aten.linalg_vector_norm": "reduction",
}  # fmt: skip
"""Operators that a compressor cannot do without, and what they are called."""

BEFORE_WRITING = ("reduction", "subset")
"""Primitives that have to end before the first entry can be written: a second pass over the vector follows."""


class Primitive(NamedTuple):
    """An operator with all its calls."""

    name: str
    again: Callable[[], object]


class Calls(TorchDispatchMode):
    """Notes the primitives that run inside, with the numbers they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, list[Callable[[], object]]] = {}

    def primitives(self) -> list[Primitive]:
        """What ran."""
        return [Primitive(name, lambda calls=calls: [call() for call in calls]) for name, calls in self._made.items()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if name := PRIMITIVES.get(str(func.overloadpacket)):
            self._made.setdefault(name, []).append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def available() -> bool:
    """Whether vfl has compressors."""
    return importlib.util.find_spec(MODULE) is not None


def specs() -> list[str]:
    """Every compressor of vfl's table, with arguments where it asks for some."""
    return [_spec(name, function) for name, function in importlib.import_module(MODULE).COMPRESSORS.items()]


def _spec(name: str, function: Callable[..., Any]) -> str:
    kinds = typing.get_type_hints(function)
    asked = [
        f"{p.name}: {kinds[p.name].__name__}"
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if any(parameter not in ARGUMENTS for parameter in asked):
        return name  # vfl says what it misses
    return f"{name}:{','.join(ARGUMENTS[parameter] for parameter in asked)}" if asked else name


def measure(spec: str, shapes: Sequence[tuple[int, ...]], vectors: int, tries: int) -> Row:
    """What a compressor takes for some vectors at once, each of a model of these shapes."""
    try:
        compress = importlib.import_module(MODULE).compressor(spec, shapes, torch.float32).compress
    except UsageError as error:
        return {"compressor": spec, "missing": str(error)}
    D = sum(math.prod(shape) for shape in shapes)
    keys = vfl.random.split(vfl.random.key(0), vectors)  # [C]
    v = vfl.random.normal(keys, (D,))  # [C, D]

    def compressed() -> tuple[torch.Tensor, torch.Tensor]:
        return mapped(lambda one: compress(*one), (v, keys), vectors)  # as a round does

    with Calls() as calls:
        _, bits = compressed()
    found = calls.primitives()
    candidates = [written(primitive, v) for primitive in found]
    if not any(primitive.name in BEFORE_WRITING for primitive in found):  # which are with a copy already
        candidates.append(Primitive("copy", v.clone))
    bound = max(candidates, key=lambda primitive: statistics.median(seconds(primitive.again, 3)))
    took, least = in_turn(compressed, bound.again, tries)
    ratio = statistics.median(a / b for a, b in zip(took, least, strict=True))
    return {
        "compressor": spec,
        "bits_per_entry": float(bits.double().mean()) / D,
        "ns_per_entry": 1e9 * statistics.median(took) / v.numel(),
        "primitive": bound.name,
        "primitive_ns_per_entry": 1e9 * statistics.median(least) / v.numel(),
        "ratio": ratio,
        "holds": ratio <= ALLOWED,
    }


def written(primitive: Primitive, v: torch.Tensor) -> Primitive:
    """The primitive, with the copy that has to follow it."""
    if primitive.name not in BEFORE_WRITING:
        return primitive
    return Primitive(f"{primitive.name} + copy", lambda: (primitive.again(), v.clone()))


COLUMNS = (
    Column("compressor", lambda row: row["compressor"]),
    Column("bits an entry", lambda row: number(row["bits_per_entry"])),
    Column("ns an entry", lambda row: number(row["ns_per_entry"])),
    Column("primitive", lambda row: row["primitive"]),
    Column("its ns", lambda row: number(row["primitive_ns_per_entry"])),
    Column(f"ratio (≤ {ALLOWED})", lambda row: f"{row['ratio']:.2f} {mark(row['holds'])}"),
)
