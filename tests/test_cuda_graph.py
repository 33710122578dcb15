"""Compiled programs as CUDA graphs: the protocol around a recording, on a stand-in for CUDA that runs on the CPU.

Whether CUDA records a program is not tested by this: that needs a GPU.
"""

import contextlib
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ALGORITHMS, assert_same, federated, regression, run
from torch import Tensor

import vfl
from vfl import execute, programs
from vfl.cuda_graph import WARM_UP, Recorder, Replay, Work, recorder
from vfl.data.container import FederatedData

GPU = torch.device("cuda", 0)
OPTIONS = {"clients_per_round": 6, "batch_size": 3, "chunk": 2}


def alike() -> FederatedData:
    """Clients of one size, so that all chunks are of one shape."""
    return federated([5] * 8)


class Recordings:
    """Recordings on the CPU: a replay computes from what lies in the places, and writes to where results lie."""

    def __init__(self, spoil: Callable[[list[Tensor]], Any] = lambda results: None) -> None:
        self.spoil, self.made, self.replays = spoil, 0, 0
        self.programs: list[programs.Programs] = []

    def recorder(self) -> Recorder:
        return Recorder(lambda work: work(), self.record)

    def record(self, work: Work) -> tuple[Callable[[], Any], list[Tensor]]:
        self.made += 1
        places = [torch.full_like(result, 7) for result in work()]  # a recording computes nothing

        def replay() -> None:
            self.replays += 1
            for place, result in zip(places, work(), strict=True):
                place.copy_(result)
            self.spoil(places)

        return replay, places


@pytest.fixture
def recorded(monkeypatch):
    """A function that makes runs replay their programs by these recordings."""

    def use(recordings: Recordings) -> Recordings:
        def replayed(problem: execute.Problem, build: programs.Build, _: object) -> programs.Programs:
            recordings.programs.append(programs.Programs(problem, build, recordings.recorder))
            return recordings.programs[-1]

        monkeypatch.setattr("vfl.executor.Programs", replayed)
        monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
        return recordings

    return use


@pytest.mark.parametrize(
    "name", ["fedavg", "scaffold-option=2", "mime-base=sgd", "fedavg-aggregator=geometric_median:iterations=3"]
)
def test_replayed_programs_give_the_results_of_vmap(name, recorded):
    wanted = run(ALGORITHMS[name], regression(), alike(), 4, **OPTIONS)
    recordings = recorded(Recordings())
    assert_same(run(ALGORITHMS[name], regression(), alike(), 4, execution="compile", **OPTIONS), wanted, 1e-9)
    assert recordings.replays > 2 * recordings.made > 0  # beyond the one that checks it


def test_replayed_programs_hold_replicas_and_read_examples_in_place(recorded):
    for options in ({"replicas": 2}, {"batch_size": None}):
        data = vfl.data.federated("quadratic:dim=5,L=2,mu=1", clients=6, seed=0)
        task, options = vfl.LinearProblem(data).task(torch.float64), OPTIONS | options
        wanted = vfl.simulate(ALGORITHMS["fedavg"], task, data, 3, execution="vmap", **options)
        recordings = recorded(Recordings())
        found = vfl.simulate(ALGORITHMS["fedavg"], task, data, 3, execution="compile", **options)
        torch.testing.assert_close(found.x, wanted.x, rtol=1e-9, atol=1e-9)
        assert recordings.replays > recordings.made > 0


@pytest.mark.parametrize("fault", ["cannot be recorded", "gives other numbers"])
def test_a_program_that_cannot_be_replayed_runs_without_and_says_so_once(fault, recorded, caplog):
    def refuse(work: Work) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be …")

    recordings = recorded(Recordings(spoil=lambda results: results[0].add_(1)))
    if fault == "cannot be recorded":
        recordings.record = refuse
    algorithm, task, options = ALGORITHMS["scaffold-option=2"], regression(), OPTIONS | {"clients_per_round": "all"}
    with caplog.at_level(logging.WARNING, "vfl"):
        found = run(algorithm, task, federated((3, 3, 6)), 3, execution="compile", **options)  # in two shapes
    assert_same(found, run(algorithm, task, federated((3, 3, 6)), 3, **options), 1e-9)
    said = [r.getMessage() for r in caplog.records]
    why = "operation not permitted when stream is capturing" if fault == "cannot be recorded" else (
        "a replay gives other results than the program")  # fmt: skip
    assert said == [f"CUDA graphs fail here, so compiled programs run kernel by kernel ({why})"]


@pytest.mark.parametrize("when", ["recording", "replaying"])
def test_running_out_of_memory_halves_the_chunk_and_frees_the_recordings(when, recorded, caplog):
    full: list[bool] = []

    def fill(results: list[Tensor]) -> None:
        if not full and (when == "recording" or recordings.replays == 3):
            full.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")

    recordings = recorded(Recordings(spoil=fill))
    task, data, options = regression(), alike(), OPTIONS | {"execution": "compile"}
    with caplog.at_level(logging.WARNING, "vfl"):
        played = [*vfl.rounds(ALGORITHMS["fedavg"], task, data, 3, **options)]
    wanted = vfl.simulate(ALGORITHMS["fedavg"], task, data, 3, **OPTIONS, execution="vmap")
    torch.testing.assert_close(played[-1][0].server.x, wanted.x, rtol=1e-9, atol=1e-9)
    assert [r.getMessage() for r in caplog.records] == ["out of memory with 2 clients at once; going on with 1"]
    assert played[-1][1]["execution"] == "compile" and recordings.made == 2
    assert sum(map(len, recordings.programs)) == 1  # the recording of two clients is gone


def test_what_stays_is_read_where_it_lies_and_the_rest_is_copied_to_its_place():
    seen: list[list[Tensor]] = []

    def program(*places: Tensor) -> list[Tensor]:
        seen.append(list(places))
        return [places[0] * places[1], places[1]]

    data, x = torch.arange(3.0), torch.ones(3)
    replay = Replay(program, [data, x], [True, False], Recordings().recorder())
    first = replay(data, torch.full((3,), 2.0))
    second = replay(data, torch.full((1,), 3.0).expand(3))  # of other strides
    assert first[0].tolist() == [0, 2, 4] and first[1].tolist() == [2, 2, 2]  # not overwritten by the second
    assert second[0].tolist() == [0, 3, 6] and second[1].tolist() == [3, 3, 3]
    assert all(places[0] is data and places[1] is seen[0][1] is not x for places in seen)
    assert x.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="stay the same"):
        replay(data.clone(), x)


class Cuda:
    """The part of torch.cuda that a recording uses, which notes what it is asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = self._stream("main")

    def _stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"))

    def Stream(self, device: torch.device) -> SimpleNamespace:  # noqa: N802
        return self._stream("side")

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: object, *, pool: str, stream: SimpleNamespace, capture_error_mode: str):
        self.log.append(f"records on {stream.name} in {pool}, {capture_error_mode}")
        self.current = stream
        yield  # torch's own leaves its stream in force when it fails
        self.log.append("recorded")


def test_cuda_is_asked_in_the_documented_order():
    cuda = Cuda()
    made = recorder(GPU, cuda)

    def work() -> list[Tensor]:
        cuda.log.append(f"work on {cuda.current.name}")
        return []

    made.warm_up(work)
    replay, _ = made.record(work)
    replay()
    assert cuda.log == [
        "side waits for main", *["work on side"] * WARM_UP, "main waits for side",
        "records on side in pool, thread_local", "work on side", "recorded", "replay",
    ]  # fmt: skip
    assert cuda.current.name == "main"


def test_a_recording_that_fails_leaves_the_usual_stream_in_force():
    cuda = Cuda()

    def fails() -> list[Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(GPU, cuda).record(fails)
    assert cuda.current.name == "main"
