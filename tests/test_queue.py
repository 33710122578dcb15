"""What a slice of clients reads: examples in place where every minibatch is all of a client's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vfl
from algorithms.fedavg import FedAvg
from vfl.chunks import ChunkSize
from vfl.queue import Queue
from vfl.tuning import Execution


def model(clients: int | str, execution: Execution, **work: Any) -> tuple[torch.Tensor, list[float]]:
    """The model and the training losses of three rounds."""
    options: dict[str, Any] = {"chunk": 4, **work}
    data = vfl.data.federated("quadratic:dim=5,L=2,mu=1", clients=6, seed=0)
    played = list(vfl.rounds(
        FedAvg(local_lr=0.1), vfl.LinearProblem(data).task(torch.float64), data, 3, clients_per_round=clients,
        execution=execution, evaluation=vfl.Evaluation(0), **options,
    ))  # fmt: skip
    return played[-1][0].server.x, [row["train_loss"] for _, row in played]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each slice was read in place, as the run goes on."""
    seen, block = [], Queue._block

    def noted(self, starts, sizes):
        found = block(self, starts, sizes)
        seen.append(bool(found))
        if found:
            assert found[0].untyped_storage().data_ptr() == self.data.x.untyped_storage().data_ptr()
        return found

    monkeypatch.setattr(Queue, "_block", noted)
    return seen


@pytest.mark.parametrize("execution", ["loop", "vmap"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_clients_side_by_side_are_read_in_place_with_the_same_result_to_the_bit(
    execution: Execution, epochs: int, blocks: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, losses = model("all", execution, batch_size=None, local_epochs=epochs)
    assert blocks and all(blocks)
    monkeypatch.setattr(Queue, "_block", lambda *_: ())
    gathered, those = model("all", execution, batch_size=None, local_epochs=epochs)
    assert torch.equal(x, gathered) and losses == those


def test_only_whole_minibatches_are_read_in_place(blocks: list[bool]) -> None:
    model("all", "vmap", batch_size=5)
    model("all", "vmap", batch_size=None, draw="multi", local_steps=1)
    assert blocks and not any(blocks)


@pytest.mark.parametrize(("epochs", "once"), [(1, True), (2, False)])
def test_what_is_read_once_in_place_takes_the_larger_compiled_chunk(
    epochs: int, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int | None] = []
    take = ChunkSize.take

    def noted(self, alike, size=None):
        sizes.append(size)
        return take(self, alike, size)

    monkeypatch.setattr(ChunkSize, "take", noted)
    monkeypatch.setattr("vfl.executor.cache_bytes", lambda: 10_000)
    monkeypatch.setattr("vfl.programs.compile_graph", lambda graph, inputs: graph)  # the size is all that matters here
    model("all", "compile", chunk=None, batch_size=None, local_epochs=epochs)
    model_bytes, batch_bytes, threads = 5 * 8, 12 * 5 * 8, torch.get_num_threads()
    expected = 12 * max(threads // 2, 1) * 10_000 // (3 * model_bytes + batch_bytes)
    if once:
        expected = 16 * threads * 10_000 // (3 * model_bytes)
    assert set(sizes) == {expected}
