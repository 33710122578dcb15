"""The errors a user can cause or must act on; the command line prints each as one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UsageError(ValueError):
    """Bad input. The message is one sentence: what is wrong, where, and what would be right."""


class DivergedError(RuntimeError):
    """A round produced NaN or infinity; names the round and the clients that caused it (none: the server step)."""

    def __init__(self, round: int, clients: Sequence[int]) -> None:
        self.round = round
        self.clients = list(clients)
        shown = ", ".join(map(str, self.clients[:10])) + (", …" if len(self.clients) > 10 else "")
        cause = f"client{'s' * (len(self.clients) > 1)} {shown}" if self.clients else "the server step"
        super().__init__(f"round {round}: NaN or infinity from {cause}; a smaller rate or gradient clipping may help")


class ClientError(RuntimeError):
    """An exception inside one client's update (loop execution); the original one is its cause."""

    def __init__(self, client: int, round: int, cause: BaseException) -> None:
        self.client = client
        self.round = round
        super().__init__(f"client {client}, round {round}: {type(cause).__name__}: {cause}")


class RankLostError(RuntimeError):
    """The run cannot go on because another rank has ended; the message is one sentence."""


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in a table, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
    return UsageError(f"unknown {what} {name!r}; {hint}")


def first_line(error: BaseException) -> str:
    """What the error says, without the details that follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
