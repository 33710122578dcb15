"""A JSON object as a stream of its parts, for files whose objects would fill the memory many times over."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vfl.data.files import damaged
from vfl.errors import UsageError

_BLOCK = 1 << 16  # characters read at least
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"[-+.eE0-9]*")
_LONGEST = 16  # characters of the longest token that is no string, a number apart: of "-Infinity", an escape, …
_DECODER = json.JSONDecoder()
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


class Entry(NamedTuple):
    """A part of the object."""

    section: str  # a key of the object
    member: str | None  # a key of the object that is there; None: what is there is no object, and whole
    value: Any


def entries(path: Path, form: str, remedy: str) -> Iterator[Entry]:
    """The parts of the object that a JSON file holds, plain, .gz or .xz, in its order.

    One part's text and value are held at a time. Raises UsageError, with the place, `form` (whose form the file should
    have) and the remedy, for a file that cannot be read or is no JSON object.
    """
    place = ""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            text = _Text(file)
            for section in text.keys():  # noqa: SIM118
                place = f" in {section}"
                if text.next() != "{":
                    yield Entry(section, None, text.value())
                    continue
                for member in text.keys():  # noqa: SIM118
                    place = f" in {section}, after {member}"
                    yield Entry(section, member, text.value())
            if text.next():
                raise ValueError(f"more follows at {text.place()}")
    except PermissionError:
        raise UsageError(f"{path} cannot be read: permission denied; make it readable or remove it") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise damaged(path, f"it cannot be read{place} ({error})", remedy) from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not of {form}'s form{place} ({type(error).__name__}: {error})", remedy) from None


class _Text:
    """A text from which values are taken one after the other; it holds a value and a block at most."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._dropped = file, "", 0, 0

    def next(self) -> str:
        """The character that follows, spaces left out; none at the end."""
        while True:
            self._at = _end(_SPACE, self._text, self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def keys(self) -> Iterator[str]:
        """The keys of the object that follows; between two, the value that belongs to the first must be taken."""
        self._take("{")
        if self.next() == "}":
            self._take("}")
            return
        while True:
            if self.next() != '"':
                raise ValueError(f'expected " at {self.place()}')
            key = self.value()
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def value(self) -> Any:
        """The value that follows."""
        self.next()
        while True:
            failure = None
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if _end(_NUMBER, self._text, end) < len(self._text):  # else a number might go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                said = error.msg.removesuffix(" starting at")
                value, end, failure = None, self._at, ValueError(f"{said} at {self.place(error.pos)}")
                # An error far from the end is one; near to it, or in a string without an end, more text may mend it.
                if error.pos < len(self._text) - _LONGEST and not error.msg.startswith("Unterminated string"):
                    raise failure from None
            kept = self._at
            if not self._more():
                if failure:
                    raise failure
                self._at = end - kept
                return value

    def place(self, at: int | None = None) -> str:
        """Where the text goes on, or where in what is held."""
        return f"character {self._dropped + (self._at if at is None else at) + 1:,}"

    def _take(self, wanted: str) -> str:
        found = self.next()
        if not found or found not in wanted:
            raise ValueError(f"expected {' or '.join(wanted)} at {self.place()}, not {found or 'the end'}")
        self._at += 1
        return found

    def _more(self) -> bool:
        """Reads on. As much as is held, at least: parsing again from the start of a long value then costs little."""
        block = self._file.read(max(_BLOCK, len(self._text) - self._at))
        self._text, self._dropped, self._at = self._text[self._at :] + block, self._dropped + self._at, 0
        return bool(block)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where what the pattern finds at a place ends."""
    found = pattern.match(text, at)
    return found.end() if found else at
