"""Flower: its message API's FedAvg in `run_simulation` on Ray, as in its PyTorch quickstart; one core a client.

Flower leaves local training to its users: here it is the plain PyTorch loop's.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import time
from functools import cache

import torch
from torch import nn

from benchmarks.systems.torch_loop import network, tensors, train
from benchmarks.work import Arrays, Outcome, Work, gaps, parameters, peak_memory

# Neither may call home, and both read this when they are imported.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


@cache
def _examples(work: Work) -> tuple[torch.Tensor, torch.Tensor]:  # made once a worker process
    return tensors(work)


@cache
def _network(model: str, work: Work) -> nn.Module:
    return network(model, parameters(model, work))


def run(model: str, work: Work) -> Outcome:
    """FedAvg over as many supernodes as there are clients."""
    client, server = ClientApp(), ServerApp()
    moments: list[float] = []
    result: list[Arrays] = []
    peak: list[float | None] = []

    @client.train()
    def local(message: Message, context: Context) -> Message:
        x, y = (part[context.node_config["partition-id"]] for part in _examples(work))
        net = _network(model, work)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train(net, x, y, work)
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
        return Message(content=RecordDict(content), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=work.clients, min_available_nodes=work.clients)
        initial = ArrayRecord(_network(model, work).state_dict())
        end = strategy.start(
            grid, initial, work.rounds, evaluate_fn=lambda round_, arrays: moments.append(time.perf_counter())
        )
        result.append([tensor.numpy() for tensor in end.arrays.to_torch_state_dict().values()])
        peak.append(peak_memory())  # as long as the workers live

    run_simulation(server, client, work.clients, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return Outcome(gaps(moments), result[0], peak_memory=peak[0])
