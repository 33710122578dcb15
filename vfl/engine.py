"""The round: cohort → chunks → vmap(client_update) → weighted sum → one all-reduce → server step.

Letters: D parameters, C clients in a chunk, S a cohort, N population, K local steps, B batch. Replicas, runs that
differ in their seeds alone, are one more axis R before all others.
"""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from vfl import random
from vfl.balance import Stopwatch, assign, client_work, even
from vfl.base import Algorithm, Tree, on_device, to_place, tree_map
from vfl.chunks import parse_chunk
from vfl.data.container import Examples, FederatedData
from vfl.distributed import Ranks
from vfl.draws import marks, squared_norms
from vfl.errors import DivergedError, UsageError
from vfl.execute import Problem, Shared
from vfl.executor import Executor, Round
from vfl.gather import combined
from vfl.local import Work, keep_where
from vfl.profiling import Clock
from vfl.queue import Clients, Queue
from vfl.reduce import reduce
from vfl.replicas import Replication, with_values
from vfl.samplers import Amount, Cohort, Sampler, sampler
from vfl.state import State, Totals
from vfl.store import Store, Stores
from vfl.task import Task
from vfl.tuning import Execution

log = logging.getLogger("vfl")

RoundMetrics = dict[str, Any]
"""One round's numbers by name; see `rounds`."""


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
        importance: np.ndarray | None = None,
        execution: Execution = "auto",
        chunk: int | str | None = "auto",
        client_state: Literal["device", "host"] = "device",
        on_nonfinite: Literal["stop", "drop"] = "stop",
        profile: bool = False,
        replicas: int | Replication | None = None,
        ranks: Ranks = Ranks(),
    ) -> None:
        work.check()
        self.algorithm, self.task, self.data, self.work, self.ranks = algorithm, task, data, work, ranks
        self.device, self.dtype = task.x.device, task.x.dtype
        self.sampler: Sampler = sampler(sampling, clients_per_round, data.clients.offsets)
        self.data_x, self.data_y = data.clients.x.to(self.device), data.clients.y.to(self.device)
        self.marks = self._marks(importance)
        self.place = self.device if client_state == "device" else torch.device("cpu")
        self.drop = on_nonfinite == "drop"
        self.clock = Clock(profile, self.device)
        self.replicas = Replication(replicas) if isinstance(replicas, int) else replicas
        count = None
        if self.replicas is not None:
            self._check_replicas(self.replicas)
            count = len(self.replicas.settings())
        # Where execution and chunk are given, a run is the same to the bit: then no timing moves a client.
        self.timed = ranks.world > 1 and (execution == "auto" or parse_chunk(chunk) is None)
        self.pace, self.watch = even(ranks.world), Stopwatch(self.device)
        self.shared, self.seconds = np.zeros(ranks.world), 0.0  # the last round's work by rank, and this rank's seconds
        problem = Problem(algorithm, data.transform, self.dtype, task.sizes, self.drop, count)
        kind = f"{work} {tuple(self.data_x.shape[1:])} {self.data_x.dtype} {ranks.world} {count}"
        self.executor = Executor(
            problem, execution, parse_chunk(chunk), task.x, self.place, batch_bytes=self._batch_bytes(), work=kind
        )

    def init(self, seed: int, x: Tensor | None = None) -> State:
        """The state before the first round, from the model x [D], or the task's.

        With replicas x is [R, D], or one model for all; their seeds are counted from `seed`.
        """
        buffers, x = self.task.buffers, self.task.x if x is None else x
        if self.replicas is None:
            store = self._store(x)
            return self._expecting(State(0, random.key(seed), self.algorithm.init_server(x), buffers, store, Totals()))
        settings = self.replicas.settings()
        keys = torch.stack([random.key(seed + int(setting["replica"])) for setting in settings])
        x = x.expand(len(settings), x.shape[-1]).clone()
        server = vmap(self.algorithm.init_server)(x)
        if self.replicas.grid:
            server = with_values(server, settings)
        buffers = tuple(b.expand(len(settings), *b.shape).clone() for b in buffers)
        none = [0.0] * len(settings)
        stores = Stores([self._store(start) for start in x])
        return self._expecting(State(0, keys, server, buffers, stores, Totals(none, none, none)))

    def _expecting(self, state: State) -> State:
        """The first state, with the server's memory for what clients send, which one client's work shows."""
        expect, sizes = self.algorithm.expect, self.data.clients.sizes()
        if expect is None or not sizes.any():
            return state
        alone, keys = self.replicas is None, state.key.numpy().reshape(-1, 1)
        sent = (self.algorithm.broadcast if alone else vmap(self.algorithm.broadcast))(
            state.server, state.key.to(self.device)
        )
        ids = np.full(keys.shape, np.where(sizes > 0, sizes, sizes.max()).argmin())  # the least work
        queue = self._queue(
            state, ids, self.work.counts(sizes[ids]), np.ones(ids.shape), keys, np.zeros(ids.shape, dtype=np.int64)
        )
        first = Round(0, sent.content)
        self.executor.learn_layout(queue, Shared(sent.content, self.data_x, self.data_y), first)
        like = self.executor.layout(first)
        assert like is not None
        zeros = [torch.zeros(p.shape, dtype=p.dtype, device=self.device) for p in like.payload]
        payload = pytree.tree_unflatten(zeros, like.structure)
        return state._replace(
            server=expect(state.server, payload) if alone else vmap(expect, (0, None))(state.server, payload)
        )

    def _store(self, x: Tensor) -> Store:
        store = Store(self.algorithm.init_client(x), self.place)
        if not store.empty and not self.sampler.distinct:
            raise UsageError("this algorithm keeps state on its clients, so none may be drawn twice in a round: "
                             "use --sampling uniform, poisson or fixed")  # fmt: skip
        return store

    def _check_replicas(self, replicas: Replication) -> None:
        replicas.check()
        if self.ranks.world > 1:
            raise UsageError("replicas run on one rank; give each rank seeds of its own, or leave --replicas out")
        if not self.sampler.fixed_size:
            raise UsageError("replicas need cohorts of one size: --sampling uniform, replacement, weighted or fixed")
        if (np.diff(self.data.clients.offsets) == 0).any():
            raise UsageError("replicas need every client to have examples; use fewer clients or another partition")

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
        each = vmap if self.replicas is not None else lambda function: function
        round_keys = random.fold_in(state.key.numpy().reshape(-1), state.round)  # [R]
        cohort_keys, client_keys, *others = random.fold_in(round_keys, np.arange(4)[:, None])
        server_key, sent_key = (on_device(key.reshape(state.key.shape), self.device) for key in others)
        with self.clock("sampling"):
            cohorts = self._cohorts(state.server, torch.from_numpy(cohort_keys))
        try:
            sent = each(self.algorithm.broadcast)(state.server, sent_key)
        except RuntimeError as error:
            if self.replicas is None or not any(hint in str(error) for hint in (".item()", "data-dependent")):
                raise
            raise UsageError("what this algorithm sends depends on a value of its state, so its replicas cannot be "
                             "played together; run its seeds one by one") from None  # fmt: skip
        ids = np.stack([cohort.ids for cohort in cohorts])  # [R, S], and so the host's other numbers
        counts = self.work.counts(self.data.clients.sizes(ids))
        keys = random.fold_in(client_keys[:, None], ids)
        self.executor.tuner.begin(float(counts.sum()) / self.ranks.world * max(rounds - state.round, 1))
        factor = np.stack([cohort.factor for cohort in cohorts])
        mine, owners, shared_work = self._share(state.store, ids, counts)
        queue = self._queue(state, ids, counts, factor, keys, mine)
        shared, played = Shared(sent.content, self.data_x, self.data_y), Round(state.round + 1, sent.content)
        with self.clock("clients"):
            self.watch.start()
            while queue.left:
                self.executor.run(queue, shared, played)
            self.watch.stop()
        if counts.any() and self.executor.layout(played) is None:  # more ranks than clients: learn it from another's
            longest = counts.argmax(1)[:, None]
            self.executor.learn_layout(self._queue(state, ids, counts, factor, keys, longest), shared, played)
        sums = played.sums or self.executor.no_sums(played)
        with self.clock("reduction"):
            tell = np.zeros(1 + self.ranks.world)  # whether to stop; each rank's seconds of the round before
            tell[0], tell[1 + self.ranks.rank] = stop(), self.seconds
            received = reduce(self.executor.layout(played), sums, played.reports, ids.shape[1], self.ranks, tell)
        if self.timed:
            self.pace = self.pace.after(received.told[1:], self.shared)
        self.shared = shared_work
        # On a GPU the watch can be read only now, so its seconds travel in the next round.
        self.seconds = self.watch.seconds() if self.timed and played.steady else 0.0
        finite = received.finite.reshape(ids.shape)
        bad = (counts > 0) & ~finite
        if bad.any() and not self.drop:
            raise DivergedError(state.round + 1, np.unique(ids[bad]).tolist())
        server, mean, buffers, reported = state.server, received.mean, state.buffers, {}
        like = self.executor.layout(played)
        if mean is not None and like is not None and self.algorithm.combine is not None:
            with self.clock("reduction"):
                combining = self.algorithm.combine, like, played.messages, received.finite, self.ranks, self.device
                mean = mean._replace(payload=combined(*combining))
        with self.clock("server"):
            if self.algorithm.idle is not None and (mean is None or self.replicas is not None):
                server, reported = each(self.algorithm.idle)(server, server_key)
            if mean is not None:
                stepped, reported = each(self.algorithm.server_update)(state.server, mean, server_key)
                if self.replicas is None:
                    server = stepped
                else:  # a replica without any weight has no step
                    some = (mean.weight > 0).reshape(len(ids), -1).any(1)
                    server = vmap(keep_where)(some, stepped, server)
                if buffers:
                    buffers = each(keep_where)(received.heard, received.buffers, buffers)
        host = torch.device("cpu")
        reported, down = tree_map(lambda value: to_place(value, host), (dict(reported), sent.bits))
        if not math.isfinite(server.x.sum()):  # the second and last time that a round waits for the device
            raise DivergedError(state.round + 1, [])
        with self.clock("states"):
            stores = state.store.each if isinstance(state.store, Stores) else [state.store]
            for now, clients in played.states:
                for r, store in enumerate(stores):
                    at, rows = (now, clients) if self.replicas is None else (now[r], _at(clients, r))
                    store.scatter(ids[r][at], rows, torch.from_numpy(finite[r][at]))
            stores[0].owners.update(owners)
            state.store.round = state.round + 1
        before = state.totals
        down = np.asarray(down) * ids.shape[1]
        totals = Totals(*(
            (np.asarray(total) + now).tolist()
            for total, now in zip(before, (received.bits.sum(-1), down, received.gradients.sum(-1)), strict=True)
        ))  # fmt: skip
        after = State(state.round + 1, state.key, server, buffers, state.store, totals)
        visited = np.where(received.finite, received.examples, 0).sum(-1)
        loss = np.where(received.finite, received.loss, 0).sum(-1)
        measured = {
            "train_loss": np.where(visited > 0, loss / np.maximum(visited, 1), math.nan),
            **totals._asdict(),
            "dropped": bad.sum(-1) if self.replicas is not None else bad.sum(),
            **received.extra,
            **{name: np.asarray(value) for name, value in reported.items()},
        }
        metrics: RoundMetrics = {
            "round": after.round,
            **{name: np.asarray(value).tolist() for name, value in measured.items()},
            "clients": ids.shape[1],
            "chunk": played.chunk,
            "execution": self.executor.tuner.mode(),
            "seconds": time.perf_counter() - started,
            **self.clock.read(),
            "stopping": bool(received.told[0] > 0),
        }
        return after, metrics

    def _cohorts(self, server: Any, keys: Tensor) -> list[Cohort]:
        """Each replica's clients of the round; all clients where the algorithm asks for them."""
        everyone, population = self.algorithm.everyone, self.data.clients.population
        if everyone is not None and self.replicas is None and bool(everyone(server)):
            return [Cohort(np.arange(population), np.ones(population))]
        cohorts = [self.sampler.draw(key) for key in keys]
        # Where all clients take part anyway, it makes no difference which replica asks for them.
        all_of_them = self.sampler.distinct and len(cohorts[0].ids) == population
        if everyone is not None and self.replicas is not None and not all_of_them:
            raise UsageError("this algorithm's cohorts depend on its state, so its replicas cannot be played together "
                             "but with all clients in every round; run its seeds one by one")  # fmt: skip
        return cohorts

    def _batch_bytes(self) -> int:
        """Bytes of a usual client's minibatch, as the model takes it."""
        clients = self.data.clients
        usual = np.array([max(len(clients.x) // clients.population, 1)])
        return int(self.work.batch(usual)[0] * clients.x[:1].numel() * self.dtype.itemsize)

    def _marks(self, importance: np.ndarray | None) -> Tensor | None:
        """Where draw importance, the examples' probabilities (`vfl.draws.marks`)."""
        if self.work.draw != "importance":
            if importance is not None:
                raise UsageError(f"importance is for draw importance, not for draw {self.work.draw}; leave it out")
            return None
        if importance is None:
            importance = squared_norms(self.data_x, self.data.transform)
        return marks(importance, self.data.clients.offsets).to(self.device)

    def _share(
        self, store: Store | Stores, ids: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, dict[int, int], np.ndarray]:
        """This rank's part: for each replica, positions in the cohort [R, n], most steps first.

        Also who owns which client, and the work of every rank [W].
        """
        work = client_work(counts, self.work.batch(self.data.clients.sizes(ids)))
        order = np.lexsort((-work, -counts))  # of as many steps, clients of like minibatches side by side
        if isinstance(store, Stores):
            return order, {}, work.sum(1)
        rank = assign(ids[0], work[0], store.owners, self.pace.slowness)
        owners = {} if store.empty else dict(zip(ids[0].tolist(), rank.tolist(), strict=True))
        mine = order[0][((rank == self.ranks.rank) & (counts[0] > 0))[order[0]]]
        return mine[None], owners, np.bincount(rank, work[0], minlength=self.ranks.world)

    def _queue(
        self, state: State, ids: np.ndarray, counts: np.ndarray, factor: np.ndarray, keys: np.ndarray, mine: np.ndarray
    ) -> Queue:
        """The clients at the positions `mine` [R, n] of the cohorts [R, S], to be computed in this order."""
        device, stores = self.device, state.store.each if isinstance(state.store, Stores) else [state.store]
        at = np.arange(len(ids))[:, None], mine
        ids, weights = ids[at], on_device(torch.tensor(factor[at], dtype=self.dtype), device)
        starts, sizes = self.data.clients.offsets[ids], self.data.clients.sizes(ids)
        keys, draws = keys[at], None
        if self.work.reshuffle == "once":  # no round is −1
            draws = random.fold_in(random.fold_in(state.key.numpy().reshape(-1, 1), -1), ids)
        clients = Clients(mine, ids, counts[at], starts, sizes, keys, draws, weights)
        data = Examples(self.data_x, self.data_y)
        if self.replicas is None:
            alone = Clients._make(part if part is None else part[0] for part in clients)
            return Queue(self.work, alone, state.buffers, lambda some: stores[0].gather(some, device), self.clock,
                         data, self.marks)  # fmt: skip

        def states(some: np.ndarray) -> Tree:
            each = [store.gather(row, device) for store, row in zip(stores, some, strict=True)]
            return tree_map(lambda *leaves: torch.stack(leaves), *each)

        return Queue(self.work, clients, state.buffers, states, self.clock, data, self.marks)


def _at(stacked: Tree, r: int) -> Tree:
    return tree_map(operator.itemgetter(r), stacked)
