"""What every rank of tests/test_ranks.py runs; the tests run the same scenarios on one rank as the reference."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from helpers import ALGORITHMS, SIZES, Numbers, federated, mlp, norm_and_dropout, numbers_of, state_numbers
from private_kinds import KINDS, private_kind

import vfl
from algorithms.dga import DGA
from algorithms.ditto import Ditto
from algorithms.fedavg import FedAvg
from algorithms.scaffold import Scaffold
from vfl.balance import PATIENCE
from vfl.leakage import Leakage
from vfl.learned_weights import LearnedWeights, learned
from vfl.neighbours import Neighbours
from vfl.quantization import Quantization
from vfl.rehearsal import Rehearsal, rehearsed

OFF = vfl.Evaluation(0)
WORLDS = (3, 2)  # 3 ranks are more than some cohorts hold


def owners_of(state: vfl.State) -> np.ndarray:
    """The rank that owns each client [N]; −1 where none does yet."""
    return np.array([state.store.owners.get(i, -1) for i in range(len(SIZES))])


def played(algorithm: Any, task: vfl.Task, data: Any, rounds: int, **options: Any) -> Numbers:
    """A run's numbers, and round by round the owners and this rank's largest chunk."""
    options = {"execution": "vmap"} | options  # not auto, whose choice depends on the clock
    owners, history = [], []
    state = None
    for state, metrics in vfl.rounds(algorithm, task, data, rounds, **options):
        assert metrics["execution"] == "vmap"
        owners.append(owners_of(state))
        history.append(metrics)
    return numbers_of(state, history) | {"owners": np.stack(owners), "chunks": np.array([m["chunk"] for m in history])}


def scenarios(ranks: vfl.Ranks) -> dict[str, Numbers]:
    """Every scenario's numbers, by its name."""
    found = {}
    options = {"batch_size": 4, "seed": 3, "ranks": ranks}
    for name, algorithm in ALGORITHMS.items():
        found[f"most/{name}"] = played(algorithm, mlp(), federated(), 3, clients_per_round=6, evaluation=OFF, **options)
        found[f"two/{name}"] = played(algorithm, mlp(), federated(), 3, clients_per_round=2, evaluation=OFF, **options)
    for kind in KINDS:
        algorithm = private_kind(kind, mlp())
        few = {"sampling": "poisson", "clients_per_round": 3, "evaluation": OFF}  # nobody in the fourth round
        found[f"private/{kind}"] = played(algorithm, mlp(), federated(), 4, **few, **options)
    poisson = {"sampling": "poisson", "clients_per_round": 1, "evaluation": OFF}
    found["poisson"] = played(Scaffold(), norm_and_dropout(), federated(), 8, **poisson, **options)
    evaluated = {"clients_per_round": 6, "local_steps": 2, "evaluation": vfl.Evaluation(1, 2)}
    found["evaluated"] = played(Scaffold(), norm_and_dropout(), federated(), 3, **evaluated, **options)
    own = {"clients_per_round": 3, "evaluation": vfl.Evaluation(0, 1)}  # some clients never come
    tuned = vfl.FineTuning(fine_tune_steps=2).wrap(Ditto().build(mlp(), len(SIZES)), mlp(), len(SIZES))
    found["personal"] = played(tuned, mlp(), federated(), 2, **own, **options)
    spoilt = federated()
    spoilt.clients.client(2).x[0, 0] = np.nan
    drop = {"clients_per_round": 6, "on_nonfinite": "drop", "evaluation": OFF}
    found["dropped"] = played(Scaffold(), norm_and_dropout(), spoilt, 4, **drop, **options)
    everyone = options | {"clients_per_round": "all", "evaluation": OFF}
    found["krum"] = played(Scaffold(aggregator="multi_krum:f=1,m=3"), mlp(), federated(), 3, **everyone)
    median = FedAvg(aggregator="median")
    found["median-dropped"] = played(median, mlp(), spoilt, 4, on_nonfinite="drop", **everyone)
    some = {"clients_per_round": "1..3", "evaluation": OFF, "execution": "vmap"}
    devices = vfl.Devices(device_speeds="pareto:2", client_dropout=0.3)
    for name, config, staleness in (("late", Scaffold(), "none"), ("stale", FedAvg(), "sqrt")):
        late = vfl.Delays(delay_probability=0.5, delay="uniform:3", staleness=staleness, buffer_size=2)
        found[name] = played(config, mlp(), federated(), 6, wrappers=[devices, late], **some, **options)
    plateau = vfl.Plateau(plateau_patience=1, plateau_metric="test_loss", plateau_factor=0.5, fall_back=True)
    falling = {"plateau": plateau, "clients_per_round": 6, "execution": "vmap"}
    found["plateau"] = played(Scaffold(local_lr=1.0), norm_and_dropout(), federated(), 6, **falling, **options)
    leaky = Leakage(leakage="drop", leakage_bound=0.2).wrap(FedAvg().build(mlp(), len(SIZES)), mlp(), len(SIZES))
    leaky = Quantization(quant_bits=6, quant_threshold=0.5, quant_anneal=0.8).wrap(leaky, mlp(), len(SIZES))
    leaky = rehearsed(leaky, mlp(), federated().test, Rehearsal(rehearsal_steps=2, rehearsal_batch_size=3))
    found["leaky"] = played(leaky, mlp(), federated(), 4, clients_per_round=6, evaluation=OFF, **options)
    wise = learned(DGA().build(mlp(), len(SIZES)), mlp(), federated().test, LearnedWeights(weights_reward="loss"))
    found["learned"] = played(wise, mlp(), federated(), 4, clients_per_round=6, evaluation=OFF, **options)
    found["uneven"] = uneven(ranks)
    found["diverged"] = diverged(spoilt, **options)
    found["stopped"] = stopped(ranks)
    return found


def diverged(data: Any, **options: Any) -> Numbers:
    """What the error says, and the state it leaves."""
    task = mlp()
    engine = vfl.Engine(Scaffold().build(task, len(SIZES)), task, data, clients_per_round=3, ranks=options["ranks"])
    state = engine.init(options["seed"])
    try:
        for _ in range(20):
            state, _ = engine.play(state)
    except vfl.DivergedError as error:
        return state_numbers(state) | {"round": np.array(error.round), "clients": np.array(error.clients)}
    raise AssertionError("the spoilt client was never drawn")


def stopped(ranks: vfl.Ranks) -> Numbers:
    """The rounds that were played though 9 were asked for: the last rank alone wants to stop, in round 3."""
    done = []

    def stop() -> bool:
        return ranks.rank == ranks.world - 1 and len(done) == 2

    options = {"clients_per_round": 3, "stop": stop, "ranks": ranks}
    for _, metrics in vfl.rounds(ALGORITHMS["fedavg"], mlp(), federated(), 9, **options):
        done.append(metrics["round"])
    return {"rounds": np.array(done)}


def uneven(ranks: vfl.Ranks) -> Numbers:
    """The first rank takes four times as long for its work; each rank's clients with work, round by round."""
    task, population = mlp(), len(SIZES)
    options = {"clients_per_round": "all", "execution": "vmap", "ranks": ranks}
    engine = vfl.Engine(FedAvg().build(task, population), task, federated(), **options)
    engine.executor.chunk.keep(4)  # nothing is left to find out, so every round is timed
    engine.watch.seconds = lambda: (4.0 if ranks.first else 1.0) * engine.shared[ranks.rank]
    state, mine, queued = engine.init(3), [], engine._queue
    engine._queue = lambda *arguments: mine.append(arguments[-1].shape[-1]) or queued(*arguments)
    history = []
    for _ in range(PATIENCE + 3):
        state, metrics = engine.play(state)
        history.append(metrics)
    return numbers_of(state, history) | {"own_clients": np.array(mine), "slowness": engine.pace.slowness}


def counted(ranks: vfl.Ranks) -> Numbers:
    """How many collectives 5 rounds take."""
    calls = []

    def counting(name, real):
        return lambda *args, **kw: (calls.append(name), real(*args, **kw))[1]

    with contextlib.ExitStack() as patched:
        for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
            patched.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        real = Neighbours.all_reduce
        patched.enter_context(mock.patch.object(Neighbours, "all_reduce", counting("all_reduce", real)))
        options = {"clients_per_round": 6, "evaluation": OFF, "ranks": ranks}
        vfl.simulate(Scaffold(), norm_and_dropout(), federated(), 5, **options)
    return {"calls": np.array(calls)}


def main(folder: Path, rank: int, ports: list[int]) -> None:
    """Writes this rank's numbers of each world it belongs to; processes start slowly, so each serves two worlds."""
    torch.set_num_threads(1)
    for world, port in zip(WORLDS, ports, strict=True):
        if rank >= world:
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with vfl.launched(torch.device("cpu")) as ranks:
            assert ranks[:2] == (rank, world)
            if world == 3:  # as where they lie on several machines
                ranks = ranks._replace(near=None)
            found = scenarios(ranks) | {"counted": counted(ranks)}
        flat = {f"{scenario}/{name}": value for scenario, numbers in found.items() for name, value in numbers.items()}
        np.savez(folder / f"{world}-{rank}.npz", **flat)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(port) for port in sys.argv[3:]])
