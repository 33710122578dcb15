"""Ctrl-C and SIGTERM as a request that the program answers when it can."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

AGAIN = 2.0  # seconds after which Ctrl-C is another one: torchrun passes a terminal's on a second time, at once


@contextlib.contextmanager
def first_signal(say: Callable[[], None] = lambda: None) -> Iterator[Callable[[], int | None]]:
    """Ctrl-C and SIGTERM let the round finish, so that it can be saved; again after two seconds, Ctrl-C means now.

    Yields a function that tells which signal came first; `say` is called when it comes. Raises KeyboardInterrupt, out
    of whatever is going on, for the second Ctrl-C.
    """
    received: list[tuple[int, float]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT and time.monotonic() - received[0][1] > AGAIN:
            raise KeyboardInterrupt
        received.append((number, time.monotonic()))
        if len(received) == 1:
            say()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0][0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
