"""The round: cohort → chunks → vmap(client_update) → weighted sum → one all-reduce → server step.

Letters: D parameters, C clients in a chunk, S a cohort, N population, K local steps, B batch, P entries of a payload.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfl import random
from vfl.base import Algorithm, Tree, tree_map
from vfl.chunks import ChunkSize, out_of_memory, parse_chunk
from vfl.data.container import FederatedData
from vfl.distributed import Ranks, assign
from vfl.errors import DivergedError, UsageError
from vfl.execute import Bounds, Compiler, Inputs, Problem, Shared, by_loop, by_vmap, chunk_signature
from vfl.local import Work, minibatches
from vfl.reduce import Chunk, CohortSum, chunk_results
from vfl.samplers import Amount, Cohort, Sampler, sampler
from vfl.store import Store
from vfl.task import Task
from vfl.tuning import Execution, Mode, Tuner

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
        ranks: Ranks = Ranks(),
    ) -> None:
        work.check()
        self.algorithm, self.task, self.data, self.work, self.ranks = algorithm, task, data, work, ranks
        self.device, self.dtype = task.x.device, task.x.dtype
        self.sampler: Sampler = sampler(sampling, clients_per_round, data.clients.offsets)
        self.data_x, self.data_y = data.clients.x.to(self.device), data.clients.y.to(self.device)
        self.offsets, self.transform = data.clients.offsets, data.transform
        self.problem = Problem(algorithm, self.transform, self.dtype)
        self.compiler = Compiler(self.problem)
        self.place = self.device if client_state == "device" else torch.device("cpu")
        self.drop = on_nonfinite == "drop"
        # A chunk holds, for each client, at least the model, its gradient, the message and their temporaries.
        self.chunk = ChunkSize(parse_chunk(chunk), 8 * task.x.numel() * task.x.element_size(), self.device)
        self.tuner = Tuner(execution, self.chunk)
        self._vmap_works = False

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
        cohort = self.sampler.draw(cohort_key)
        sent = self.algorithm.broadcast(state.server, sent_key.to(self.device))
        keys = random.fold_in(client_key, torch.from_numpy(cohort.ids))  # [S]
        counts = self.work.counts(self.data.clients.sizes(cohort.ids))  # [S]
        self.tuner.steps_to_come = float(counts.sum()) / self.ranks.world * max(rounds - state.round, 1)
        mine, owners = self._share(state.store, cohort.ids, counts)
        total = CohortSum(len(cohort.ids), self.dtype, self.device)
        pending: list[tuple[np.ndarray, Chunk]] = []
        while len(mine):
            now, chunk = self._next_chunk(mine, counts, state, sent.content, cohort, keys)
            total.add(now, chunk, self.drop)
            pending.append((now, chunk._replace(payload=[], clients=self.place_states(chunk.clients))))
            mine = mine[len(now) :]
        if counts.any() and not pending:  # more ranks than clients: learn the layout from one, and add nothing
            ghost = np.array([counts.argmax()])
            total.shape_like(self._run(self.tuner.mode(), ghost, state, sent.content, cohort, keys)[0])
        received = total.reduce(self.ranks, stop())
        bad = (counts > 0) & ~received.finite
        if bad.any() and not self.drop:
            raise DivergedError(state.round + 1, np.unique(cohort.ids[bad]).tolist())
        server, reported = state.server, {}
        if received.mean is not None:
            server, reported = self.algorithm.server_update(server, received.mean, server_key.to(self.device))
            if not bool(torch.isfinite(server.x.sum())):
                raise DivergedError(state.round + 1, [])
        for now, chunk in pending:
            state.store.scatter(cohort.ids[now], chunk.clients, chunk.finite)
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
            "chunk": max((len(now) for now, _ in pending), default=0),
            "execution": self.tuner.mode(),
            "seconds": time.perf_counter() - started,
            "stopping": received.stopping,
        }
        return after, metrics

    def place_states(self, clients: Tree) -> Tree:
        """New client states, moved to where the store keeps them."""
        return tree_map(lambda leaf: leaf.to(self.place), clients)

    def _share(self, store: Store, ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """This rank's positions in the cohort, most steps first, and who owns the clients' states from now on."""
        rank = assign(ids, counts, store.owners, self.ranks.world)
        mine = np.flatnonzero((rank == self.ranks.rank) & (counts > 0))
        owners = {} if store.empty else dict(zip(ids.tolist(), rank.tolist(), strict=True))
        return mine[np.argsort(-counts[mine], kind="stable")], owners

    def _next_chunk(
        self, mine: np.ndarray, counts: np.ndarray, state: State, sent: Tree, cohort: Cohort, keys: Tensor
    ) -> tuple[np.ndarray, Chunk]:
        """Runs the next of these clients, fewer if memory runs out; which they were, and what they returned."""
        while True:
            mode = self.tuner.mode()
            now = mine[: 1 if mode == "loop" else self.chunk.take(counts[mine])]
            before, started = self.chunk.memory.used() if not self.chunk.settled else None, time.perf_counter()
            try:
                result, ran, signature = self._run(mode, now, state, sent, cohort, keys)
            except Exception as error:
                if not out_of_memory(error) or not self.chunk.halve(len(now)):
                    raise
                continue
            if self.tuner.learning:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                steps, seconds = counts[now], time.perf_counter() - started
                self.tuner.report(ran, signature, int(steps.sum()), int(steps[0]), seconds)
                if ran != "loop":
                    self.chunk.report(len(now), int(steps.sum()), seconds, before)
            return now, result

    def _run(
        self, mode: Mode, now: np.ndarray, state: State, sent: Tree, cohort: Cohort, keys: Tensor
    ) -> tuple[Chunk, Mode, Hashable]:
        """The clients at these positions of the cohort [C]: what they returned, how they were run, their shape."""
        ids = cohort.ids[now]
        starts, sizes = self.offsets[ids], self.data.clients.sizes(ids)
        mapped = keys[now].to(self.device)
        plan = minibatches(self.work, random.fold_in(mapped, 0), starts, sizes)
        bounds = Bounds(plan.shortest, int(sizes.max()))
        shared = Shared(sent, self.data_x, self.data_y)
        on_device = {"dtype": torch.int64, "device": self.device}
        inputs = Inputs(
            state.store.gather(ids, self.device), plan.rows, plan.mask, plan.steps,
            torch.tensor(starts, **on_device), torch.tensor(sizes, **on_device), mapped,
            torch.tensor(cohort.factor[now], dtype=self.dtype, device=self.device),
            tuple(b.expand(len(ids), *b.shape) for b in state.buffers),
        )  # fmt: skip
        signature = chunk_signature(bounds, shared, inputs)
        one_by_one = functools.partial(by_loop, self.problem, bounds, shared, inputs, ids, state.round + 1)
        if mode == "loop":
            return chunk_results(*one_by_one()), "loop", signature
        if mode == "compile" and not self.tuner.wants(signature):
            mode = "vmap"
        if mode == "compile":
            try:
                return chunk_results(*self.compiler.run(signature, bounds, shared, inputs)), mode, signature
            except Exception as error:
                if out_of_memory(error):
                    raise
                mode = "vmap"
                self.tuner.give_up("compile")
                log.warning("compiling failed, so the run goes on without (%s)", str(error).strip().splitlines()[0])
        try:
            result = by_vmap(self.problem, bounds, shared, inputs)
            self._vmap_works = True
        except Exception as error:
            if out_of_memory(error):
                raise
            result = one_by_one()  # names the client if it fails there too
            if self._vmap_works:
                raise
            mode = "loop"
            self.tuner.give_up("vmap")
            log.warning("this model or algorithm cannot run under vmap, so clients run one by one from here on (%s)",
                        str(error).strip().splitlines()[0])  # fmt: skip
        return chunk_results(*result), mode, signature
