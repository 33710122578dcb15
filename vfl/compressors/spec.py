"""Compressors by name: `top_k:5%`, `compose(natural,top_k:5%)`, `switch(identity:0.1,rand_k:0.05:0.9)`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vfl import random
from vfl.compressors.base import Code, Compressed, Compressor, Layout, Number, Operator, plain, scalar, unbiased
from vfl.compressors.quantize import (
    INTEGERS,
    natural,
    natural_dithering,
    qsgd,
    quantize,
    sign,
    standard_dithering,
    terngrad,
)
from vfl.compressors.sparse import bernoulli, identity, rand_k, rank_k, top_k
from vfl.errors import UsageError
from vfl.operation import at_once
from vfl.spec import resolve

COMPRESSORS: Mapping[str, Callable[..., Operator]] = {
    f.__name__: f
    for f in (
        identity,
        bernoulli,
        rand_k,
        top_k,
        rank_k,
        natural,
        standard_dithering,
        qsgd,
        natural_dithering,
        terngrad,
        sign,
        quantize,
    )
}


def compressor(spec: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> Compressor:
    """The compressor that a text names, for flat vectors of D = Σ prod(shapes) floats of this type.

    A name with its parameters; `compose(C1,C2,…)`, which applies C1 first; or `switch(C1:p1,C2:p2,…)`, one of them at
    random (probabilities sum to 1; both sides know which). They nest. `compress` is pure, and maps under vmap over
    vectors, keys or both. Raises UsageError for a text without meaning or a parameter that does not fit D.
    """
    layout = Layout(tuple(tuple(shape) for shape in shapes if math.prod(shape)), dtype)
    if dtype not in INTEGERS:
        raise UsageError(f"a compressor takes vectors of {', '.join(map(str, INTEGERS))}, not of {dtype}")
    if not layout.shapes:
        raise UsageError("a compressor takes vectors of at least one entry")
    operator, uncompressed, wanted = _operator(spec.strip(), layout), plain(layout), torch.Size([layout.entries])

    def all_at_once(v: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        value, code = operator.apply(v, key, uncompressed)
        return value, code.bits(v.device).expand(v.shape[:-1])

    def compress(v: Tensor, key: Tensor) -> Compressed:
        if v.shape != wanted or v.dtype != dtype:
            got = f"{list(v.shape)} {v.dtype}"
            raise UsageError(f"compressor {spec} is made for vectors {list(wanted)} {dtype}, not {got}")
        return Compressed(*at_once(all_at_once, v, key))

    return Compressor(spec.strip(), compress, operator.omega, operator.alpha)


def compose(operators: Sequence[Operator]) -> Operator:
    """The first operator, then the second, and so on: ω + 1 = Π(ωᵢ + 1) when all are unbiased."""

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        for operator, k in zip(operators, random.split(key, len(operators)).unbind(-1), strict=True):
            v, code = operator.apply(v, k, code)
        return v, code

    result = operators[0]
    for operator in operators[1:]:
        result = _pair(result, operator)
    return result._replace(apply=apply)


def _pair(first: Operator, second: Operator) -> Operator:
    """The constants of the second after the first; an α only where it is proven."""
    if first.omega is not None and second.omega is not None:
        return unbiased(second.apply, (1 + first.omega) * (1 + second.omega) - 1)
    if second.omega == 0:
        return first
    if first.omega == 0:
        return second
    alpha = None
    if first.alpha is not None and second.alpha is not None:
        if first.projects and second.omega is not None:
            # E‖C₂w − v‖² = ‖w − v‖² + E‖C₂w − w‖² ≤ ‖v‖² − (1 − ω₂)‖w‖² for the projection w of v.
            alpha = first.alpha * second.alpha
        else:
            # Minkowski: ‖C₂w − v‖ ≤ ‖C₂w − w‖ + ‖w − v‖, in the mean square.
            error = math.sqrt(1 - first.alpha)
            length = 1.0 if first.projects else 1 + error if first.omega is None else math.sqrt(1 + first.omega)
            total = math.sqrt(1 - second.alpha) * length + error
            alpha = 1 - total**2 if total < 1 else None
    return Operator(second.apply, None, alpha)


def switch(operators: Sequence[Operator], probabilities: Sequence[float]) -> Operator:
    """One of the operators, drawn for each vector: ω = Σ pᵢωᵢ, α = Σ pᵢαᵢ."""

    def apply(v: Tensor, key: Tensor, code: Code) -> tuple[Tensor, Code]:
        coin, *keys = random.split(key, len(operators) + 1).unbind(-1)
        u, reached = random.uniform(coin, (), torch.float64), 0.0
        value, chosen = operators[0].apply(v, keys[0], code)
        for n in range(1, len(operators)):
            reached += probabilities[n - 1]
            other, written = operators[n].apply(v, keys[n], code)
            later = u >= reached
            value = torch.where(later[..., None], other, value)
            chosen = Code(*(_either(later, b, a) for a, b in zip(chosen, written, strict=True)))
        return value, chosen

    def mean(constants: Sequence[float | None]) -> float | None:
        known = [p * c for p, c in zip(probabilities, constants, strict=True) if c is not None]
        return math.fsum(known) if len(known) == len(constants) else None

    omega = mean([operator.omega for operator in operators])
    return unbiased(apply, omega) if omega is not None else Operator(apply, None, mean([o.alpha for o in operators]))


def _either(condition: Tensor, a: Number, b: Number) -> Tensor:
    return torch.where(condition, scalar(a, condition.device), scalar(b, condition.device))


def _operator(text: str, layout: Layout) -> Operator:
    combined = re.fullmatch(r"(compose|switch)\s*\((.*)\)", text, re.DOTALL)
    if combined is None:
        if re.match(r"(compose|switch)\b", text) or "(" in text or ")" in text:
            raise UsageError(f"compressor {text!r}: brackets belong to compose(C1,C2) and switch(C1:p1,C2:p2) alone")
        return resolve(text, COMPRESSORS, "compressor", layout=layout)
    kind, parts = combined[1], _parts(combined[2], text)
    if len(parts) < 2:
        raise UsageError(f"compressor {text!r}: {kind} joins at least two compressors, separated by commas")
    if kind == "compose":
        return compose([_operator(part, layout) for part in parts])
    fields = [part.rpartition(":") for part in parts]
    probabilities = [_probability(field, text) for _, _, field in fields]
    if abs(math.fsum(probabilities) - 1) > 1e-9:
        raise UsageError(f"compressor {text!r}: its probabilities sum to {math.fsum(probabilities):.6g}, not to 1")
    return switch([_operator(name.strip(), layout) for name, _, _ in fields], probabilities)


def _probability(field: str, text: str) -> float:
    try:
        p = float(field)
    except ValueError:
        p = math.nan
    if not 0 < p <= 1:
        raise UsageError(f"compressor {text!r}: a part ends in a probability in (0, 1], as identity:0.1, not {field!r}")
    return p


def _parts(inside: str, text: str) -> list[str]:
    """The compressors between the commas outside of brackets; `4,norm=inf` is one compressor's two parameters."""
    parts, depth = [""], 0
    for character in inside:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise UsageError(f"compressor {text!r}: its brackets do not match")
    joined: list[str] = []
    for part in (part.strip() for part in parts):
        if not part:
            raise UsageError(f"compressor {text!r} has nothing before or after one of its commas")
        if joined and re.match(r"[\w-]+=|[\d.+-]|inf\b", part):
            joined[-1] += "," + part
        else:
            joined.append(part)
    return joined
