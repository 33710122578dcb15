"""A `vfl run` as it is called: its options and its algorithm's, from the command line and YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from vfl.algorithms import load_algorithm
from vfl.cli.arguments import parse
from vfl.cli.options import ABOUT_THE_CALL, GROUPS, NEUTRAL, WRAPPERS, RunOptions, fields_of, option_fields
from vfl.errors import UsageError, flag, unknown
from vfl.runs import CONFIG, is_run, read_config
from vfl.training import AlgorithmConfig
from vfl.wrappers import Wrapper


class Call(NamedTuple):
    """A parsed `vfl run`."""

    name: str  # the algorithm's
    options: RunOptions
    algorithm: AlgorithmConfig
    groups: dict[str, Any]  # one of each of GROUPS

    @property
    def wrappers(self) -> list[Wrapper]:
        """What is done to the algorithm, the first one innermost."""
        return [self.groups[name] for name in WRAPPERS]

    def config(self) -> dict[str, Any]:
        """Every option as config.yaml holds it."""
        chosen: dict[str, Any] = {}
        for part in (self.options, self.algorithm, *self.groups.values()):
            chosen |= dataclasses.asdict(part)  # pyright: ignore[reportArgumentType]
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items() if k not in ABOUT_THE_CALL}
        return {"algorithm": self.name, **plain}

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide the results."""
        neutral, privacy = set(NEUTRAL), self.groups["privacy"]
        if privacy.delta is not None or privacy.mechanism == "ftrl":  # the noise, or what is spent, depends on them
            neutral -= {"rounds"}
        if self.groups["plateau"].plateau_patience:  # it looks at each evaluation
            neutral -= {"eval_every", "validation_every"}
        return {k: v for k, v in self.config().items() if k not in neutral}


def parse_run(argv: Sequence[str]) -> Call:
    """The arguments after `vfl run`. Raises UsageError; leaves the program with code 0 after printing `--help`."""
    argv = list(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    file = _config_file(argv)
    written = {} if file is None else read_config(file)
    if name is None and "algorithm" in written:
        name = str(written["algorithm"])
    if not name:
        raise UsageError("vfl run needs an algorithm, as in `vfl run fedavg`, or a --config that names one; "
                         "`vfl list algorithms` shows them all")  # fmt: skip
    cls = load_algorithm(name)
    written = _for_algorithm(written, name)
    merged, fields = _merged(name, cls), option_fields(cls)
    prefix = [] if file is None else _as_arguments(written, fields, file)

    def parsed(arguments: list[str]) -> Call:
        found = parse(merged, arguments, f"vfl run {name}", fields)
        return Call(name, found.run, found.algorithm, {name: getattr(found, name) for name in GROUPS})

    try:
        return parsed(prefix + argv)
    except UsageError:
        if file is not None:
            try:
                parsed(prefix)
            except UsageError as error:  # the file's own fault
                raise UsageError(f"{file}: {error}") from None
        raise


def _for_algorithm(written: dict[str, Any], name: str) -> dict[str, Any]:
    """Another algorithm's configuration as this one's: without that algorithm's defaults, which nobody chose."""
    other = str(written.get("algorithm", name))
    if other == name:
        return written
    defaults = {name: field.default for name, field in fields_of(load_algorithm(other)).items()}
    return {key: value for key, value in written.items() if key not in defaults or value != defaults[key]}


def _config_file(argv: list[str]) -> Path | None:
    """The file named by --config, or that of the run to resume."""
    named, out = _value(argv, "--config"), _value(argv, "--out")
    if named is not None and not named.strip():
        named = None  # the parser will say so
    if "--resume" in argv:
        if out is None:
            raise UsageError("--resume needs --out, the folder of the run to go on with")
        if not is_run(Path(out)):
            raise UsageError(f"--resume: there is no run in {out}; leave --resume out to start one")
        return Path(out) / CONFIG if named is None else Path(named)
    return None if named is None else Path(named)


def _value(argv: list[str], option: str) -> str | None:
    """What an option is given on the command line, last one first, before the options are parsed as a whole."""
    found = None
    for i, arg in enumerate(argv):
        if arg == option and i + 1 < len(argv):
            found = argv[i + 1]
        elif arg.startswith(f"{option}="):
            found = arg.partition("=")[2]
    return found


def _merged(name: str, cls: type[AlgorithmConfig]) -> Any:
    flat, no_pairs = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
    made = dataclasses.make_dataclass(
        name,
        [
            ("run", Annotated[RunOptions, flat, no_pairs], dataclasses.field()),
            ("algorithm", Annotated[cls, flat], dataclasses.field()),
            *((name, Annotated[group, flat], dataclasses.field()) for name, group in GROUPS.items()),
        ],
    )
    made.__doc__ = cls.__doc__
    return made


def _as_arguments(config: dict[str, Any], fields: dict[str, dataclasses.Field], file: Path) -> list[str]:
    """A configuration as command-line arguments, so that one parser checks both."""
    arguments: list[str] = []
    for key, value in config.items():
        name = key.replace("-", "_")
        if name == "algorithm":
            continue
        if name not in fields:
            raise UsageError(f"{file}: {unknown('option', key, set(fields) - ABOUT_THE_CALL)}")
        if name in ABOUT_THE_CALL:
            raise UsageError(f"{file}: {key} is no part of an experiment; give {flag(name)} on the command line")
        default = fields[name].default
        if isinstance(value, bool) and isinstance(default, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, dict) or (isinstance(value, list) and isinstance(default, str | int | float | None)):
            raise UsageError(f"{file}: {key} must be one value, not {value}")
        elif isinstance(value, list):
            arguments += [flag(name), *map(str, value)]
        else:
            arguments.append(f"{flag(name)}={'none' if value is None else value}")
    return arguments
