"""Clients trained a second: vfl, a plain PyTorch loop, hand-written JAX and other simulators on the same work.

    benchmarks/peers all                                                  # once: the others' environments
    python -m benchmarks.throughput --repeats 3                           # all systems, all models: table, JSON, plot
    python -m benchmarks.throughput --system vfl --model mlp --clients 100 --rounds 30 --json
    python -m benchmarks.throughput --device cuda --clients 500 --models all --name throughput_cuda   # with a GPU

The work is FedAvg on random images (`benchmarks/work.py`). Every run is a process of its own; repeats take turns. A
number is the median over the rounds after the first, and then over the repeats. What takes long or is vfl's and the
plain loop's alone (lstm, resnet18) is measured when asked for. `python -m benchmarks.report` renders what was written.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import result, save
from benchmarks.report import Summary, cell, summaries
from benchmarks.systems import SYSTEMS
from benchmarks.tables import number
from benchmarks.work import ROUNDS, SMALL, Work
from vfl.errors import UsageError, unknown

ROOT = Path(__file__).parents[1]
MB = 1e6


class MissingError(RuntimeError):
    """A system that could not run; the message says why in one sentence."""


def measure(name: str, model: str, work: Work, peers: Path) -> dict[str, Any]:
    """One run of a system, in processes of its own: the numbers by name, as `--json` prints them.

    Raises MissingError where the system's environment is missing or its process fails.
    """
    system = SYSTEMS[name]
    if model not in system.models or work.device not in system.devices:
        raise MissingError(f"does not run {model} on {work.device}")
    python = Path(sys.executable) if system.environment is None else peers / system.environment / "bin" / "python"
    if not python.exists():
        raise MissingError(f"not installed (run benchmarks/peers {system.environment})")
    work = replace(work, rounds=work.rounds or ROUNDS[model])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    if work.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # for everyone
    launcher: list[str] = []
    if system.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={system.ranks}"]
        environment["OMP_NUM_THREADS"] = "1"
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    command = [str(python), *launcher, "-m", "benchmarks.systems", name, model, json.dumps(asdict(work))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds": ')]
    if done.returncode or len(lines) != system.ranks:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        why = next((line for line in reversed(said) if "Error" in line), said[-1])
        raise MissingError(f"failed with exit code {done.returncode}: {why}")
    seconds = [max(each) for each in zip(*(line["seconds"] for line in lines), strict=True)]
    s, peaks = statistics.median(seconds[1:]), [line["peak_rss"] for line in lines]
    return {
        "system": name,
        "model": model,
        "clients_per_s": work.clients / s,
        "s_per_round": s,
        "first_round_s": seconds[0],
        "peak_rss_mb": None if None in peaks else sum(peaks) / MB,
        **{key: lines[0][key] for key in ("execution", "chunk", "moved", "version")},
        "rounds": work.rounds,
    }


def table(found: Sequence[Summary]) -> Table:
    """Systems by models."""
    models = list(dict.fromkeys(row.model for row in found))
    made = Table("system", title="clients trained a second (how many times as fast vfl is)")
    for model in models:
        made.add_column(model, justify="right")
    for name in dict.fromkeys(row.system for row in found):
        made.add_row(name, *(cell(found, name, model) for model in models))
    return made


def plot(found: Sequence[Summary], path: Path) -> None:
    """One panel of bars a model."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib; run `pip install vfl[plots]`") from None
    measured = [row for row in found if row.clients_per_s is not None]
    models = list(dict.fromkeys(row.model for row in measured))
    names = list(dict.fromkeys(row.system for row in measured))
    figure = Figure(figsize=(1.2 + 3.4 * len(models), 0.8 + 0.28 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        rates = {row.system: row.clients_per_s or 0.0 for row in measured if row.model == model}
        at = [names.index(name) for name in rates]
        colors = ["#0072B2" if name.startswith("vfl") else "#9aa5ad" for name in rates]
        bars = axes.barh(at, list(rates.values()), color=colors)
        axes.bar_label(bars, [number(rate) for rate in rates.values()], padding=2)
        axes.set_xscale("log")
        axes.set_xlim(min(rates.values()) / 3, max(rates.values()) * 6)  # room for the labels
        axes.set_yticks(range(len(names)), names)
        axes.set_title(model)
        axes.set_xlabel("clients a second")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=160)


def main(
    systems: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--system"])] = ("all",),
    models: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model"])] = SMALL,
    work: tyro.conf.OmitArgPrefixes[Work] = Work(),  # noqa: B008
    repeats: int = 1,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    name: str = "throughput",
    out: Path = ROOT / "benchmarks" / "results",
    peers: Path = ROOT / ".peers",
) -> None:
    """Measures systems in turn, prints a table, and writes a JSON file and a plot.

    With all systems, a model or device that a system lacks is left out. Exits with 1 where a system could not run: not
    installed, or failed.

    Args:
        systems: Their names, or all: vfl, vfl-2, vfl-compile, vfl-compile-2, torch-loop, torch-loop-2, jax-loop,
            jax-scan, jax-vmap, pfl, pfl-2, fedjax, flwr.
        models: softmax, mlp, cnn, lstm, resnet18, or all.
        repeats: Runs of each system with each model.
        as_json: Print one line of JSON for each system with each model instead, and write nothing.
        name: Of the files written: name.json and name.png.
        out: Folder of the results.
        peers: Folder of the environments that benchmarks/peers made.
    """
    names, chosen = _chosen("system", systems, SYSTEMS), _chosen("model", models, ROUNDS)
    _check(work, repeats)
    console = Console(stderr=True)
    runs: list[dict[str, Any]] = []
    for turn in range(1, repeats + 1):
        for model in chosen:
            for system in names:
                if "all" in systems and not (model in (has := SYSTEMS[system]).models and work.device in has.devices):
                    continue
                try:
                    run = measure(system, model, work, peers)
                    said = f"{run['clients_per_s']:,.4g} clients/s"
                except MissingError as error:
                    run, said = {"system": system, "model": model, "missing": str(error)}, str(error)
                console.print(f"{turn}/{repeats} {model} {system}: {said}", highlight=False, markup=False)
                runs.append(run)
    found = summaries(runs)
    if as_json:
        for row in found:
            print(row.json())
    else:
        Console().print(table(found))
        save(result("throughput", work=asdict(work), runs=runs, plot=f"{name}.png"), out / f"{name}.json")
        if any(row.clients_per_s for row in found):
            plot(found, out / f"{name}.png")
    if any(row.missing for row in found):
        sys.exit(1)


def _chosen(what: str, wanted: Sequence[str], known: dict[str, Any]) -> list[str]:
    if "all" in wanted:
        return list(known)
    for name in wanted:
        if name not in known:
            raise unknown(what, name, [*known, "all"])
    return list(dict.fromkeys(wanted))


def _check(work: Work, repeats: int) -> None:
    if work.examples % work.batch:
        raise UsageError(f"examples must be a multiple of the batch, {work.batch}, not {work.examples}")
    if work.rounds and work.rounds < 2:
        raise UsageError(f"rounds must be at least 2, since the first is not counted, not {work.rounds}")
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, not {repeats}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.throughput: {error}", file=sys.stderr)
        sys.exit(2)
