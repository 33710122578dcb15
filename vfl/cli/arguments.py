"""tyro's parser in this program's words: every value says what it may be, and a refusal is one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import shutil
import textwrap
import types
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vfl.errors import UsageError, flag

T = TypeVar("T")

_REGISTRY = ConstructorRegistry()
_KINDS: dict[Any, tuple[str, str]] = {
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "text"),
    Path: ("PATH", "a path"),
}


def parse(cls: type[T], arguments: Sequence[str], command: str, options: Collection[str] = ()) -> T:
    """The dataclass `cls` from command-line arguments; `command` is what comes before them.

    `options` are the names that an unknown one may have been meant for (empty: the fields of `cls`). Raises UsageError;
    leaves the program with code 0 after printing `--help`.
    """
    about = textwrap.fill(cls.__doc__ or "", shutil.get_terminal_size().columns)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, rest = tyro.cli(
                cls, args=arguments, prog=command, description=about, return_unknown_args=True, registry=_REGISTRY
            )
    except SystemExit as ended:
        if not ended.code:
            raise
        raise UsageError(_sentence(said.getvalue())) from None
    if rest:
        names = options or [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
        raise UsageError(_superfluous(rest[0], command, [flag(name) for name in names]))
    return found


def unset(meaning: str) -> Any:
    """For an annotation: what `--help` says in place of `(default: none)`."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {meaning})")


def _superfluous(argument: str, command: str, flags: list[str]) -> str:
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no option of `{command}`; `{command} --help` shows them"
    name = argument.partition("=")[0]
    near = difflib.get_close_matches(name, flags, n=1)
    hint = f"did you mean {near[0]}?" if near else f"`{command} --help` shows them all"
    return f"unknown option {name}; {hint}"


def _sentence(box: str) -> str:
    """What is said in the first part of tyro's framed message, under its title."""
    if command := re.search(r"Missing from (.+?):", box):
        listed = box.partition("For full helptext")[0]
        missing = ", ".join(re.findall(r"^[│ ] {5}(\S+)", listed, re.MULTILINE))  # what they are stands further right
        return f"`{command[1]}` needs {missing}; `{command[1]} --help` says what they are"
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    rules = [i for i, line in enumerate(lines) if not line.strip("─-╰╯")]
    if rules[:1] == [0]:  # without a frame, a rule underlines the title
        lines, rules = lines[1:], [i - 1 for i in rules[1:]]
    said = " ".join(" ".join(lines[: rules[0] if rules else None]).split())
    for pattern, words in _REWORDED.items():
        said = re.sub(pattern, words, said)
    return said.strip(" .")


_REWORDED = {  # so that each is one sentence
    r"^Error parsing [a-z]\S*: ": "",  # a group of options, whose own check names the option
    r"^Error parsing (\S+): (?=must)": r"\1 ",
    r"^Error parsing ": "",
    r"^Missing value for argument '(\S+)'\. Expected 1 values": r"\1 needs a value",
    r"^(invalid choice .*)\. Expected one of \((.*)\)": r"\1; expected one of \2",
}


@_REGISTRY.primitive_rule
def _one_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers, text, paths and choices, each with or without `none`."""
    members = get_args(info.type) if info.type_origin in (Union, types.UnionType) else (info.type,)
    kinds = [member for member in members if member is not types.NoneType]
    if len(kinds) != 1 or not (kinds[0] in _KINDS or get_origin(kinds[0]) is Literal):
        return None
    kind, optional = kinds[0], len(members) > 1
    choices = {str(choice): choice for choice in get_args(kind)}  # of a Literal
    metavar, wanted = _KINDS.get(kind, ("{" + ",".join(choices) + "}", "one of these"))
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=_reader(choices.__getitem__ if choices else kind, wanted, optional),
        is_instance=lambda value: value is None or not isinstance(value, bool),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
        choices=(*choices, *["none"] * optional) if choices else None,
    )


def _reader(read: Callable[[str], Any], wanted: str, optional: bool) -> Callable[[list[str]], Any]:
    def value(texts: list[str]) -> Any:
        (text,) = texts
        if optional and text.lower() == "none":
            return None
        if not text.strip():
            raise ValueError("must not be empty")
        try:
            return read(text)
        except ValueError:
            raise ValueError(f"must be {wanted}{' or none' * optional}, not {text!r}") from None

    return value
