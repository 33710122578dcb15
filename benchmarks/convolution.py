"""Convolutions of many clients with weights of their own, forward and backward: each formulation beside a plain loop.

    python -m benchmarks.convolution --json benchmarks/results/convolution.json
    python -m benchmarks.convolution --layers cnn-1 cnn-2 --clients 50

A loop calls torch's convolution and its autograd for one client after the other; `torch` is what `torch.func.vmap`
makes of that; the others are vfl's formulations under vmap, and `auto` the one that it takes, or a mixture, since it
chooses for the outputs and for either gradient apart. All are measured by turns. `auto` should be as fast as the best
of the loop and of torch's vmap.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import tyro
from rich.console import Console
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional

from benchmarks.measuring import by_turns, layer_cases, result, save
from benchmarks.tables import Column, Row, mark, markdown, number, terminal
from vfl.convolution import Wanted, convolution
from vfl.errors import UsageError
from vfl.formulations import Geometry
from vfl.heap import keep_freed_memory

ALLOWED = 1.05
"""How many times as long as the best of the loop and torch's vmap `auto` may take."""


class Layer(NamedTuple):
    """A convolution of square images, with bias."""

    inputs: int  # channels
    outputs: int  # channels
    kernel: int
    side: int  # of the images
    padding: int
    first: bool = False  # of its model: nobody asks for the gradient of its inputs
    stride: int = 1

    @property
    def geometry(self) -> Geometry:
        """As vfl describes it."""
        sides, kernel, stride, padding = ((n, n) for n in (self.side, self.kernel, self.stride, self.padding))
        return Geometry(sides, kernel, stride, padding, (1, 1), 1)


LAYERS: Mapping[str, Layer] = {
    "cnn-1": Layer(1, 32, 5, 28, 2, first=True),
    "cnn-2": Layer(32, 64, 5, 14, 2),
    "lenet-1": Layer(1, 6, 5, 28, 2, first=True),
    "lenet-2": Layer(6, 16, 5, 14, 0),
    "resnet-0": Layer(3, 64, 3, 32, 1, first=True),
    "resnet-1": Layer(64, 64, 3, 32, 1),
    "resnet-2": Layer(128, 128, 3, 16, 1),
    "resnet-s": Layer(64, 128, 3, 32, 1, stride=2),
    "resnet-3": Layer(256, 256, 3, 8, 1),
    "resnet-4": Layer(512, 512, 3, 4, 1),
}


def measure(name: str, clients: int, batch: int, tries: int) -> Row:
    """Gflop/s of every way to compute a layer, by its name."""
    keep_freed_memory()  # as vfl does before it maps clients
    layer = LAYERS[name]
    calls = ways(layer, clients, batch)
    taken = by_turns(list(calls.values()), tries)
    seconds = {way: statistics.median(times) for way, times in zip(calls, taken, strict=True)}
    work = flops(layer, batch) * clients
    # Of single turns, which whatever else the machine does slows alike.
    turns = [dict(zip(calls, turn, strict=True)) for turn in zip(*taken, strict=True)]
    ratio = statistics.median(turn["auto"] / min(turn["loop"], turn["torch"]) for turn in turns)
    return {
        "layer": name,
        "clients": clients,
        **{way: work / s / 1e9 for way, s in seconds.items()},
        "ratio": ratio,
        "holds": ratio <= ALLOWED,
    }


def ways(layer: Layer, clients: int, batch: int) -> dict[str, Callable[[], object]]:
    """Calls that compute the gradients of all clients."""
    geometry, draw = layer.geometry, torch.Generator().manual_seed(0)
    x = torch.randn(clients, batch, layer.inputs, layer.side, layer.side, generator=draw)
    w = torch.randn(clients, layer.outputs, layer.inputs, layer.kernel, layer.kernel, generator=draw)
    b = torch.randn(clients, layer.outputs, generator=draw)
    g = torch.randn(clients, batch, layer.outputs, *geometry.outputs, generator=draw)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.conv2d(x, w, b, layer.stride, layer.padding)

    def loop() -> None:
        for mine in zip(x, w, b, g, strict=True):
            x1, w1, b1 = (t.detach().requires_grad_() for t in mine[:3])
            torch.autograd.grad(plain(x1, w1, b1), (w1, b1) if layer.first else (x1, w1, b1), mine[3])

    def mapped(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def one(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> object:
            return vjp(lambda w, b: f(x, w, b), w, b)[1](g) if layer.first else vjp(f, x, w, b)[1](g)

        return lambda: vmap(one)(x, w, b, g)

    def by(wanted: Wanted) -> Callable[[], object]:
        return mapped(lambda x, w, b: convolution(x, w, b, geometry, wanted, functional.conv2d))

    return {"loop": loop, "torch": mapped(plain)} | {wanted: by(wanted) for wanted in get_args(Wanted)}


def flops(layer: Layer, batch: int) -> int:
    """Floating-point operations of a client: of the outputs, and as many for either gradient."""
    n, _ = layer.geometry.outputs
    products = 2 if layer.first else 3
    return products * 2 * batch * layer.outputs * n * n * layer.inputs * layer.kernel**2


def _rate(way: str) -> Column:
    return Column(way, lambda row: number(row[way]))


COLUMNS = (
    Column("layer", lambda row: row["layer"]),
    Column("clients", lambda row: str(row["clients"])),
    *map(_rate, ("loop", "torch", "each", "grouped", "unfold", "auto")),
    Column("ratio", lambda row: f"{row['ratio']:.2f} {mark(row['holds'])}"),
)


def section(found: dict[str, Any]) -> str:
    """The report's section."""
    return "\n".join([
        "## Convolutions with weights of each client's own",
        "",
        f"Gflop/s forward and backward, batches of {found['batch']} images a client: a loop over "
        "the clients, torch's vmap, vfl's three ways and the one it chooses. The ratio is the chosen one's time over "
        "that of the best of loop and torch (≤ 1.05).",
        "",
        *markdown(COLUMNS, found["layers"]),
    ])  # fmt: skip


def main(
    layers: tuple[str, ...] = ("all",),
    clients: tuple[int, ...] = (8, 50),
    batch: int = 20,
    tries: int = 7,
    json: Path | None = None,
) -> None:
    """Measures layers, and prints a table in Gflop/s.

    The ratio is the time of `auto` over that of the best of loop and torch. Exits with 1 where it is above 1.05.

    Args:
        layers: Their names, or all: cnn-1, cnn-2, lenet-1, lenet-2, resnet-0 to resnet-4, resnet-s.
        clients: How many at once.
        batch: Images of each client.
        tries: Calls of each way, after one that warms up.
        json: The file to write the numbers to.
    """
    rows = []
    for name, count in layer_cases(layers, list(LAYERS), clients, batch, tries):
        rows.append(measure(name, count, batch, tries))
        Console(stderr=True).print(f"{name}, {count} clients: {rows[-1]['ratio']:.2f}", highlight=False)
    Console().print(terminal(COLUMNS, rows, "forward and backward, Gflop/s"))
    if json is not None:
        save(result("convolution", batch=batch, layers=rows), json)
    if not all(row["holds"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.convolution: {error}", file=sys.stderr)
        sys.exit(2)
