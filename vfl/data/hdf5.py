"""HDF5 files, for those who installed the extra: reading needs h5py, which nothing else of vfl does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vfl.data.files import damaged
from vfl.data.json_stream import Entry
from vfl.errors import UsageError

ENDING = r"\.(hdf5|h5)$"
"""How the names of HDF5 files end."""

_REMEDY = "get or make it anew"


@contextmanager
def opened(path: Path, mode: str = "r") -> Iterator[Any]:
    """The file, open. Raises UsageError where h5py is missing, and for what goes wrong while it is open."""
    try:
        import h5py
    except ImportError:
        raise UsageError(f"{path.name} is HDF5, which needs h5py; run `pip install vfl[hdf5]`") from None
    try:
        with h5py.File(path, mode) as file:
            yield file
    except PermissionError:
        raise UsageError(f"{path} cannot be opened: permission denied; make it readable or name another") from None
    except (OSError, KeyError, RuntimeError) as error:
        raise damaged(path, f"it cannot be {'read' if mode == 'r' else 'written'} ({error})", _REMEDY) from None


def flute(path: Path) -> Iterator[Entry]:
    """The parts of a file of FLUTE's form: `users`, `num_samples`, `user_data/<user>/x`, `user_data_label/<user>`."""
    with opened(path) as file:
        for section in ("users", "num_samples"):
            if section in file:
                values = file[section][()]
                yield Entry(section, None, [v.decode() if isinstance(v, bytes) else v for v in values.tolist()])
        for section in ("user_data", "user_data_label"):
            for user, value in _members(file.get(section, {}), path, section).items():
                yield Entry(section, user, value)


def tff(path: Path, convert: Callable[[Any], dict[str, Any]]) -> Iterator[Entry]:
    """The parts of a file of TensorFlow Federated's form: a group `examples/<client>` each, as `convert` makes it."""
    with opened(path) as file:
        clients = examples(file, path)
        yield Entry("users", None, list(clients))
        for client, group in clients.items():
            yield Entry("user_data", client, convert(_members(group, path, f"examples/{client}")))


def examples(file: Any, path: Path) -> Any:
    """The group of the clients in an open file of TensorFlow Federated's. Raises UsageError where there is none."""
    if "examples" not in file:
        raise damaged(path, "it has no group examples, as TensorFlow Federated's files do", _REMEDY)
    return _members(file["examples"], path, "examples")


def _members(group: Any, path: Path, name: str) -> Any:
    """The group, if it is one."""
    if not isinstance(group, Mapping):
        raise damaged(path, f"its {name} is no group of clients", _REMEDY)
    return group
