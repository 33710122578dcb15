"""Recorded operators give what the function would for other inputs, and what they cannot give is refused."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vfl.recording import record


def function(x: Tensor, y: Tensor) -> list[Tensor]:
    """Views, changes in place through another name, several results of one operator, and a number of its own."""
    top, rest = x.split([2, 4])
    made = torch.zeros(2)
    part = made[:1]
    made.add_(top)
    values, places = (part + rest).sort()
    return [values * torch.tensor(3.0), places, made, x, torch.ones(2), y.mul_(0) + 1]


def test_a_recording_gives_the_functions_results_for_any_values():
    graph, results = record(function, [torch.randn(6), torch.zeros(1)])
    for seed in range(3):
        x = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        for found, wanted in zip(graph(x, torch.ones(1)), function(x, torch.ones(1)), strict=True):
            assert torch.equal(found, wanted)
    assert [each.shape for each in results] == [(4,), (4,), (2,), (6,), (2,), (1,)]
    forms = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert all(form.is_meta for form in forms) and len(forms) > 10


def test_gradients_under_vmap_are_recorded_as_what_they_compute():
    def gradients(w: Tensor, x: Tensor) -> list[Tensor]:
        return [torch.func.vmap(torch.func.grad(lambda w, x: (w @ x).tanh().sum()), (None, 0))(w, x)]

    w, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    graph, _ = record(gradients, [w, x])
    w, x = torch.randn_like(w), torch.randn_like(x)
    torch.testing.assert_close(graph(w, x), gradients(w, x), rtol=1e-12, atol=1e-12)


def test_what_depends_on_a_value_is_refused():
    with pytest.raises(RuntimeError, match="depends on a value"):
        record(lambda x: [x if x.sum() > 0 else -x], [torch.ones(2)])


def test_a_short_run_does_not_load_the_compiler():
    """Which takes longer than the run."""
    code = """
import sys
import torch
import vfl
from algorithms.fedavg import FedAvg
data = vfl.data.federated("digits", clients=4)
task = vfl.task(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
for execution in ("auto", "trace"):
    vfl.simulate(FedAvg(), task, data, 3, clients_per_round=4, execution=execution, chunk=2)
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
