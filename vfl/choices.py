"""What earlier runs have measured about speed, in a small file of the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("vfl")


class Choice(NamedTuple):
    """Timings of one kind of work on one device."""

    chunk: int  # clients at once under vmap
    rates: dict[Any, float]  # mode → local steps a second
    compile_seconds: float | None  # what making a program took


def folder() -> Path:
    """$VFL_CACHE, else vfl in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vfl"
    return Path(os.environ.get("VFL_CACHE") or default)


def recall(name: str) -> Choice | None:
    """What is known about this kind of work; None: nothing, or nothing that can be read."""
    try:
        entry = _entries()[name]
        chunk, rates, seconds = int(entry["chunk"]), dict(entry["rates"]), entry["compile_seconds"]
        return Choice(chunk, {m: float(r) for m, r in rates.items()}, None if seconds is None else float(seconds))
    except (KeyError, TypeError, ValueError):
        return None


def remember(name: str, choice: Choice) -> None:
    """Writes down what was measured; where the folder cannot be written, the next run measures again."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        entries = _entries() | {name: choice._asdict()}
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".json", delete=False) as file:
            json.dump(entries, file, indent=1)
        Path(file.name).replace(_file())  # whole or not at all, whoever else writes


def _file() -> Path:
    return folder() / "executions.json"


def _entries() -> dict[str, Any]:
    try:
        entries = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
