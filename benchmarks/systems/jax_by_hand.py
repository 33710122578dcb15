"""FedAvg as one writes it by hand in JAX, in three ways: a Python loop over a jitted client, or a jitted round that is
a scan or a vmap over the clients.

On a CPU each has its model: XLA's convolutions are many times slower inside the scan's loop than outside of it.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.work import SHAPES, Arrays, Outcome, Work, examples, parameters, timed

MAP = 7  # side of the last feature map
CHANNELS = 64


def loop(model: str, work: Work) -> Outcome:
    """One jitted call a client, which adds to a sum that stays in place."""

    def add(server: Any, sum_: Any, x: jax.Array, y: jax.Array, keys: jax.Array, c: int) -> Any:
        trained = train(server, x[c], y[c], keys[c], work)
        return jax.tree.map(lambda s, p: s + work.examples * p, sum_, trained)

    jitted = jax.jit(add, donate_argnums=1)

    def round_(server: Any, x: jax.Array, y: jax.Array, keys: jax.Array) -> Any:
        sums = jax.tree.map(jnp.zeros_like, server)
        for c in range(work.clients):
            sums = jitted(server, sums, x, y, keys, c)
        return jax.tree.map(lambda s: s / (work.clients * work.examples), sums)

    return _run(model, work, round_)


def scan(model: str, work: Work) -> Outcome:
    """One client after the other, all in one loop on the device."""

    @jax.jit
    def round_(server: Any, x: jax.Array, y: jax.Array, keys: jax.Array) -> Any:
        def add(sum_: Any, client: Any) -> tuple[Any, None]:
            x, y, key = client
            trained = train(server, x, y, key, work)
            return jax.tree.map(lambda s, p: s + work.examples * p, sum_, trained), None

        sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, server), (x, y, keys))
        return jax.tree.map(lambda s: s / (work.clients * work.examples), sums)

    return _run(model, work, round_)


def vmap(model: str, work: Work) -> Outcome:
    """All clients at once."""

    @jax.jit
    def round_(server: Any, x: jax.Array, y: jax.Array, keys: jax.Array) -> Any:
        trained = jax.vmap(lambda x, y, key: train(server, x, y, key, work))(x, y, keys)
        return jax.tree.map(lambda p: work.examples * p.sum(0) / (work.clients * work.examples), trained)

    return _run(model, work, round_)


def train(params: Any, x: jax.Array, y: jax.Array, key: jax.Array, work: Work) -> Any:
    """A client's model after its local SGD on x [n, 28, 28, 1] and y [n]."""
    orders = [jax.random.permutation(k, work.examples) for k in jax.random.split(key, work.epochs)]

    def step(params: Any, rows: jax.Array) -> tuple[Any, None]:
        gradient = jax.grad(loss)(params, x[rows], y[rows])
        return jax.tree.map(lambda p, g: p - work.lr * g, params, gradient), None

    return jax.lax.scan(step, params, jnp.concatenate(orders).reshape(-1, work.batch), unroll=True)[0]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy [] of images x [B, 28, 28, 1]."""
    scores = jax.nn.log_softmax(network(params, x))
    return -jnp.take_along_axis(scores, y[:, None], axis=1).mean()


def network(params: Any, x: jax.Array) -> jax.Array:
    """The outputs [B, 10] of the model whose parameters these are, as `from_torch` laid them out."""
    layers = list(zip(params[::2], params[1::2], strict=True))
    for weight, bias in layers:
        if weight.ndim == 4:
            x = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        else:
            x = x.reshape(len(x), -1) @ weight + bias
            x = x if weight is layers[-1][0] else jax.nn.relu(x)
    return x


def images(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """The examples: images [C, n, 28, 28, 1] and labels [C, n]."""
    x, y = examples(work)
    return x[..., None], y.astype(np.int32)


def from_torch(arrays: Arrays) -> Arrays:
    """Torch's layout to JAX's usual one: convolution [height, width, in, out], linear [in, out], channels last."""

    def turned(a: np.ndarray) -> np.ndarray:
        if a.ndim == 4:
            return a.transpose(2, 3, 1, 0)
        if a.ndim == 2 and a.shape[1] == CHANNELS * MAP * MAP:  # its inputs are a feature map, flattened
            return a.reshape(-1, CHANNELS, MAP, MAP).transpose(2, 3, 1, 0).reshape(a.shape[::-1])
        return a.T

    return [np.ascontiguousarray(turned(a)) for a in arrays]


def to_torch(model: str, arrays: Any) -> Arrays:
    """The inverse of `from_torch`, which only moves entries around."""
    sizes = [int(np.prod(shape)) for shape in SHAPES[model]]
    places = from_torch([np.arange(n).reshape(s) for n, s in zip(sizes, SHAPES[model], strict=True)])
    found = []
    for place, array, shape in zip(places, arrays, SHAPES[model], strict=True):
        flat = np.empty(array.size, np.float32)
        flat[place.reshape(-1)] = np.asarray(array).reshape(-1)
        found.append(flat.reshape(shape))
    return found


def _run(model: str, work: Work, round_: Callable[..., Any]) -> Outcome:
    x, y = map(jnp.asarray, images(work))
    initial = [jnp.asarray(a) for a in from_torch(parameters(model, work))]

    def rounds(server: Any) -> Iterator[Any]:
        for key in jax.random.split(jax.random.key(work.seed), work.rounds):
            server = jax.block_until_ready(round_(server, x, y, jax.random.split(key, work.clients)))
            yield server

    seconds, server = timed(rounds(initial))
    return Outcome(seconds, to_torch(model, server))
