"""The central types. Letters: D parameters, C clients in a chunk, S a cohort, N the population, K local steps, B batch.

An algorithm is five pure functions, and six more that few need. What a client may know of the server is what
`broadcast` sends. `client_update` is written for one client; the engine maps it over a chunk with `torch.func.vmap`,
sums the weighted messages over chunks and ranks, and hands their mean to `server_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from vfl.local import Batches

Tree = Any
"""A tensor, or a (nested) tuple / NamedTuple of tensors; `()` is the empty one."""

Late = Literal["discounted", "whole", "never"]
"""What the server can make of a message after its round: a part of it; all of it or nothing, as where it must add up
what clients remember having sent; or nothing at all, as where it answers the round's own coin."""


class Message(NamedTuple):
    """What one client sends."""

    payload: Tree  # averaged over the cohort; a tensor [D] or a NamedTuple of tensors
    weight: Tensor  # [] ≥ 0; the weight of this client in the mean, or [W]: in each of W means
    bits: Tensor  # [] float; uplink size


class Broadcast(NamedTuple):
    """What the server sends to every client of a cohort."""

    content: Tree  # all that a client may know of the server
    bits: Tensor  # [] float64; downlink size for one client


class Mean(NamedTuple):
    """What the server receives from a cohort S; of clients with W weights, W means, each leaf [W, ...]."""

    payload: Tree  # Σ wᵢ payloadᵢ / Σ wᵢ; 0 in one of W means without any weight
    weight: Tensor  # [] Σ wᵢ, above 0: a round without any weight has no server step
    clients: Tensor  # [] how many are in it: |S| without those that have no weight or data, or were dropped


class Metrics(NamedTuple):
    """What one client reports about its local work; never averaged into the model, except the module's buffers."""

    loss: Tensor  # [] sum of the training loss over the examples visited
    examples: Tensor  # [] how many visits that sum holds
    gradients: Tensor  # [] sample-gradients computed, wherever and for whatever
    buffers: tuple[Tensor, ...] = ()  # the module's buffers after the work (batch-norm statistics)
    extra: Mapping[str, Tensor] = {}  # [] each: numbers of the algorithm's own, averaged by the clients' weights
    counts: Mapping[str, Tensor] = {}  # [] each: summed over the cohort
    peaks: Mapping[str, Tensor] = {}  # [] ≥ 0 each: of which the cohort's largest is reported


class Server(Protocol):
    """Any NamedTuple of tensors with the model in its field `x`."""

    @property
    def x(self) -> Tensor: ...  # [D]


class InitServer(Protocol):
    """The server's state before the first round."""

    def __call__(self, x: Tensor, /) -> Any: ...


class InitClient(Protocol):
    """A client's state before it first takes part; `()` when it keeps none. `x` is the initial model [D]."""

    def __call__(self, x: Tensor, /) -> Tree: ...


class SendModel(Protocol):
    """What the server tells its clients this round: (server, a random key []) → broadcast."""

    def __call__(self, server: Any, key: Tensor, /) -> Broadcast: ...


class ClientUpdate(Protocol):
    """One client's round: (what was sent, client state, its batches, a key []) → (message, client state, metrics)."""

    def __call__(self, sent: Any, client: Tree, batches: Batches, key: Tensor, /) -> tuple[Message, Tree, Metrics]: ...


class ServerUpdate(Protocol):
    """The server's step: (server, mean of the messages, a random key []) → (server, named scalars to report)."""

    def __call__(self, server: Any, mean: Mean, key: Tensor, /) -> tuple[Any, Mapping[str, Tensor]]: ...


class AsksEveryone(Protocol):
    """Whether the coming round asks all clients, not a sample: server → bool []."""

    def __call__(self, server: Any, /) -> Tensor: ...


class Receive(Protocol):
    """What the server makes of one client's message before anything else: message → message."""

    def __call__(self, message: Message, /) -> Message: ...


class Combine(Protocol):
    """What the server takes for a cohort's payload in the place of its weighted mean: (rows, weight, total) → [d].

    `rows` [S, d] are the messages of the S clients in the mean, in the cohort's order. A payload's entries are shared
    out over the ranks, so that none holds all of them for all clients: d of them lie on this one. `weight` [S] > 0, in
    float64. `total` sums a tensor over the ranks, for what concerns whole messages, such as their distances [S, S].
    """

    def __call__(self, rows: Tensor, weight: Tensor, total: Callable[[Tensor], Tensor], /) -> Tensor: ...


class Model(NamedTuple):
    """A model and what its module remembers beside the parameters."""

    x: Tensor  # [D]
    buffers: tuple[Tensor, ...]


class PersonalModel(Protocol):
    """The model that a client would use now: (server, client state, minibatches of its training data) → model.

    The minibatches bring the module's global buffers along.
    """

    def __call__(self, server: Any, client: Tree, batches: Batches, /) -> Model: ...


class Personal(NamedTuple):
    """Clients have models of their own, which `vfl.evaluate_personal` measures on each client's own data."""

    model: PersonalModel
    steps: int = 0  # minibatches that the model takes to make; 0: it follows from the states


class Idle(Protocol):
    """The server's part of a round that brought no weight: (server, a random key []) → (server, scalars to report)."""

    def __call__(self, server: Any, key: Tensor, /) -> tuple[Any, Mapping[str, Tensor]]: ...


class Expect(Protocol):
    """The first server state, given one client's payload (of zeros): for memory in the shape of what clients send."""

    def __call__(self, server: Any, payload: Tree, /) -> Any: ...


class Algorithm(NamedTuple):
    """A federated algorithm. Every function is pure, and every array may carry a vmap axis."""

    init_server: InitServer
    init_client: InitClient
    broadcast: SendModel
    client_update: ClientUpdate
    server_update: ServerUpdate
    everyone: AsksEveryone | None = None  # None: never
    receive: Receive | None = None  # None: a message counts as it was sent
    combine: Combine | None = None  # None: the weighted mean, which needs no message to be kept
    personal: Personal | None = None  # None: the server's model is everyone's
    idle: Idle | None = None  # None: such a round leaves the server as it was
    expect: Expect | None = None  # None: init_server needs no payload
    late: Late = "discounted"  # how a message may be used after its round


def stateless(x: Tensor, /) -> Tree:
    """`init_client` of an algorithm whose clients remember nothing."""
    return ()


def with_model(server: Any, x: Tensor) -> Any:
    """The server's state with another model x [D]; what wraps an algorithm holds its server in a field `inner`."""
    if "x" in server._fields:
        return server._replace(x=x)
    return server._replace(inner=with_model(server.inner, x))


def idled(algorithm: Algorithm, server: Any, key: Tensor) -> tuple[Any, Mapping[str, Tensor]]:
    """The algorithm's own server state after a round that brought no weight, and what to report."""
    return algorithm.idle(server, key) if algorithm.idle else (server, {})


def expecting(algorithm: Algorithm, server: Any, payload: Tree) -> Any:
    """The algorithm's own first server state, with its memory for what one client sends: a payload (of zeros)."""
    return algorithm.expect(server, payload) if algorithm.expect else server


def nested(algorithm: Algorithm) -> Algorithm:
    """The algorithm for a wrapper whose server's state holds the algorithm's own in its field `inner`.

    The wrapper replaces what it changes, `init_server` in any case.
    """

    def broadcast(server: Any, key: Tensor) -> Broadcast:
        return algorithm.broadcast(server.inner, key)

    def server_update(server: Any, mean: Mean, key: Tensor) -> tuple[Any, Mapping[str, Tensor]]:
        inner, reported = algorithm.server_update(server.inner, mean, key)
        return server._replace(inner=inner), reported

    everyone = algorithm.everyone

    def idle(server: Any, key: Tensor) -> tuple[Any, Mapping[str, Tensor]]:
        inner, reported = idled(algorithm, server.inner, key)
        return server._replace(inner=inner), reported

    def expect(server: Any, payload: Tree) -> Any:
        return server._replace(inner=expecting(algorithm, server.inner, payload))

    return algorithm._replace(
        broadcast=broadcast,
        server_update=server_update,
        everyone=(lambda server: everyone(server.inner)) if everyone else None,
        idle=idle if algorithm.idle else None,
        expect=expect if algorithm.expect else None,
        personal=of_inner(algorithm.personal),
    )


def of_inner(personal: Personal | None) -> Personal | None:
    """Clients' own models for a wrapped algorithm: their server's state is the field `inner` of the wrapper's."""
    if personal is None:
        return None

    def model(server: Any, client: Tree, batches: Batches) -> Model:
        return personal.model(server.inner, client, batches)

    return personal._replace(model=model)


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    # Tuples are walked here, and in `tree_map`: torch's trees, of any registered type, cost a small chunk more than its
    # arithmetic.
    if _tuple(tree):
        return [leaf for part in tree for leaf in leaves(part)]
    return pytree.tree_leaves(tree)


def filled(like: Tree, values: Iterable[Tensor]) -> Tree:
    """A tree of this shape that has these tensors, in order."""
    each = iter(values)
    return tree_map(lambda _: next(each), like)


def structure(tree: Tree) -> Hashable:
    """What a tree looks like but for its leaves: equal for trees of one shape."""
    if isinstance(tree, Tensor):
        return None
    return (type(tree), *map(structure, tree)) if _tuple(tree) else pytree.tree_structure(tree)


def _tuple(tree: Tree) -> bool:
    return type(tree) in (tuple, list) or hasattr(tree, "_fields")


def tree_map(function: Any, *trees: Tree) -> Tree:
    """`function` applied leaf by leaf to trees of one shape."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if _tuple(first):
        mapped = [tree_map(function, *parts) for parts in zip(*trees, strict=True)]
        return type(first)(*mapped) if hasattr(first, "_fields") else type(first)(mapped)
    if all(isinstance(tree, dict) and not tree for tree in trees):
        return {}
    return pytree.tree_map(function, *trees)


def named_leaves(tree: Tree) -> dict[str, Tensor]:
    """The tensors of a tree by their path, `opt.m` for the field m of the field opt."""
    paths, _ = pytree.tree_flatten_with_path(tree)
    return {".".join(_entry(part) for part in path): leaf for path, leaf in paths}


def on_device(numbers: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The host's numbers on the device. A GPU's queue goes on meanwhile, which a plain copy would wait for."""
    tensor = torch.from_numpy(numbers) if isinstance(numbers, np.ndarray) else numbers
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_place(tensor: Tensor, place: torch.device) -> Tensor:
    """The tensor in the device's memory or the host's; a GPU's queue goes on meanwhile.

    What goes to the host is there only when something else has waited for the GPU.
    """
    return on_device(tensor, place) if tensor.device.type == "cpu" else tensor.to(place, non_blocking=True)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] for x [N, ...]: a row in one copy, which torch's indexing makes three times as slowly."""
    if x.dim() == 1 or not x.is_contiguous():
        return x[rows]
    return functional.embedding(rows, x.flatten(1)).view(*rows.shape, *x.shape[1:])


def _entry(part: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
