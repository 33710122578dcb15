"""What the engine's tests share: small float64 data and models, the table of algorithms, and runs as plain arrays."""

import importlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vfl
from vfl.data.container import Examples, FederatedData, Packed, cast

ROOT = Path(__file__).parent.parent
SIZES = (7, 0, 12, 3, 5, 1, 9, 4)  # examples of each client: unequal, one client without any
EMPTY = 1  # that client
N = len(SIZES)
FEATURES, CLASSES = 5, 3
PARTIAL = {"clients_per_round": 6, "batch_size": 4, "seed": 3}  # in 3 rounds, the empty client comes and others do not
PUBLIC = "synthetic:features=5"  # fits the inputs here

OPTIONS: dict[str, list[dict[str, Any]]] = {  # what is tested where the defaults alone would test too little
    "fedavg": [{}, {"aggregator": "geometric_median:iterations=3"}],
    "fedprox": [{"mu": 0.5}],
    "scaffold": [{"option": 1}, {"option": 2}],
    "fednova": [{}, {"local_optimizer": "sgd:momentum=0.8"}, {"mu": 0.5, "tau_eff": "steps"}],
    "mime": [{"base": "sgd"}, {"base": "adam", "local_lr": 0.01}],
    "fedexp": [{"eps": 0.01}],  # at 1e-3 the method itself makes 1e-5 of a rounding error in 50 rounds
    "scaffnew": [{"p": 0.5}],  # in 3 rounds of seed 3, two communicate
    "gradskip": [{"p": 0.5, "q": 0.5}],  # and some clients rest
    "qfedavg": [{}, {"q": 0.5, "lipschitz": 4.0}],
    "dga": [{}, {"statistic": "variance", "beta": 20.0}],
    "fedper": [{"personal": "*bias"}],  # what every module of these tests has
    "fedrep": [{"personal": "*bias", "head_passes": 2}],
    "fedbn": [{"personal": "*bias"}],
    "lgfedavg": [{"personal": "*,!*bias"}],
    "ditto": [{"lam": 0.5}],
    "apfl": [{"alpha": 0.3, "alpha_lr": 0.02}],
    "feddf": [
        {"public": PUBLIC, "distill_optimizer": "sgd", "distill_lr": 0.5, "distill_steps": 3},
        # Not adam, which makes whole steps of what rounding leaves where gradients are 0.
        {"public": PUBLIC, "sends": "logits", "distill_optimizer": "sgd", "distill_lr": 0.5},
    ],
    "fedlabels": [{"labelled": 0.4, "threshold": 0.5, "consistency": 0.5, "l2": 0.1}],
    "mimelite": [{"base": "sgd"}, {"base": "rmsprop", "local_lr": 0.01}],
}


def algorithms() -> dict[str, Any]:
    """Every algorithm of the project's entry points, by name and options."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for name, target in project["entry-points"]["vfl.algorithms"].items():
        module, _, config = target.partition(":")
        for options in OPTIONS.get(name, [{}]):
            label = "-".join([name, *(f"{key}={value}" for key, value in options.items())])
            found[label] = getattr(importlib.import_module(module), config)(**options)
    return found


ALGORITHMS = algorithms()
SAMPLED = {name: config for name, config in ALGORITHMS.items() if not getattr(config, "asks_everyone", False)}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())
every_sampled_algorithm = pytest.mark.parametrize("algorithm", SAMPLED.values(), ids=SAMPLED.keys())  # always a sample


def packed(x: Tensor, y: Tensor, sizes: Sequence[int], test: Examples | None = None) -> FederatedData:
    """The rows of x and y, dealt in order to clients of these sizes."""
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return FederatedData("small", Packed(x, y, offsets), test, None, None, CLASSES, cast)


def federated(sizes: Sequence[int] = SIZES) -> FederatedData:
    """A classification problem in which every client has a centre of its own."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((sum(sizes), FEATURES)) + np.repeat(draw.standard_normal((len(sizes), 1)), sizes, axis=0)
    test = Examples(torch.from_numpy(draw.standard_normal((6, FEATURES))), torch.arange(6) % CLASSES)
    return packed(torch.from_numpy(x), torch.from_numpy(draw.integers(CLASSES, size=sum(sizes))), sizes, test)


def make_task(module: nn.Module, loss: Any = vfl.cross_entropy, device: str = "cpu") -> vfl.Task:
    """The module as a float64 task, its parameters the same in every process."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return vfl.task(module, loss, dtype=torch.float64, device=device)


def mlp(device: str = "cpu") -> vfl.Task:
    """A small network."""
    return make_task(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)), device=device)


def regression() -> vfl.Task:
    """Softmax regression, whose gradient is a few lines of numpy."""
    return make_task(nn.Linear(FEATURES, CLASSES))


def norm_and_dropout() -> vfl.Task:
    """A network with buffers and with random numbers of its own."""
    layers = (nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, CLASSES))
    return make_task(nn.Sequential(*layers))


def round_keys(seed: int, t: int) -> Tensor:
    """The engine's keys of round t (from 0) [4]: of the cohort, the clients, the server's step, the broadcast."""
    return vfl.random.split(vfl.random.fold_in(vfl.random.key(seed), t), 4)


Numbers = dict[str, np.ndarray]


def state_numbers(state: vfl.State) -> Numbers:
    """Every array in a run's state, by name (copies)."""
    ids, rows = state.store.rows()
    numbers = {f"server.{name}": leaf for name, leaf in vfl.named_leaves(state.server).items()}
    numbers |= {f"buffer.{n}": leaf for n, leaf in enumerate(state.buffers)}
    numbers |= {f"client.{n}": leaf for n, leaf in enumerate(rows)}
    return {name: leaf.cpu().numpy().copy() for name, leaf in numbers.items()} | {"client.ids": ids}


def numbers_of(state: vfl.State, history: list[dict[str, Any]]) -> Numbers:
    """A run's state, and its metrics as series over the rounds but for those that describe the machine.

    A round's own bits are left out too: they are the differences of the bits so far.
    """
    left_out = {"seconds", "chunk", "execution", "memory", "round_bits_up", "round_bits_down", "client_bits_up",
                "client_bits_down"}  # fmt: skip
    names = {name for metrics in history for name in metrics} - left_out
    series = {f"metric.{name}": np.array([m.get(name, np.nan) for m in history]) for name in sorted(names)}
    return state_numbers(state) | series


def run(algorithm: Any, task: vfl.Task, data: FederatedData, rounds: int, **options: Any) -> Numbers:
    """A run's numbers. A fallback to the loop would compare the loop with itself, so it fails here."""
    options = {"execution": "vmap"} | options  # not auto, whose choice depends on the clock
    state, history = vfl.simulate(algorithm, task, data, rounds, **options)
    assert {m["execution"] for m in history} == {options["execution"]}
    return numbers_of(state, history)


def assert_same(found: Numbers, wanted: Numbers, tolerance: float, what: object = "") -> None:
    """Both hold the same names, with values equal up to the tolerance, relative or absolute (0: bit by bit)."""
    assert found.keys() == wanted.keys(), what
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=f"{what} {name}")


class Calls(TorchDispatchMode):
    """The names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
