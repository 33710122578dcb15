"""Layers of many clients with weights of their own, forward and backward: vfl's beside torch's vmap and a plain loop.

    python -m benchmarks.layers --json benchmarks/results/layers.json
    python -m benchmarks.layers --layers embedding-90 lstm --clients 10

A loop calls torch's layer and its autograd for one client after the other; `torch` is what `torch.func.vmap` makes of
that layer; `vfl` is the layer that a task puts in its place, under vmap. All are measured by turns, and the least time
of each counts, as what other programs do only adds to it; of one thread, its time on the processor. Convolutions have a
benchmark of their own (`benchmarks.convolution`).
"""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.func import vjp, vmap

from benchmarks.measuring import by_turns, layer_cases, result, save
from benchmarks.tables import Column, Row, mark, markdown, number, terminal
from vfl import choices
from vfl.errors import UsageError
from vfl.heap import keep_freed_memory
from vfl.layers import functionalize
from vfl.slots import Stateless

ALLOWED = 1.2
"""How many times as long as the loop vfl may take."""
ALIKE = 1e-4
"""How far a gradient may be from the loop's, beside the largest entry."""

Gradients = tuple[Tensor, ...]
"""Of the parameters, in their order, and of the inputs that have one: [C, ...] each."""


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] → the same shape."""
        return self.attention(x, x, x, need_weights=False)[0]


class Layer(NamedTuple):
    """A layer as models have it, and its inputs."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an example
    tokens: int = 0  # how many different ones; 0: the inputs are numbers


LAYERS: Mapping[str, Layer] = {
    "embedding-90": Layer(lambda: nn.Embedding(90, 8), (80,), 90),
    "embedding-10k": Layer(lambda: nn.Embedding(10_000, 96), (80,), 10_000),
    "lstm": Layer(lambda: nn.LSTM(8, 256, 2, batch_first=True), (80, 8)),
    "attention": Layer(lambda: SelfAttention(64, 4), (64, 64)),
    "layer-norm": Layer(lambda: nn.LayerNorm(64), (64, 64)),
    "layer-norm-256": Layer(lambda: nn.LayerNorm(256), (64, 256)),
    "group-norm": Layer(lambda: nn.GroupNorm(2, 64), (64, 32, 32)),
    "group-norm-8": Layer(lambda: nn.GroupNorm(2, 256), (256, 8, 8)),
    "batch-norm": Layer(lambda: nn.BatchNorm2d(64), (64, 32, 32)),
    "batch-norm-8": Layer(lambda: nn.BatchNorm2d(256), (256, 8, 8)),
}


def measure(name: str, clients: int, batch: int, tries: int) -> Row:
    """Seconds of every way to compute a layer, by its name."""
    keep_freed_memory()  # as vfl does before it maps clients
    calls = ways(LAYERS[name], clients, batch)
    missing: dict[str, str] = {}
    found: dict[str, Gradients] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its slow fallbacks
        for way, call in calls.items():
            try:
                found[way] = call()
            except RuntimeError as error:
                missing[way] = str(error).splitlines()[0]
        taken = by_turns([calls[way] for way in found], tries, choices.clock(torch.device("cpu")))
    least = {way: min(times) for way, times in zip(found, taken, strict=True)}
    median = {way: statistics.median(times) for way, times in zip(found, taken, strict=True)}
    ratio, error = least["vfl"] / least["loop"], apart(found["vfl"], found["loop"])
    return {
        "layer": name,
        "clients": clients,
        "seconds": least,
        "medians": median,
        "without": missing,
        "ratio": ratio,
        "holds": ratio <= ALLOWED,
        "error": error,
    }


def apart(found: Gradients, expected: Gradients) -> float:
    """The largest distance of an entry, beside the largest entry of its tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def ways(
    layer: Layer, clients: int, batch: int, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], Gradients]]:
    """Calls that compute the gradients of all clients, by name."""
    torch.manual_seed(0)
    models = [layer.make().to(dtype) for _ in range(clients)]
    size = (clients, batch, *layer.shape)
    x = torch.randint(layer.tokens, size) if layer.tokens else torch.randn(size, dtype=dtype)
    u = torch.stack([torch.randn_like(_first(model(mine))) for model, mine in zip(models, x, strict=True)])
    names = [name for name, _ in models[0].named_parameters()]
    kept = [name for name, _ in models[0].named_buffers()]
    w, buffers = ([torch.stack([_held(m, name) for m in models]) for name in some] for some in (names, kept))

    def loop() -> Gradients:
        each = []
        for model, mine, slope in zip(models, x, u, strict=True):
            given = mine if layer.tokens else mine.detach().requires_grad_()
            wanted = [*model.parameters(), *([] if layer.tokens else [given])]
            each.append(torch.autograd.grad(_first(model(given)), wanted, slope))
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

    def mapped(model: nn.Module) -> Callable[[], Gradients]:
        call = Stateless(model, [*names, *kept])

        def one(w: list[Tensor], buffers: list[Tensor], x: Tensor, u: Tensor) -> Gradients:
            def outputs(w: list[Tensor], x: Tensor) -> Tensor:
                own = [b.clone() for b in buffers]  # a batch norm writes into them
                return _first(call(dict(zip([*names, *kept], [*w, *own], strict=True)), x)[0])

            if layer.tokens:
                return tuple(vjp(lambda w: outputs(w, x), w)[1](u)[0])
            dw, dx = vjp(outputs, w, x)[1](u)
            return *dw, dx

        return lambda: vmap(one)(w, buffers, x, u)

    theirs = copy.deepcopy(models[0])
    return {"loop": loop, "torch": mapped(theirs), "vfl": mapped(functionalize(copy.deepcopy(theirs)))}


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs  # a recurrent layer gives its states, too


def _held(model: nn.Module, name: str) -> Tensor:
    return dict([*model.named_parameters(), *model.named_buffers()])[name].detach()


def _ms(way: str) -> Column:
    def show(row: Row) -> str:
        if way not in row["seconds"]:
            return "cannot"
        compared = "" if way == "loop" else f" ({row['seconds'][way] / row['seconds']['loop']:.2f}×)"
        return number(1e3 * row["seconds"][way]) + compared

    return Column(way, show)


COLUMNS = (
    Column("layer", lambda row: row["layer"]),
    Column("clients", lambda row: str(row["clients"])),
    *map(_ms, ("loop", "torch", "vfl")),
    Column(f"≤ {ALLOWED:g}", lambda row: mark(row["holds"])),
    Column("medians", lambda row: f"{row['medians']['vfl'] / row['medians']['loop']:.2f}×"),
    Column("error", lambda row: f"{row['error']:.0e}"),
)
WHAT = (
    "ms forward and backward, the least of {tries} by turns, and in parentheses how many times the loop's, for vfl by "
    "the medians too; batches of {batch}; error: how far vfl's gradients are from the loop's, beside the largest entry"
)


def section(found: dict[str, Any]) -> str:
    """The report's section."""
    what = WHAT.format(**found)
    title = "## Layers with weights of each client's own"
    return "\n".join([title, "", f"{what}:", "", *markdown(COLUMNS, found["layers"])])


def main(
    layers: tuple[str, ...] = ("all",),
    clients: tuple[int, ...] = (4, 20),
    batch: int = 20,
    tries: int = 7,
    json: Path | None = None,
) -> None:
    """Measures layers, and prints a table. Exits with 1 where vfl's gradients are not the loop's.

    Args:
        layers: Their names, or all: embedding-90, embedding-10k, lstm, attention, layer-norm, layer-norm-256,
            group-norm, group-norm-8, batch-norm, batch-norm-8.
        clients: How many at once.
        batch: Examples of each client.
        tries: Calls of each way, after two that warm up.
        json: The file to write the numbers to.
    """
    rows = []
    for name, count in layer_cases(layers, list(LAYERS), clients, batch, tries):
        rows.append(measure(name, count, batch, tries))
        Console(stderr=True).print(f"{name}, {count} clients: {rows[-1]['ratio']:.2f}", highlight=False)
    Console().print(terminal(COLUMNS, rows, WHAT.format(batch=batch, tries=tries)))
    if json is not None:
        save(result("layers", batch=batch, tries=tries, layers=rows), json)
    if any(row["error"] > ALIKE for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UsageError as error:
        print(f"benchmarks.layers: {error}", file=sys.stderr)
        sys.exit(2)
