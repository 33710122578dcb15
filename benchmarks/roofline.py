"""How far vfl is from what the hardware allows: clients a second as a fraction of the roofline.

    python -m benchmarks.roofline --json benchmarks/results/roofline.json

A client's local training needs so many floating-point operations (those of its matrix products and convolutions) and
moves so many bytes: every step reads and writes the model, and every example is read once an epoch. No program takes
less than the longer of the two, at the peak rates of this machine, which are measured in the same run: the fastest
matrix product of torch's libraries, and a copy of as many bytes, so that what fits into a cache has the cache's speed.
The work is that of `benchmarks.throughput`, in float32.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import result, save, seconds
from benchmarks.systems import ours, torch_loop
from benchmarks.tables import Column, Row, markdown, number, terminal
from benchmarks.work import ROUNDS, Work, parameters
from vfl.errors import UsageError
from vfl.tuning import MODES, Mode


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a b by oneDNN, for float32 matrices on the CPU."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch.mm": torch.mm, "vfl": torch.ops.vfl.product}
if torch.backends.mkldnn.is_available():
    PRODUCTS["oneDNN"] = by_onednn
SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}  # of the square matrices multiplied
COPIES = tuple(2**n for n in range(18, 30))  # bytes read and written: 256 kB to 512 MB, more than any cache
TRIES = 9

Model = Literal["softmax", "mlp", "cnn", "lstm", "resnet18"]
Rates = dict[tuple[str, Mode], list[float]]
"""(model, execution) → clients a second, in each repeat."""


class Peaks(NamedTuple):
    """What the machine can do."""

    products: dict[str, float]  # library → floating-point operations a second
    copies: dict[int, float]  # bytes read and written by a copy → bytes a second

    @property
    def flops(self) -> float:
        """Operations a second, by the fastest library."""
        return max(self.products.values())

    def bandwidth(self, size: float) -> float:
        """Bytes a second where `size` bytes are read and written over and over: what the caches above them allow."""
        largest = max(self.copies)
        return max(rate for moved, rate in self.copies.items() if moved >= min(size, largest))


class Demand(NamedTuple):
    """What a client's local training needs, whatever the program."""

    flops: float  # operations
    model: float  # bytes of the model read and written, over all steps
    step: float  # of these, in one step
    examples: float  # bytes of examples read
    everyone: float  # bytes of all clients' examples

    def seconds(self, peaks: Peaks) -> tuple[float, float]:
        """The least time of the arithmetic, and of moving the bytes."""
        moving = self.model / peaks.bandwidth(self.step) + self.examples / peaks.bandwidth(self.everyone)
        return self.flops / peaks.flops, moving


def measure_peaks(
    sides: Sequence[int] = (), copies: Sequence[int] = COPIES, tries: int = TRIES, device: str = "cpu"
) -> Peaks:
    """The best rates seen: a peak is what nothing has slowed down."""

    def best(call: Callable[[], object]) -> float:
        def finished() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return min(seconds(finished, tries))

    usable = PRODUCTS if device == "cpu" else {"torch.mm": torch.mm}
    products = dict.fromkeys(usable, 0.0)
    for side in sides or SIDES[device]:
        a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
        for name, product in usable.items():
            took = best(lambda product=product, a=a, b=b: product(a, b))
            products[name] = max(products[name], 2 * side**3 / took)
    rates = {}
    for moved in copies:
        source = torch.rand(moved // 8, device=device)  # half of the bytes are read, half are written
        target = torch.empty_like(source)
        rates[moved] = moved / best(lambda source=source, target=target: target.copy_(source))
    return Peaks(products, rates)


def better(a: Peaks, b: Peaks) -> Peaks:
    """The best of two measurements."""
    products = {name: max(rate, b.products[name]) for name, rate in a.products.items()}
    return Peaks(products, {moved: max(rate, b.copies[moved]) for moved, rate in a.copies.items()})


def _lstm_flops(x: Sequence[int], w_x: Sequence[int], w_h: Sequence[int], *_: Any, **__: Any) -> int:
    """Of oneDNN's layer, which torch does not count: W x and W h at each position."""
    return 2 * math.prod(x[:2]) * (math.prod(w_x) + math.prod(w_h))


def _lstm_gradient_flops(*inputs: Any, **_: Any) -> int:
    """And of its gradient: those of both W, and those of x and h."""
    return 2 * _lstm_flops(*inputs)


FLOPS = {
    torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,
    torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_gradient_flops,
}


def demand(model: str, work: Work) -> Demand:
    """What a client of the work needs; operations as torch counts them in plain local training."""
    work = replace(work, device="cpu")
    net = torch_loop.network(model, parameters(model, work))
    x, y = torch_loop.tensors(replace(work, clients=1), model)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        torch_loop.train(net, x[0], y[0], work)
    step = 2.0 * sum(p.numel() * p.element_size() for p in net.parameters())
    steps = work.epochs * work.examples // work.batch
    held = x.nbytes
    return Demand(counter.get_total_flops(), steps * step, step, work.epochs * held, work.clients * held)


def rate(model: str, work: Work, execution: Mode) -> float:
    """vfl's clients a second: the median of the later half of the rounds, when it knows its chunk size."""
    work = replace(work, rounds=work.rounds or ROUNDS[model])
    times = ours.run(model, work, execution=execution).seconds
    return work.clients / statistics.median(times[work.rounds // 2 :])


COLUMNS = (
    Column("model", lambda row: row["model"]),
    Column("execution", lambda row: row["execution"]),
    Column("Mflop", lambda row: number(row["flops"] / 1e6)),
    Column("MB", lambda row: number(row["bytes"] / 1e6)),
    Column("flops, µs", lambda row: number(1e6 * row["arithmetic_s"])),
    Column("bytes, µs", lambda row: number(1e6 * row["moving_s"])),
    Column("measured, µs", lambda row: number(1e6 / row["clients_per_s"])),
    Column("clients/s", lambda row: number(row["clients_per_s"])),
    Column("of floor", lambda row: f"{row['fraction']:.1%}"),
)


def said(peaks: dict[str, Any]) -> str:
    """The measured peaks in a sentence."""
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peaks["products"].items())
    copies = ", ".join(f"{int(moved) / 2**20:g} MB {rate / 1e9:.0f}" for moved, rate in peaks["copies"].items())
    return f"Products, Gflop/s: {products}. Copies by bytes moved, GB/s: {copies}."


def section(found: dict[str, Any]) -> str:
    """The report's section."""
    work, threads = found["work"], found["threads"]
    return "\n".join([
        "## Roofline: how near the hardware's floor",
        "",
        f"FedAvg as in the throughput benchmark ({work['clients']} clients, {work['examples']} examples each, batches "
        f"of {work['batch']}), {threads} thread{'s' * (threads > 1)}. The floor is the longer of a client's arithmetic "
        "at the fastest matrix product's rate and its bytes (the model read and written in each step, the examples "
        "once an epoch) at that of a copy of such a size."
        + (" All on the GPU." if work.get("device") == "cuda" else ""),
        "",
        said(found["peaks"]),
        "",
        *markdown(COLUMNS, found["rows"]),
    ])  # fmt: skip


def rows_of(demands: dict[str, Demand], rates: Rates, peaks: Peaks) -> list[Row]:
    """A row for each model and execution; the median of its rates beside the floor."""
    rows = []
    for (model, execution), found in rates.items():
        need, middle = demands[model], statistics.median(found)
        arithmetic, moving = need.seconds(peaks)
        rows.append({
            "model": model, "execution": execution, "flops": need.flops, "bytes": need.model + need.examples,
            "arithmetic_s": arithmetic, "moving_s": moving, "clients_per_s": middle, "runs": found,
            "fraction": middle * max(arithmetic, moving),
        })  # fmt: skip
    return rows


def main(
    models: Annotated[tuple[Model, ...], tyro.conf.arg(aliases=["--model"])] = ("softmax", "mlp", "cnn"),
    executions: Annotated[tuple[Mode, ...], tyro.conf.arg(aliases=["--execution"])] = MODES,
    work: tyro.conf.OmitArgPrefixes[Work] = Work(),  # noqa: B008
    threads: int = 1,
    repeats: int = 3,
    json: Path | None = None,
) -> None:
    """Measures the machine's peaks and vfl by turns, and prints the fraction of the floor for each execution.

    Args:
        models: softmax, mlp, cnn, lstm, resnet18.
        executions: How clients are computed.
        threads: Threads of torch.
        repeats: Runs of each model and execution; the medians are shown.
        json: The file to write the numbers to.
    """
    if work.rounds == 1 or repeats < 1 or threads < 1:
        raise UsageError("rounds must be at least 2, threads and repeats at least 1")
    torch.set_num_threads(threads)
    progress = Console(stderr=True)
    demands = {model: demand(model, work) for model in models}
    rates: Rates = {(model, execution): [] for model in models for execution in executions}
    peaks = measure_peaks(device=work.device)
    for turn in range(1, repeats + 1):
        for (model, execution), found in rates.items():
            found.append(rate(model, work, execution))
            progress.print(f"{turn}/{repeats} {model} {execution}: {number(found[-1])} clients/s", highlight=False)
        peaks = better(peaks, measure_peaks(device=work.device))
    rows = rows_of(demands, rates, peaks)
    found = result("roofline", threads=threads, work=asdict(work), peaks=peaks._asdict(), rows=rows)
    Console().print(terminal(COLUMNS, rows, "vfl beside the roofline", said(found["peaks"])))
    if json is not None:
        save(found, json)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.roofline: {error}", file=sys.stderr)
        sys.exit(2)
