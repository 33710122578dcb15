"""pfl-research: `FederatedAveraging` on its `SimulatedBackend`, set up as in its own image-classification benchmark.

pfl evaluates its clients in the first iteration whatever the evaluation frequency, so its first round takes longer; the
rounds after it only train. It takes a client's batches in a fixed order.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.systems.torch_loop import network, tensors
from benchmarks.work import Outcome, Work, gaps, parameters


class Net(nn.Sequential):
    """The network, with the two methods that pfl asks for."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What clients minimize."""
        return functional.cross_entropy(self(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """What the evaluation of the first iteration computes."""
        with torch.no_grad():
            return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


class Clock(TrainingProcessCallback):
    """Notes when each iteration ends."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Before the first one."""
        self.moments.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """After each."""
        self.moments.append(time.perf_counter())
        return False, Metrics()


def run(model: str, work: Work) -> Outcome:
    """FedAvg; under torchrun pfl splits the clients over the processes."""
    asyncio.set_event_loop(asyncio.new_event_loop())  # pfl runs on the current loop and expects to find one
    net = Net(network(model, parameters(model, work)))
    held = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    datasets = {c: Dataset((x, y), user_id=str(c)) for c, (x, y) in enumerate(zip(*tensors(work), strict=True))}
    data = FederatedDataset(datasets.__getitem__, get_user_sampler("minimize_reuse", list(datasets)))
    clock, rounds = Clock(), work.rounds
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=rounds + 1, train_cohort_size=work.clients,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        held,
        NNTrainHyperParams(local_num_epochs=work.epochs, local_learning_rate=work.lr, local_batch_size=work.batch),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )  # fmt: skip
    return Outcome(gaps(clock.moments), [p.detach().numpy() for p in net.parameters()])
