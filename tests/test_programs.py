"""Programs of real layers: a recording holds the library's own calls for them, and gives what they give."""

import numpy as np
import pytest
import torch
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from vfl.models import model

CLIENTS, EXAMPLES = 6, 5

NETWORKS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    ),
    "dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 4)
    ),
    "attention": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), nn.Flatten(), nn.Linear(192, 4)
    ),
    "lstm": lambda: model("char_lstm", (12,), 20, (12,)),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_recording_of_layers_by_the_library_gives_the_results_of_vmap(name: str, chunk: int):
    torch.manual_seed(0)
    n = CLIENTS * EXAMPLES
    texts = name == "lstm"
    x = torch.randint(20, (n, 12)) if texts else torch.randn(n, 3, 8, 8)
    y = torch.randint(20, (n, 12)) if texts else torch.randint(4, (n,))
    clients, _ = vfl.data.from_arrays(x, y, np.repeat(np.arange(CLIENTS), EXAMPLES))
    transform = (lambda x, dtype: x) if texts else vfl.data.cast
    data = vfl.data.FederatedData("random", clients, None, None, None, 20 if texts else 4, transform)
    task = vfl.task(NETWORKS[name]())
    options = {"clients_per_round": CLIENTS, "batch_size": 2, "chunk": chunk, "evaluation": vfl.Evaluation(every=0)}
    found, wanted = (
        vfl.simulate(FedAvg(local_lr=0.05), task, data, 3, execution=execution, **options).x
        for execution in ("trace", "vmap")
    )
    assert (wanted - task.x).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
