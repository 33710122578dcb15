"""How many tensor operators a computation takes, which is what its compilation costs."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class TooManyOperatorsError(RuntimeError):
    """A computation went past its limit of operators."""


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, and stops them after `most` with TooManyOperatorsError.

    Each takes some 20 µs longer, so this is for one chunk, or for tracing, which takes a millisecond for each.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most = most
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator loads the compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.most is not None and self.count > self.most:
            raise TooManyOperatorsError(f"its program would have more than {self.most:,} operators")
        return func(*args, **(kwargs or {}))
