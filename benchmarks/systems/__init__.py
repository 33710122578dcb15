"""The systems that do the work, one module each with a function (model, work) → Outcome."""

from __future__ import annotations

from typing import NamedTuple


class System(NamedTuple):
    """One system, used as its own documentation does."""

    target: str  # module of this package : function
    what: str
    environment: str | None = None  # of `benchmarks/peers`; None: this project's own
    ranks: int = 1  # processes; several have one thread each and share the clients


SYSTEMS = {
    "vfl": System("ours:run", "vfl"),
    "vfl-2": System("ours:run", "vfl, 2 ranks of one thread", ranks=2),
    "torch-loop": System("torch_loop:run", "plain PyTorch loop"),
    "torch-loop-2": System("torch_loop:run", "plain PyTorch loop, 2 processes of one thread", ranks=2),
    "jax-loop": System("jax_by_hand:loop", "hand-written JAX: loop over a jitted client", "jax"),
    "jax-scan": System("jax_by_hand:scan", "hand-written JAX: jit(scan over clients)", "jax"),
    "jax-vmap": System("jax_by_hand:vmap", "hand-written JAX: jit(vmap over clients)", "jax"),
    "pfl": System("pfl_research:run", "pfl-research", "pfl"),
    "pfl-2": System("pfl_research:run", "pfl-research, 2 processes of one thread", "pfl", ranks=2),
    "fedjax": System("fedjax_jit:run", "FedJAX, jit backend", "fedjax"),
    "flwr": System("flower:run", "Flower simulation (Ray, one core a client)", "flwr"),
}
