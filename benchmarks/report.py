"""Renders benchmarks/RESULTS.md from the JSON files that the benchmarks wrote: `python -m benchmarks.report`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from benchmarks import algorithms, convolution, growth, layers, memory, roofline, sampling
from benchmarks.systems import SYSTEMS
from benchmarks.tables import header, line, number
from vfl.errors import UsageError

FOLDER = Path(__file__).parent
ALIKE = 0.3
"""How far from where the median system's model ends, relatively, another's may end: a small cohort's order matters."""


class Summary(NamedTuple):
    """A system's runs with a model: medians, or why there are none."""

    system: str
    model: str
    missing: str | None = None
    clients_per_s: float | None = None
    slowest: float | None = None  # clients a second, of all runs
    fastest: float | None = None
    s_per_round: float | None = None
    first_round_s: float | None = None
    peak_rss_mb: float | None = None  # None where the system does not tell
    execution: str | None = None  # vfl alone
    chunk: int | None = None  # vfl alone
    moved: float | None = None  # how far the last model lies from the first one
    version: str | None = None
    rounds: int | None = None
    repeats: int = 0

    def json(self) -> str:
        """One line."""
        return json.dumps(self._asdict())


def summaries(runs: Iterable[dict[str, Any]]) -> list[Summary]:
    """The runs of each system and model as one, in the order of their first run."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["system"], run["model"]), []).append(run)
    return [_summary(*key, group) for key, group in groups.items()]


def _summary(system: str, model: str, runs: Sequence[dict[str, Any]]) -> Summary:
    missing = [run["missing"] for run in runs if "missing" in run]
    if missing:
        return Summary(system, model, missing[0])
    rates = [run["clients_per_s"] for run in runs]
    middle = {key: _median([run[key] for run in runs])
              for key in ("clients_per_s", "s_per_round", "first_round_s", "peak_rss_mb", "moved")}  # fmt: skip
    last = {key: runs[-1][key] for key in ("execution", "chunk", "version", "rounds")}
    return Summary(system, model, slowest=min(rates), fastest=max(rates), repeats=len(runs), **middle, **last)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def other_work(found: Sequence[Summary]) -> list[Summary]:
    """Those whose model went elsewhere than most others': their speed is that of other work."""
    strange = []
    for model in dict.fromkeys(row.model for row in found):
        rows = [row for row in found if row.model == model and row.moved is not None]
        middle = _median([row.moved for row in rows]) or 0.0
        strange += [row for row in rows if abs((row.moved or 0.0) - middle) > ALIKE * middle]
    return strange


def cell(found: Sequence[Summary], system: str, model: str) -> str:
    """A table's entry: clients a second and, in parentheses, how many times as fast vfl is."""
    rows = {row.system: row for row in found if row.model == model}
    row, ours = rows.get(system), rows.get("vfl")
    if row is None:
        return ""
    if row.clients_per_s is None:
        return row.missing or ""
    ratio = ours.clients_per_s / row.clients_per_s if ours and ours.clients_per_s and system != "vfl" else None
    compared = "" if ratio is None else f" ({ratio:.2g}×)"
    return number(row.clients_per_s) + compared + (" other work" if row in other_work(found) else "")


def throughput(result: dict[str, Any]) -> str:
    """The section on `benchmarks.throughput`."""
    found = summaries(result["runs"])
    models = list(dict.fromkeys(row.model for row in found))
    names = list(dict.fromkeys(row.system for row in found))
    versions = {row.system: row.version for row in found if row.version}
    work, plays = result["work"], [row for row in found if row.repeats]
    steps = work["epochs"] * work["examples"] // work["batch"]
    device = "GPU" if work.get("device") == "cuda" else "CPU"
    lines = [
        "## Throughput: clients trained a second",
        "",
        f"FedAvg on the {device}, {work['clients']:,} clients, all in every round; each holds {work['examples']} "
        f"random examples and makes {steps} SGD steps of {work['batch']}; no evaluation. Clients a second: the median "
        "over the rounds after the first, then over the repeats. In parentheses, how many times as fast vfl is. Models "
        "on images of 28×28: softmax 784→10, mlp 784-200-200-10, cnn conv5×5×32, conv5×5×64, fc512; lstm on texts of "
        "80 characters, embedding 8, 2 × 256; resnet18 with group norm on images of 3×32×32.",
        "",
        *header(["system", "", *models]),
        *(line([name, _what(name, versions.get(name)), *(cell(found, name, m) for m in models)]) for name in names),
        "",
        f"![throughput](results/{result.get('plot', 'throughput.png')})",
        "",
        "In detail: seconds of a round and of the first one (compilation and warm-up included), peak resident memory "
        "over all of a system's processes, the slowest and the fastest repeat, and how far training moved the model: "
        "the check that all systems did the same work (it agrees in all digits where a batch is all of a client's "
        "examples, `--batch 60`, and the order cannot matter).",
        "",
        *header(["model", "system", "s a round", "first round", "peak MB", "clients/s, range", "rounds × repeats",
                 "moved", "execution, chunk"]),
    ]  # fmt: skip
    for row in sorted(plays, key=lambda row: models.index(row.model)):
        chosen = f"{row.execution}, {row.chunk}" if row.execution else ""
        spread = f"{number(row.slowest or 0)} … {number(row.fastest or 0)}"
        memory = "" if row.peak_rss_mb is None else number(row.peak_rss_mb)
        values = [row.model, row.system, f"{row.s_per_round:.3g}", f"{row.first_round_s:.3g}", memory, spread,
                  f"{row.rounds} × {row.repeats}", f"{row.moved:.4g}", chosen]  # fmt: skip
        lines.append(line(values))
    lines += ["", *(f"- {name}: {SYSTEMS[name].note}" for name in names if name in SYSTEMS and SYSTEMS[name].note)]
    return "\n".join(lines)


def _what(name: str, version: str | None) -> str:
    what = SYSTEMS[name].what if name in SYSTEMS else ""
    return f"{what} ({version})" if version else what


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "throughput": throughput,
    "algorithms": algorithms.section,
    "roofline": roofline.section,
    "scaling": growth.section,
    "memory": memory.section,
    "sampling": sampling.section,
    "layers": layers.section,
    "convolution": convolution.section,
}
"""A benchmark's name, in its file's `benchmark` → its section."""


def render(files: Iterable[Path]) -> str:
    """The whole text. Raises UsageError for a file that no benchmark wrote, and where there is none at all."""
    sections = []
    for path in sorted(files):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            section = SECTIONS[result["benchmark"]](result)
            machine, date = result["machine"], result["date"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not what a benchmark of this project writes ({error!r})") from None
        where = "{cores} cores of {cpu}, torch {torch}, Python {python}".format(**machine)
        where += f", {machine['gpu']}" if machine.get("gpu") else ""
        title, _, rest = section.partition("\n")
        sections.append(f"{title}\n\n{date}, {where}.\n{rest}")
    if not sections:
        raise UsageError("there are no results to render; run `python -m benchmarks.throughput` first")
    return "\n\n".join(["# Benchmark results", "Rendered by `python -m benchmarks.report`.", *sections]) + "\n"


def main(results: Path = FOLDER / "results", out: Path = FOLDER / "RESULTS.md") -> None:
    """Renders the results.

    Args:
        results: Folder of the JSON files.
        out: The file to write.
    """
    out.write_text(render(results.glob("*.json")), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        sys.exit(2)
