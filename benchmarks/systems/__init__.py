"""The systems that do the work, one module each with a function (model, work) → Outcome."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.work import SHAPES, SMALL

EVERY = tuple(SHAPES)


class System(NamedTuple):
    """One system, used as its own documentation does."""

    target: str  # module of this package : function
    what: str
    package: str  # whose version is reported
    environment: str | None = None  # of `benchmarks/peers`; None: this project's own
    ranks: int = 1  # processes; several have one thread each and share the clients
    note: str = ""  # what to know when reading its numbers
    models: tuple[str, ...] = SMALL
    devices: tuple[str, ...] = ("cpu",)


SYSTEMS = {
    "vfl": System("ours:run", "vfl", "torch", models=EVERY, devices=("cpu", "cuda")),
    "vfl-2": System("ours:run", "vfl, 2 processes of one thread", "torch", ranks=2, models=EVERY),
    "vfl-compile": System(
        "ours:compiled", "vfl, compiled", "torch",
        note="Steady state of a run long enough to repay the compilation, which is the first round's.",
        models=EVERY, devices=("cpu", "cuda"),
    ),
    "vfl-compile-2": System(
        "ours:compiled", "vfl, compiled, 2 processes of one thread", "torch", ranks=2, models=EVERY
    ),
    "torch-loop": System("torch_loop:run", "plain PyTorch loop", "torch", models=EVERY, devices=("cpu", "cuda")),
    "torch-loop-2": System(
        "torch_loop:run", "plain PyTorch loop, 2 processes of one thread", "torch", ranks=2, models=EVERY
    ),
    "jax-loop": System("jax_by_hand:loop", "hand-written JAX: loop over a jitted client", "jax", "jax"),
    "jax-scan": System(
        "jax_by_hand:scan", "hand-written JAX: jitted scan over clients", "jax", "jax",
        note="XLA's convolutions on a CPU are many times slower inside a loop: for the cnn, see jax-loop.",
    ),
    "jax-vmap": System("jax_by_hand:vmap", "hand-written JAX: jitted vmap over clients", "jax", "jax"),
    "pfl": System(
        "pfl_research:run", "pfl-research", "pfl", "pfl",
        note="Its first round also evaluates every client, whatever the evaluation frequency.",
    ),
    "pfl-2": System("pfl_research:run", "pfl-research, 2 processes of one thread", "pfl", "pfl", ranks=2),
    "fedjax": System(
        "fedjax_jit:run", "FedJAX, jit backend", "fedjax", "fedjax",
        note="Its last release, 0.0.17, does not run with JAX newer than 0.5, so it runs with 0.5.3.",
    ),
    "flwr": System(
        "flower:run", "Flower simulation on Ray, one core a client", "flwr", "flwr",
        note="Its first round also starts Ray's workers; memory that they share counts for each of them.",
    ),
}  # fmt: skip
