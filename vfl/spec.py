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
    """Splits `name:a,b,key=c` into its parts. Raises UsageError for an empty, repeated or misplaced value."""
    name, _, rest = text.partition(":")
    args: list[str] = []
    kwargs: dict[str, str] = {}
    for part in rest.split(",") if rest.strip() else []:
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if equals and key in kwargs:
            raise UsageError(f"{text!r} gives {key!r} twice; write it once")
        if equals:
            kwargs[key] = value.strip()
        elif kwargs:
            raise UsageError(f"{text!r}: {part!r} has no name but follows a named value; write it before them")
        elif not part.strip():
            raise UsageError(f"{text!r} has nothing before or after one of its commas; write a value there or drop it")
        else:
            args.append(part.strip())
    return Spec(name.strip(), tuple(args), kwargs)


def resolve(text: str, table: Mapping[str, Callable[..., T]], what: str, **context: Any) -> T:
    """Calls the function that `text` names in `table` with the text's arguments, converted by its annotations.

    Keyword-only parameters found in `context` are filled from there and cannot be written in the text.
    Raises UsageError for an unknown name, a missing, superfluous or unconvertible argument.
    """
    spec = parse(text)
    if spec.name not in table:
        raise unknown(what, spec.name, table)
    function = table[spec.name]
    hints = _hints(function)
    parameters = inspect.signature(function).parameters
    written = {n: p for n, p in parameters.items() if n not in context and p.kind is not p.VAR_KEYWORD}
    usage = f"{what} {text!r}: expected {describe(spec.name, function, context)}"
    positional = [p for p in written.values() if p.kind is not p.KEYWORD_ONLY]
    variadic = bool(positional) and positional[-1].kind is inspect.Parameter.VAR_POSITIONAL
    if len(spec.args) > len(positional) and not variadic:
        most = f"at most {len(positional)}" if positional else "no"
        raise UsageError(f"{usage}, which takes {most} unnamed values, not {len(spec.args)}")
    values: list[Any] = []
    for i, arg in enumerate(spec.args):
        parameter = positional[min(i, len(positional) - 1)]
        values.append(_convert(arg, hints.get(parameter.name, str), usage, parameter.name))
    named = {n: context[n] for n in parameters if n in context}
    for key, value in spec.kwargs.items():
        if key not in written or written[key].kind is inspect.Parameter.VAR_POSITIONAL:
            raise UsageError(f"{usage}, which has no {key!r}")
        named[key] = _convert(value, hints.get(key, str), usage, key)
    try:
        bound = inspect.signature(function).bind(*values, **named)
    except TypeError as error:
        raise UsageError(f"{usage}; {error}") from None
    return function(*bound.args, **bound.kwargs)


def describe(name: str, function: Callable[..., Any], context: Mapping[str, Any] | None = None) -> str:
    """How to write this value: `dirichlet:ALPHA[,min=0]`, `sgd[:momentum=0.0,nesterov=false]`, `mlp[:SIZES,…]`."""
    required: list[str] = []
    optional: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in (context or {}) or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            optional.append(f"{parameter.name.upper()},…")
        elif parameter.default is not parameter.empty:
            value = parameter.default
            optional.append(
                f"{parameter.name}={str(value).lower() if value is None or value in (True, False) else value}"
            )
        elif parameter.kind is parameter.KEYWORD_ONLY:
            required.append(f"{parameter.name}={parameter.name.upper()}")
        else:
            required.append(parameter.name.upper())
    shown = ":" + ",".join(required) if required else ""
    return name + shown + (f"[{',' if required else ':'}{','.join(optional)}]" if optional else "")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what `function` is called with; a NamedTuple class has them on itself, not on an __init__."""
    if inspect.isclass(function) and function.__init__ is not object.__init__:
        return typing.get_type_hints(function.__init__)
    return typing.get_type_hints(function)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}


def _convert(text: str, kind: Any, usage: str, name: str) -> Any:
    """`text` as a value of the annotated type, the first that fits when there are several."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if type(None) in options and text.lower() in ("none", ""):
        return None
    for option in options:
        try:
            if option is bool:
                return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            if option is int:
                return _whole(text)
            if option in (float, str):
                return option(text)
        except (KeyError, ValueError, OverflowError):
            continue
    kinds = " or ".join(_KINDS.get(option, str(option)) for option in options)
    raise UsageError(f"{usage}, where {name} is {kinds}, not {text!r}")


def _whole(text: str) -> int:
    """An integer, `1e6` among them; `5.0` is none, because who writes it may expect fractions to work."""
    number = float(text) if "e" in text.lower() else int(text)
    if number != int(number):
        raise ValueError
    return int(number)
