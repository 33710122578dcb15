"""Parameters and buffers by their names: which layers are frozen, which stay on the clients.

Names are written as patterns with commas between them, later ones having the last word:

    head.*          the names that match a glob (`fnmatch`: * any characters, ? one, [abc] one of these)
    last            the last layer that has parameters
    norm            the normalization layers
    !PATTERN        takes out again what PATTERN means: `*,!last` is all but the last layer
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from vfl.errors import UsageError

LAST, NORM = "last", "norm"


def select(patterns: str, names: Sequence[str], buffers: Sequence[str], norms: Collection[str], what: str) -> set[str]:
    """Which of the names of parameters, and of buffers, the patterns mean.

    `norms` are those in normalization layers; `what` is the option's name, for messages. Raises UsageError for a
    pattern without a match, and for patterns that mean nothing in the end.
    """
    chosen: set[str] = set()
    for item in patterns.split(","):
        pattern = item.strip().removeprefix("!")
        matched = {name for name in (*names, *buffers) if _rule(pattern, names, norms)(name)}
        if not matched:
            known = "the model has no normalization layer" if pattern == NORM else f"it has {', '.join(names)}"
            raise UsageError(f"{what} {patterns!r}: no parameter of the model matches {pattern!r}; {known}")
        chosen = chosen - matched if item.strip().startswith("!") else chosen | matched
    if not chosen:
        raise UsageError(f"{what} {patterns!r} takes out all that it puts in; leave out the patterns with an !")
    return chosen


def _rule(pattern: str, names: Sequence[str], norms: Collection[str]) -> Callable[[str], bool]:
    if pattern == NORM:
        return norms.__contains__
    if pattern == LAST:
        return lambda name: _layer(name) == _layer(names[-1])
    return lambda name: fnmatchcase(name, pattern)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def in_norms(module: nn.Module) -> frozenset[str]:
    """The names of the parameters and buffers of a module's normalization layers.

    Those are the layers without children whose class is called one: BatchNorm2d, LayerNorm, RMSNorm, LlamaRMSNorm.
    """
    norms = [
        (prefix, layer)
        for prefix, layer in module.named_modules()
        if re.search(r"Norm(\dd)?$", type(layer).__name__) and not list(layer.children())
    ]
    return frozenset(
        f"{prefix}.{name}".lstrip(".")
        for prefix, layer in norms
        for name, _ in (*layer.named_parameters(), *layer.named_buffers())
    )
