"""Layers in bfloat16: a run learns as in float32, and a compiled program computes as vmap does."""

import torch
from helpers import FEATURES, federated
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from vfl import programs

OFF = vfl.Evaluation(0)


def test_layers_in_bfloat16_learn_the_digits():
    data, losses = vfl.data.federated("digits", clients=10, seed=0), []
    module = vfl.models.model("softmax", (64,), 10)
    for compute in (None, torch.bfloat16):
        task, options = vfl.task(module, compute=compute), {"clients_per_round": 5, "execution": "vmap"}
        _, history = vfl.simulate(FedAvg(local_lr=0.1), task, data, 8, evaluation=OFF, **options)
        losses.append([row["train_loss"] for row in history])
    single, half = losses
    assert half[0] > 1.2 and half[-1] < 0.6
    assert 0 < abs(half[-1] - single[-1]) < 0.01


def test_a_traced_program_in_bfloat16_gives_the_results_of_vmap(monkeypatch):
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
    module, data = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 3)), federated([5] * 8)
    options = {"clients_per_round": 6, "batch_size": 3, "local_steps": 2, "chunk": 2, "evaluation": OFF}

    def model(execution: str, compute: torch.dtype | None) -> torch.Tensor:
        result = vfl.simulate(FedAvg(), vfl.task(module, compute=compute), data, 2, execution=execution, **options)
        assert result.history[-1]["execution"] == execution
        return result.x

    wanted = model("vmap", torch.bfloat16)
    torch.testing.assert_close(model("compile", torch.bfloat16), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model("vmap", None), wanted, rtol=1e-5, atol=1e-6)  # or nothing ran in bfloat16
