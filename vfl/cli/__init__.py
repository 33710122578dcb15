"""The command line: `vfl run | list | show | data | privacy`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from vfl.chunks import out_of_memory
from vfl.cli.launch import RANK_LOST
from vfl.distributed import local_rank
from vfl.errors import ClientError, DivergedError, RankLostError, UsageError, unknown

DATA = """\
  vfl data get NAME             download a data set
  vfl data show NAME            how a data set is dealt to clients: table, plot
  vfl data convert SOURCE FOLDER --format FORM
                                write one as LEAF or FLUTE read it, or as npz
"""
USAGE = f"""\
vfl: federated-learning simulation

  vfl run ALGORITHM [options]   run an experiment
  vfl run ALGORITHM --help      what its options mean
  vfl list [KIND]               what there is: algorithms, models, data,
                                partitions, samplers, optimizers, schedules,
                                regularizers, compressors, aggregators
  vfl show RUN [RUN ...]        what a run's folder holds; several are compared
{DATA}  vfl privacy --clients N ...   the noise of a target ε, or the ε of a noise

A first run, on embedded data:

  vfl run fedavg --partition dirichlet:0.3
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The program; ends with the code that `_main` returns."""
    sys.exit(_main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    """Runs a command. The code is 0 when it is done, 1 for a run that diverged, failed in a client or ran out of
    memory, 2 for bad input, 3 when a rank was lost, 130 after Ctrl-C and 143 after SIGTERM."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        from vfl import __version__

        print(__version__)
        return 0
    try:
        return _command(argv[0], argv[1:])
    except (UsageError, DivergedError) as error:
        if local_rank() == 0:  # what one rank of a machine finds, all do
            _say(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except ClientError as error:
        if isinstance(error.__cause__, UsageError):  # what a client does with the options, not how it failed
            _say(str(error.__cause__))
            return 2
        traceback.print_exception(error.__cause__)
        _say(str(error))
        return 1
    except RankLostError as error:
        if local_rank() == 0:
            _say(str(error))
        return RANK_LOST
    except KeyboardInterrupt:
        _say("stopped" + "; a run goes on from its newest checkpoint with --resume" * (argv[0] == "run"))
        return 130
    except Exception as error:
        if not out_of_memory(error):
            raise
        _say(f"out of memory: {error}")
        return 1


def _say(sentence: str) -> None:
    print(f"vfl: {sentence}", file=sys.stderr)


def _command(name: str, argv: list[str]) -> int:
    if name == "run":
        if argv[:1] in (["-h"], ["--help"]):
            print(USAGE, end="")
            return 0
        from vfl.cli.run import run

        return run(argv)
    from vfl.cli.arguments import parse
    from vfl.cli.catalog import List
    from vfl.cli.data import DataConvert, DataGet, DataShow
    from vfl.cli.inspect import Show
    from vfl.cli.privacy import PrivacyCommand

    commands = {
        "list": List, "show": Show, "data get": DataGet, "data show": DataShow, "data convert": DataConvert,
        "privacy": PrivacyCommand,
    }  # fmt: skip
    if name == "data" and argv[:1] in (["-h"], ["--help"]):
        print(DATA, end="")
        return 0
    if name == "data":
        if not argv or argv[0] not in ("get", "show", "convert"):
            raise UsageError(
                "vfl data needs `get NAME`, `show NAME` or `convert NAME FOLDER`, as in `vfl data show digits`"
            )
        name = f"data {argv.pop(0)}"
    if name not in commands:
        raise unknown("command", name, ["run", "list", "show", "data", "privacy"])
    parse(commands[name], argv, f"vfl {name}").run()
    return 0
