"""Several ranks (real processes over gloo) give what one rank gives. Every scenario lies in tests/rank_worker.py."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ALGORITHMS, ROOT, SIZES, Numbers, assert_same
from private_kinds import KINDS
from rank_worker import WORLDS, scenarios

import vfl
from vfl.balance import PATIENCE

WORKER = Path(__file__).parent / "rank_worker.py"
SECONDS = 300  # after which a launch counts as hung
PER_RANK = ("owners", "chunks", "own_clients", "slowness")  # numbers that are not meant to agree


def start(folder: Path) -> list[subprocess.Popen]:
    """A process for each rank of the largest world, each writing what it says to a file."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in WORLDS]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [str(probe.getsockname()[1]) for probe in probes]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name need not resolve
    processes = []
    for rank in range(max(WORLDS)):
        command = [sys.executable, "-W", "error", str(WORKER), str(folder), str(rank), *ports]
        with (folder / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> dict[int, list[dict[str, Numbers]]]:
    """Each world's ranks' numbers by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = start(folder)
    deadline = time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)
        codes = [process.poll() for process in processes]  # None: hung
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, code in enumerate(codes):
        said = (folder / f"{rank}.log").read_text()
        assert code == 0, f"rank {rank} ended with {code} (None: killed after {SECONDS} s):\n{said}"
    return {world: [load(folder / f"{world}-{rank}.npz") for rank in range(world)] for world in WORLDS}


def load(path: Path) -> dict[str, Numbers]:
    """A rank's numbers by scenario."""
    found: dict[str, Numbers] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            scenario, _, name = key.rpartition("/")
            found.setdefault(scenario, {})[name] = file[key]
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Numbers]:
    """The same scenarios on one rank."""
    return scenarios(vfl.Ranks())


def united(ranks: list[Numbers]) -> Numbers:
    """The numbers of all ranks as one: what they share must be the same to the bit; their client rows are joined."""
    whole = dict(ranks[0])
    rows = [name for name in whole if name.startswith("client.")]
    for other in ranks[1:]:
        shared = {name: value for name, value in whole.items() if name not in (*rows, *PER_RANK)}
        assert_same({name: other[name] for name in shared}, shared, 0, "ranks disagree")
    order = np.argsort(np.concatenate([rank["client.ids"] for rank in ranks])) if rows else None
    return whole | {name: np.concatenate([rank[name] for rank in ranks])[order] for name in rows}


SCENARIOS = [*(f"{cohort}/{name}" for cohort in ("most", "two") for name in ALGORITHMS),
             *(f"private/{kind}" for kind in KINDS),
             "poisson", "evaluated", "dropped", "krum", "median-dropped", "late", "stale", "plateau", "personal",
             "leaky", "learned", "uneven", "diverged", "stopped"]  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_several_ranks_equal_one(launches, alone, scenario, world):
    found = united([rank[scenario] for rank in launches[world]])
    assert_same(*({k: v for k, v in run.items() if k not in PER_RANK} for run in (found, alone[scenario])), 1e-9)


def test_the_scenarios_hold_what_they_are_meant_to(launches, alone):
    assert 0 in alone["poisson"]["metric.clients"]
    assert alone["poisson"]["metric.clients"].any()
    assert (alone["private/central"]["metric.clients"] == [2, 3, 3, 0]).all(), "one of the two has no data"
    assert (alone["two/fedavg"]["metric.clients"] == 2).all()
    assert 0 in np.concatenate([rank["two/fedavg"]["chunks"] for rank in launches[3]]), "a rank without a client"
    assert set(alone["dropped"]["metric.dropped"]) == {0, 1}
    assert "metric.test_loss" in alone["evaluated"] and "metric.client_train_loss_mean" in alone["evaluated"]
    assert alone["late"]["metric.pending"].any() and alone["late"]["metric.unanswered"].any()
    assert "metric.personal_train_loss_mean" in alone["personal"]
    assert 0 < alone["leaky"]["metric.leaking"].max() < 6
    assert len(set(alone["plateau"]["metric.local_lr"])) > 2
    assert alone["diverged"]["round"] > 1
    assert alone["diverged"]["clients"].tolist() == [2]


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_does_some_of_the_work(launches, world):
    assert all(rank["most/fedavg"]["chunks"].all() for rank in launches[world])


@pytest.mark.parametrize("world", WORLDS)
def test_a_slower_rank_gets_fewer_clients_once_its_seconds_are_known(launches, world):
    ranks = [rank["uneven"] for rank in launches[world]]
    for rank in ranks:
        np.testing.assert_allclose(rank["slowness"], [4.0] + [1.0] * (world - 1))
    clients = np.stack([rank["own_clients"] for rank in ranks], axis=1)  # [rounds, W]
    assert (clients.sum(1) == sum(size > 0 for size in SIZES)).all()
    # By steps alone at first: a round's seconds come with the next one.
    first, then = clients[: PATIENCE + 1], clients[PATIENCE + 1 :]
    assert (first == first[0]).all() and (then == then[0]).all()
    assert first[0].max() - first[0].min() <= 1
    assert then[0][0] < first[0][0] and then[0][0] < then[0][1:].min()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if "scaffold" in s] + ["poisson", "dropped"])
def test_a_client_with_state_stays_with_its_rank(launches, scenario, world):
    ranks = [rank[scenario] for rank in launches[world]]
    owners = ranks[0]["owners"]  # [rounds, N]
    for other in ranks[1:]:
        np.testing.assert_array_equal(other["owners"], owners)
    for before, after in itertools.pairwise(owners):
        np.testing.assert_array_equal(after[before >= 0], before[before >= 0])
    for rank, numbers in enumerate(ranks):
        assert (owners[-1][numbers["client.ids"]] == rank).all()


@pytest.mark.parametrize("world", WORLDS)
def test_clients_with_state_are_spread_over_the_ranks(launches, world):
    owned = [len(rank["most/scaffold-option=2"]["client.ids"]) for rank in launches[world]]
    assert min(owned) >= 1
    assert sum(owned) == sum(size > 0 for size in SIZES)


@pytest.mark.parametrize("world", WORLDS)
def test_a_round_takes_exactly_one_collective(launches, world):
    for rank in launches[world]:
        assert rank["counted"]["calls"].tolist() == ["all_reduce"] * 5


@pytest.mark.parametrize("world", WORLDS)
def test_stop_on_one_rank_stops_all_after_the_same_round(launches, world):
    for rank in launches[world]:
        assert rank["stopped"]["rounds"].tolist() == [1, 2, 3]
