"""The round: cohort → chunks → vmap(client_update) → weighted sum → one all-reduce → server step.

Letters: D parameters, C clients in a chunk, S a cohort, N population, K local steps, B batch, P entries of a payload.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfl import random
from vfl.base import Algorithm
from vfl.chunks import parse_chunk
from vfl.data.container import FederatedData
from vfl.distributed import Ranks, assign
from vfl.errors import DivergedError, UsageError
from vfl.execute import Problem, Shared
from vfl.executor import Executor, Round
from vfl.local import Work
from vfl.profiling import Clock
from vfl.queue import Clients, Queue
from vfl.reduce import reduce
from vfl.samplers import Amount, Cohort, Sampler, sampler
from vfl.store import Store
from vfl.task import Task
from vfl.tuning import Execution

log = logging.getLogger("vfl")

RoundMetrics = dict[str, Any]
"""One round's numbers by name; see `rounds`."""


class Totals(NamedTuple):
    """Sums over all rounds so far."""

    bits_up: float = 0.0
    bits_down: float = 0.0
    gradients: float = 0.0


class State(NamedTuple):
    """Everything a run needs to go on."""

    round: int  # rounds done
    key: Tensor  # [] the run's key, on the host
    server: Any  # the algorithm's server state; its field x [D] is the model
    buffers: tuple[Tensor, ...]  # the module's buffers
    store: Store  # client states
    totals: Totals


class Engine:
    """One experiment's fixed parts, and how to play its rounds. Holds what was learnt about speed, never results."""

    def __init__(
        self,
        algorithm: Algorithm,
        task: Task,
        data: FederatedData,
        *,
        clients_per_round: Amount = 10,
        sampling: str = "uniform",
        work: Work = Work(),
        execution: Execution = "auto",
        chunk: int | str | None = "auto",
        client_state: Literal["device", "host"] = "device",
        on_nonfinite: Literal["stop", "drop"] = "stop",
        profile: bool = False,
        ranks: Ranks = Ranks(),
    ) -> None:
        work.check()
        self.algorithm, self.task, self.data, self.work, self.ranks = algorithm, task, data, work, ranks
        self.device, self.dtype = task.x.device, task.x.dtype
        self.sampler: Sampler = sampler(sampling, clients_per_round, data.clients.offsets)
        self.data_x, self.data_y = data.clients.x.to(self.device), data.clients.y.to(self.device)
        self.place = self.device if client_state == "device" else torch.device("cpu")
        self.drop = on_nonfinite == "drop"
        self.clock = Clock(profile, self.device)
        problem = Problem(algorithm, data.transform, self.dtype, task.sizes, self.drop)
        kind = f"{work} {tuple(self.data_x.shape[1:])} {self.data_x.dtype} {ranks.world}"
        self.executor = Executor(
            problem, execution, parse_chunk(chunk), task.x, self.place, batch_bytes=self._batch_bytes(), work=kind
        )

    def init(self, seed: int) -> State:
        """The state before the first round."""
        x = self.task.x
        store = Store(self.algorithm.init_client(x), self.place)
        if not store.empty and not self.sampler.distinct:
            raise UsageError("this algorithm keeps state on its clients, so none may be drawn twice in a round: "
                             "use --sampling uniform, poisson or fixed")  # fmt: skip
        return State(0, random.key(seed), self.algorithm.init_server(x), self.task.buffers, store, Totals())

    def play(
        self, state: State, rounds: int = 1, stop: Callable[[], bool] = lambda: False
    ) -> tuple[State, RoundMetrics]:
        """One round, of `rounds` in all (which says whether compiling can pay).

        `stop`, asked when this rank's clients are done, makes all ranks stop after the round, which the metric
        `stopping` then says on each of them.

        Raises DivergedError; the given state, client states included, is then as it was.
        """
        started = time.perf_counter()
        if not state.store.empty and state.store.round != state.round:
            raise UsageError(
                f"this is the state after round {state.round}, but its clients' states have moved on to round "
                f"{state.store.round}; go on from the newest state or from a checkpoint"
            )
        cohort_key, client_key, server_key, sent_key = random.split(random.fold_in(state.key, state.round), 4)
        with self.clock("sampling"):
            cohort = self.sampler.draw(cohort_key)
        sent = self.algorithm.broadcast(state.server, sent_key.to(self.device))
        keys = random.fold_in(client_key, torch.from_numpy(cohort.ids))  # [S]
        counts = self.work.counts(self.data.clients.sizes(cohort.ids))  # [S]
        self.executor.tuner.begin(float(counts.sum()) / self.ranks.world * max(rounds - state.round, 1))
        mine, owners = self._share(state.store, cohort.ids, counts)
        shared, played = Shared(sent.content, self.data_x, self.data_y), Round(state.round + 1)
        queue = self._queue(state, cohort, counts, keys, mine)
        with self.clock("clients"):
            while queue.left:
                self.executor.run(queue, shared, played)
        if counts.any() and self.executor.layout is None:  # more ranks than clients: learn it from one of the others
            self.executor.learn_layout(
                self._queue(state, cohort, counts, keys, np.array([counts.argmax()])), shared, played
            )
        sums = played.sums or self.executor.no_sums()
        with self.clock("reduction"):
            received = reduce(self.executor.layout, sums, played.reports, len(cohort.ids), self.ranks, stop())
        bad = (counts > 0) & ~received.finite
        if bad.any() and not self.drop:
            raise DivergedError(state.round + 1, np.unique(cohort.ids[bad]).tolist())
        server, reported = state.server, {}
        if received.mean is not None:
            with self.clock("server"):
                server, reported = self.algorithm.server_update(server, received.mean, server_key.to(self.device))
            if not bool(torch.isfinite(server.x.sum())):
                raise DivergedError(state.round + 1, [])
        with self.clock("states"):
            for now, clients in played.states:
                state.store.scatter(cohort.ids[now], clients, torch.from_numpy(received.finite[now]))
        state.store.owners.update(owners)
        state.store.round = state.round + 1
        good, before = received.finite, state.totals
        totals = Totals(
            before.bits_up + float(received.bits.sum()),
            before.bits_down + float(sent.bits) * len(cohort.ids),
            before.gradients + float(received.gradients.sum()),
        )
        after = State(state.round + 1, state.key, server, received.buffers or state.buffers, state.store, totals)
        visited = float(received.examples[good].sum())
        metrics: RoundMetrics = {
            "round": after.round,
            "train_loss": float(received.loss[good].sum()) / visited if visited else math.nan,
            **totals._asdict(),
            "clients": len(cohort.ids),
            "dropped": int(bad.sum()),
            **received.extra,
            **{name: float(value) for name, value in reported.items()},
            "chunk": played.chunk,
            "execution": self.executor.tuner.mode(),
            "seconds": time.perf_counter() - started,
            **self.clock.read(),
            "stopping": received.stopping,
        }
        return after, metrics

    def _batch_bytes(self) -> int:
        """Bytes of a usual client's minibatch, as the model takes it."""
        clients = self.data.clients
        examples = self.work.batch_size or max(len(clients.x) // clients.population, 1)
        return int(examples * clients.x[:1].numel() * self.dtype.itemsize)

    def _share(self, store: Store, ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """This rank's positions in the cohort, most steps first, and who owns the clients' states from now on."""
        rank = assign(ids, counts, store.owners, self.ranks.world)
        mine = np.flatnonzero((rank == self.ranks.rank) & (counts > 0))
        owners = {} if store.empty else dict(zip(ids.tolist(), rank.tolist(), strict=True))
        return mine[np.argsort(-counts[mine], kind="stable")], owners

    def _queue(self, state: State, cohort: Cohort, counts: np.ndarray, keys: Tensor, mine: np.ndarray) -> Queue:
        """The clients at the positions `mine` of the cohort, to be computed in this order."""
        ids, device = cohort.ids[mine], self.device
        factor = torch.tensor(cohort.factor[mine], dtype=self.dtype, device=device)
        starts, sizes = self.data.clients.offsets[ids], self.data.clients.sizes(ids)
        clients = Clients(mine, ids, counts[mine], starts, sizes, keys[mine].to(device), factor)
        return Queue(self.work, clients, state.buffers, lambda some: state.store.gather(some, device), self.clock)
