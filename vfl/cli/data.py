"""`vfl data get`, `vfl data show` and `vfl data convert`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from vfl.cli.arguments import unset
from vfl.data import FederatedData, federated, get, label_table, plot_labels, summary
from vfl.data.convert import convert
from vfl.data.download import Progress as Report
from vfl.errors import UsageError
from vfl.problems import LinearProblem
from vfl.terminal import facts, section, si, table, terminal

_SHOWN = 20  # clients of the label table
_STEP = 10_000_000  # bytes between two lines of a download that no terminal shows

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True)
class DataGet:
    """Downloads a data set from its official address; files already there and whole stay."""

    name: Name
    """Which one (`vfl list data`)."""
    data_root: Annotated[Path | None, unset("$VFL_DATA, else the user's cache")] = None
    """Folder of the data sets; it goes into a folder of its own there."""
    url: Annotated[str | None, unset("the official address")] = None
    """Folder on the web to take the files from in place of the official address."""

    def run(self) -> None:
        """Downloads and says where the files lie."""
        console = terminal()
        with _reporting(console) as report:
            folder = get(self.name, self.data_root, self.url, report)
        console.print(f"{self.name} is in {folder}", soft_wrap=True)


@dataclass(frozen=True)
class DataShow:
    """Shows how a data set is dealt to clients: sizes and labels as a table, and as a picture."""

    name: Name
    """Data set, with its parameters if it has any (`vfl list data`)."""
    partition: Annotated[str | None, unset("natural where the data has users, else iid")] = None
    """How the examples are dealt (`vfl list partitions`)."""
    clients: Annotated[int | None, unset("what the data says for natural, else 100")] = None
    """Number of clients."""
    seed: int = 0
    """Seed of the draw."""
    data_root: Annotated[Path | None, unset("$VFL_DATA, else the user's cache")] = None
    """Folder of the data sets."""
    out: Annotated[Path | None, unset("named after the data, here")] = None
    """The picture's file; its ending (.png, .pdf, .svg) says the format."""

    def run(self) -> None:
        """Prints the tables, draws the picture and says where it lies."""
        console = terminal()
        data = federated(self.name, partition=self.partition, clients=self.clients, seed=self.seed, root=self.data_root)
        _print_summary(console, data, self.partition)
        if data.model == "linear":
            _print_problem(console, LinearProblem(data))
        if data.classes:
            _print_labels(console, data)
        try:
            path = plot_labels(data, self.out or self._default(data))
        except UsageError as error:
            if self.out:
                raise
            console.print(f"\nno picture: {error}", soft_wrap=True)
        else:
            console.print(f"\nplot   {path}", soft_wrap=True)

    def _default(self, data: FederatedData) -> Path:
        words = f"{self.name} {self.partition or ''} {data.clients.population} clients"
        return Path(re.sub(r"[^\w.]+", "-", words).strip("-") + ".png")


@dataclass(frozen=True)
class DataConvert:
    """Writes a data set whose clients are people in the form that another system reads: LEAF's, FLUTE's, or an npz."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """What to convert, as for --data: leaf:PATH, flute:PATH, tff:PATH, npz:PATH, femnist, ... (`vfl list data`)."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where the files go, one for train and one for test (npz: one for both)."""
    format: Literal["leaf", "flute_json", "flute_hdf5", "npz"]
    """The form; flute_hdf5 needs the extra hdf5."""
    data_root: Annotated[Path | None, unset("$VFL_DATA, else the user's cache")] = None
    """Folder of the data sets."""

    def run(self) -> None:
        """Writes the files and says what they hold."""
        console = terminal()
        for split, path, (packed, names) in convert(self.source, self.folder, self.format, self.data_root):
            console.print(f"{split}: {len(names):,} users, {len(packed.y):,} examples in {path}", soft_wrap=True)


def _print_summary(console: Console, data: FederatedData, partition: str | None) -> None:
    numbers, x = summary(data), data.clients.x
    pairs = {
        "clients": f"{numbers.clients:,}" + (f" ({numbers.empty:,} without examples)" if numbers.empty else ""),
        "training examples": f"{numbers.examples:,}",
        "examples a client": f"{numbers.minimum:,} to {numbers.maximum:,}, median {numbers.median:,.10g}",
        "test examples": f"{len(data.test.y):,}" if data.test else "none",
        "one input": f"{'×'.join(map(str, x.shape[1:]))}, {str(x.dtype).removeprefix('torch.')}",
        "classes": f"{data.classes}" if data.classes else "none: regression",
    }
    if numbers.labels is not None and numbers.distance is not None:
        pairs["labels a client"] = f"{numbers.labels:.1f} of {data.classes}, mean"
        pairs["label skew"] = f"{numbers.distance:.3f}, mean total variation from everyone's labels (0: none, 1: most)"
    section(console, f"{data.name}, {partition or 'default partition'}", facts(pairs))


def _print_problem(console: Console, problem: LinearProblem) -> None:
    """The constants of the model linear on this data, without a regularizer."""
    L, L_tilde, L_max, mu = problem.smoothness
    pairs = {"L": f"{L:.6g}", "L̃, √(mean Lᵢ²)": f"{L_tilde:.6g}", "largest Lᵢ": f"{L_max:.6g}", "μ": f"{mu:.6g}"}
    try:
        x, least = problem.solution
        pairs |= {"f*": f"{least:.6g}", "‖x*‖": "not unique" if x is None else f"{np.linalg.norm(x):.6g}"}
    except UsageError as error:
        pairs["f*"] = f"not known: {error}"
    loss = "the logistic loss" if problem.data.classes else "half the squared error"
    section(console, f"\nf: the model linear, the mean over clients of {loss}", facts(pairs))


def _print_labels(console: Console, data: FederatedData) -> None:
    """Label counts of the first clients, where they fit into the width."""
    counts, N = label_table(data), data.clients.population
    width = max(len(f"{counts[:_SHOWN].max():,}"), 2)
    if 22 + data.classes * (width + 1) > console.width:
        return
    shown = table(">client", ">examples", *(f">{c}" for c in range(data.classes)))
    shown.padding = (0, 1, 0, 0)
    for i, (row, size) in enumerate(zip(counts[:_SHOWN], data.clients.sizes(), strict=False)):
        cells = [Text("·", "dim") if n == 0 else f"{n:,}" for n in row.tolist()]
        shown.add_row(f"{i}", f"{size:,}", *cells)
    about = f"the first {_SHOWN} of {N:,} clients" if N > _SHOWN else "all clients"
    unit = "positions" if data.clients.y.dim() > 1 else "examples"
    section(console, f"\n{unit} of each label, {about}", shown)


@contextmanager
def _reporting(console: Console) -> Iterator[Report]:
    """A progress bar a file in a terminal; elsewhere a line for every 10 MB and each finished file."""
    if not console.is_interactive:
        said: dict[str, int] = {}

        def line(file: str, done: int, total: int | None) -> None:
            if done == total or done // _STEP > said.get(file, 0):
                said[file] = done // _STEP
                console.print(f"{file}  {si(done, 'B')}" + (f" of {si(total, 'B')}" if total else ""), soft_wrap=True)

        yield line
        return
    name, speed = TextColumn("{task.description}"), TransferSpeedColumn()
    with Progress(name, BarColumn(), DownloadColumn(), speed, TimeRemainingColumn(), console=console) as bars:
        tasks = {}

        def bar(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total)
            bars.update(tasks[file], completed=done, total=total)

        yield bar
