"""The options of `vfl run`: one typed dataclass, merged with the algorithm's own; from the command line and YAML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from vfl.algorithms import load_algorithm
from vfl.errors import UsageError, unknown
from vfl.runs import CONFIG, is_run, read_config
from vfl.training import AlgorithmConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What an experiment is made of, beside its algorithm."""

    data: str = "digits"
    """Data set: digits, mnist, fashion_mnist, cifar10 or synthetic:features=32,classes=10,examples=20 (`vfl list`)."""
    data_root: Path | None = None
    """Folder of the data sets; by default $VFL_DATA, then the user's cache folder."""
    partition: str | None = None
    """How examples are dealt to clients: iid, dirichlet:0.3, shards:2, labels:2, lognormal:1.0, powerlaw:1.5, natural.
    By default natural where the data has users, else iid."""
    clients: int | None = None
    """Population: how many clients there are. By default 100, or the data's users for a natural partition."""
    validation: float = 0.0
    """Fraction of the training examples set aside as the global validation set."""
    held_out: float = 0.0
    """Fraction of each client's examples set aside as its own test examples."""
    model: str = "mlp"
    """Model: softmax, mlp (the 2NN), mlp:64,32, cnn, lenet, or package.module:factory."""
    clients_per_round: str = "10"
    """Clients that take part in a round: a count, a fraction (0.1 or 10%), or all."""
    sampling: str = "uniform"
    """How they are drawn: uniform (without replacement), replacement, poisson, weighted (by size), fixed:0,3,5."""
    rounds: int = 100
    """Communication rounds."""
    batch_size: str = "20"
    """Examples in a local minibatch, or all for full-batch steps."""
    local_epochs: int = 1
    """Passes over a client's own examples in a round."""
    local_steps: int | None = None
    """Local minibatch steps in a round, in place of local-epochs."""
    seed: int = 0
    """Seed of every random draw: data split, model, cohorts, minibatches."""
    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type of the model and the training."""
    execution: Literal["vmap", "loop"] = "vmap"
    """vmap: a chunk of clients at once; loop: one after the other, for debugging (breakpoints and prints work)."""
    chunk: str = "auto"
    """Clients computed at once: auto, or a count."""
    client_state: Literal["device", "host"] = "device"
    """Where the clients' own states are kept between rounds."""
    on_nonfinite: Literal["stop", "drop"] = "stop"
    """When a client's message holds NaN or infinity: stop the run, or drop the client and count it."""
    eval_every: int = 1
    """Rounds between evaluations on the global test and validation sets; 0: only after the last round."""
    client_eval_every: int = 0
    """Rounds between evaluations on each client's own data (held out, else training); 0: never."""
    checkpoint_every: int = 50
    """Rounds between checkpoints; 0: only at the end or when interrupted."""
    keep: int = 2
    """Newest checkpoints to keep."""
    out: Path | None = None
    """The run's folder. By default runs/<time>-<algorithm>-<data>."""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with that run's options where none are given."""
    overwrite: bool = False
    """Replace the run that lies in --out."""
    quiet: bool = False
    """Print errors only."""
    config: Path | None = None
    """YAML file of options, such as a run's config.yaml; options on the command line come on top."""

    def __post_init__(self) -> None:
        least = {"rounds": 1, "local_epochs": 1, "local_steps": 1, "clients": 1, "keep": 1,
                 "eval_every": 0, "client_eval_every": 0, "checkpoint_every": 0}  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UsageError(f"{_flag(name)} must be at least {bound}, not {value}")
        for name in ("validation", "held_out"):
            value = getattr(self, name)
            if not (0 <= value < 1 and math.isfinite(value)):
                raise UsageError(f"{_flag(name)} is a fraction from 0 to below 1, not {value}")
        if self.resume and self.overwrite:
            raise UsageError("--resume keeps the run in --out and --overwrite replaces it; give one of them")
        if self.resume and self.out is None:
            raise UsageError("--resume needs --out, the folder of the run to continue")
        self.examples_per_batch()

    def examples_per_batch(self) -> int | None:
        """The batch size as a number; None: all of a client's examples."""
        if self.batch_size == "all":
            return None
        if not self.batch_size.isdigit() or int(self.batch_size) < 1:
            raise UsageError(f"--batch-size must be a whole number from 1, or all, not {self.batch_size!r}")
        return int(self.batch_size)


# They say where a run lies and who is told, not what it is.
ABOUT_THE_CALL = {"out", "resume", "overwrite", "quiet", "config"}
# They do not change the results, so a resumed run may change them.
NEUTRAL = {"rounds", "data_root", "device", "execution", "chunk", "client_state", "eval_every", "client_eval_every",
           "checkpoint_every", "keep"}  # fmt: skip


class Call(NamedTuple):
    """A parsed `vfl run`."""

    name: str  # the algorithm's
    options: RunOptions
    algorithm: AlgorithmConfig

    def config(self) -> dict[str, Any]:
        """Every option as config.yaml holds it."""
        chosen = dataclasses.asdict(self.options) | dataclasses.asdict(self.algorithm)  # pyright: ignore
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items() if k not in ABOUT_THE_CALL}
        return {"algorithm": self.name, **plain}

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide the results."""
        return {k: v for k, v in self.config().items() if k not in NEUTRAL}


def parse_run(argv: Sequence[str]) -> Call:
    """The arguments after `vfl run`. Raises UsageError; leaves with code 2 where tyro explains what is wrong."""
    argv = list(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    file = _config_file(argv)
    written = read_config(file) if file is not None else {}
    name = name or written.get("algorithm")
    if name is None:
        raise UsageError("vfl run needs an algorithm, as in `vfl run fedavg`, or a --config that names one; "
                         "`vfl list algorithms` shows them all")  # fmt: skip
    cls = load_algorithm(name)
    merged = _merged(name, cls)
    prefix = _as_arguments(written, _fields(RunOptions) | _fields(cls), file) if file is not None else []
    parsed = tyro.cli(merged, args=prefix + argv, prog=f"vfl run {name}", description=cls.__doc__)
    return Call(name, parsed.run, parsed.algorithm)


def _config_file(argv: list[str]) -> Path | None:
    """The file named by --config, or that of the run to resume."""
    if named := _value(argv, "--config"):
        return Path(named)
    out = _value(argv, "--out")
    if "--resume" in argv and out is not None and is_run(Path(out)):
        return Path(out) / CONFIG
    return None


def _value(argv: list[str], flag: str) -> str | None:
    """What an option is given on the command line, last one first, before the options are parsed as a whole."""
    found = None
    for i, arg in enumerate(argv):
        if arg == flag and i + 1 < len(argv):
            found = argv[i + 1]
        elif arg.startswith(f"{flag}="):
            found = arg.partition("=")[2]
    return found


def _merged(name: str, cls: type[AlgorithmConfig]) -> Any:
    flat = tyro.conf.arg(name="")
    return dataclasses.make_dataclass(
        name,
        [
            ("run", Annotated[RunOptions, flat], dataclasses.field(default_factory=RunOptions)),
            ("algorithm", Annotated[cls, flat], dataclasses.field(default_factory=cls)),
        ],
    )


def _fields(cls: Any) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls)}


def _as_arguments(config: dict[str, Any], fields: dict[str, dataclasses.Field], file: Path) -> list[str]:
    """A configuration as command-line arguments, so that one parser checks both."""
    arguments: list[str] = []
    for key, value in config.items():
        name = key.replace("-", "_")
        if name == "algorithm":
            continue
        if name not in fields or name in ABOUT_THE_CALL:
            raise UsageError(f"{file}: {unknown('option', key, set(fields) - ABOUT_THE_CALL)}")
        if isinstance(value, bool):
            arguments.append(_flag(name) if value else _flag(f"no_{name}"))
        elif isinstance(value, (list, tuple)):
            arguments += [_flag(name), *map(str, value)]
        elif isinstance(value, dict):
            raise UsageError(f"{file}: {key} must be one value, not a mapping")
        else:
            arguments += [_flag(name), str(value)]
    return arguments


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
