"""Values with parameters, written `name:value,value,key=value`: `dirichlet:0.3`, `sgd:momentum=0.9,nesterov=true`."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from vfl.errors import UsageError, unknown


T = TypeVar("T")


class Spec(NamedTuple):
    """A parsed value: its name, positional arguments and keyword arguments, all still text."""

    name: str
    args: tuple[str, ...]
    kwargs: dict[str, str]


def parse(text: str) -> Spec:
    """Splits `name:a,b,key=c` into its parts."""
    name, _, rest = text.strip().partition(":")
    args: list[str] = []
    kwargs: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if equals:
            kwargs[key.strip().replace("-", "_")] = value.strip()
        elif kwargs:
            raise UsageError(f"{text!r}: {part!r} has no name but follows a named value; write it before them")
        else:
            args.append(part.strip())
    return Spec(name, tuple(args), kwargs)


def resolve(text: str, table: Mapping[str, Callable[..., T]], what: str, **context: Any) -> T:
    """Calls the function that `text` names in `table` with the text's arguments, converted by its annotations.

    Keyword-only parameters found in `context` are filled from there and cannot be written in the text.
    Raises UsageError for an unknown name, a missing, superfluous or unconvertible argument.
    """
    spec = parse(text)
    if spec.name not in table:
        raise unknown(what, spec.name, table)
    function = table[spec.name]
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    parameters = inspect.signature(function).parameters
    written = {n: p for n, p in parameters.items() if n not in context}
    usage = f"{what} {text!r}: expected {describe(spec.name, function, context)}"
    positional = [p for p in written.values() if p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD]
    values: list[Any] = []
    for i, arg in enumerate(spec.args):
        variadic = bool(positional) and positional[-1].kind is inspect.Parameter.VAR_POSITIONAL
        if i >= len(positional) and not variadic:
            raise UsageError(f"{usage}, not {len(spec.args)} values")
        parameter = positional[min(i, len(positional) - 1)]
        values.append(_convert(arg, hints.get(parameter.name, str), usage, parameter.name))
    named = {n: context[n] for n in parameters if n in context}
    for key, value in spec.kwargs.items():
        if key not in written or written[key].kind is inspect.Parameter.VAR_POSITIONAL:
            raise UsageError(f"{usage}; it has no {key!r}")
        named[key] = _convert(value, hints.get(key, str), usage, key)
    try:
        bound = inspect.signature(function).bind(*values, **named)
    except TypeError as error:
        raise UsageError(f"{usage} ({error})") from None
    return function(*bound.args, **bound.kwargs)


def describe(name: str, function: Callable[..., Any], context: Mapping[str, Any] | None = None) -> str:
    """How to write this value: `dirichlet:ALPHA`, `sgd[:momentum=0.0,nesterov=False]`."""
    shown: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in (context or {}) or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            shown.append(f"{parameter.name.upper()},…")
        elif parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            shown.append(parameter.name.upper())
        elif parameter.default is not parameter.empty:
            shown.append(f"{parameter.name}={parameter.default}")
    return name + (":" + ",".join(shown) if shown else "")


def _convert(text: str, kind: Any, usage: str, name: str) -> Any:
    """`text` as a value of the annotated type."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if type(None) in options and text.lower() in ("none", ""):
        return None
    for option in options:
        try:
            if option is bool:
                return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            if option in (int, float, str):
                return option(text)
        except (KeyError, ValueError):
            continue
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise UsageError(f"{usage}; {name} must be {names}, not {text!r}")
