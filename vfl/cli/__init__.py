"""The command line: `vfl run | list | show | data`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vfl.distributed import environment_rank
from vfl.errors import ClientError, DivergedError, UsageError, unknown

USAGE = """\
vfl: federated-learning simulation

  vfl run ALGORITHM [options]   run an experiment; `vfl run fedavg --help` shows every option
  vfl list [KIND]               what there is: algorithms, models, data, partitions, samplers, optimizers, schedules
  vfl show RUN [RUN ...]        what a run's folder holds; several are compared
  vfl data get NAME             download a data set
  vfl data show NAME            how a data set is dealt to clients: table and plot

A first run, on embedded data:  vfl run fedavg --partition dirichlet:0.3
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The program; ends with code 0, 2 for bad input, 1 for a run that diverged or failed in a client."""
    sys.exit(_main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        from vfl import __version__

        print(__version__)
        return 0
    try:
        return _command(argv[0], argv[1:])
    except (UsageError, DivergedError, ClientError) as error:
        if environment_rank() == 0 or isinstance(error, ClientError):
            print(f"vfl: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _command(name: str, argv: list[str]) -> int:
    if name == "run":
        if argv[:1] in (["-h"], ["--help"]):
            print(USAGE, end="")
            return 0
        from vfl.cli.run import run

        return run(argv)
    import tyro

    from vfl.cli.catalog import List
    from vfl.cli.data import DataGet, DataShow
    from vfl.cli.inspect import Show

    commands = {"list": List, "show": Show, "data get": DataGet, "data show": DataShow}
    if name == "data":
        if not argv or argv[0] not in ("get", "show"):
            raise UsageError("vfl data needs `get NAME` or `show NAME`, as in `vfl data show digits`")
        name = f"data {argv.pop(0)}"
    if name not in commands:
        raise unknown("command", name, ["run", "list", "show", "data"])
    tyro.cli(commands[name], args=argv, prog=f"vfl {name}").run()
    return 0
