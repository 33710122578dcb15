"""The chunks of a round, each computed in the fastest way known."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfl import choices
from vfl.base import Tree, structure, to_place, tree_map
from vfl.chunks import ChunkSize, cache_bytes, out_of_memory
from vfl.cuda_graph import recorder
from vfl.errors import first_line
from vfl.execute import Added, Problem, Shared, add_all, by_loop, by_vmap, kept
from vfl.heap import keep_freed_memory
from vfl.operators import Operators
from vfl.programs import Programs, compiled, trace
from vfl.queue import Queue, Slice
from vfl.reduce import Layout, Results, Sums, layout, zeros
from vfl.tuning import PROGRAMS, Execution, Mode, Tuner

log = logging.getLogger("vfl")

# So many times a core's second-level cache may a program's chunk take: what its calls cost weighs more than the way to
# the third level, whose rows come in order; and more still where nothing is read twice. Of a compiled one, so many for
# each thread, or for two where rows are read again: its calls cost less.
AGAIN, ONCE = {"trace": 32, "compile": 12}, {"trace": 32, "compile": 16}

OWN_NOISE = "it draws random numbers that no client's key decides; nn.Dropout, unlike F.dropout, draws them by the key"


class Round:
    """What the chunks of a round have left so far on this rank."""

    def __init__(self, number: int, sent: Tree) -> None:
        self.number = number  # of the round, from 1
        self.kind = structure(sent)  # what is asked of the clients, and so what they answer, may alternate
        self.sums: Sums | None = None
        self.reports: list[tuple[np.ndarray, Tensor]] = []  # positions in the cohort [C], their reports [C, ...]
        self.states: list[tuple[np.ndarray, Tree]] = []  # positions, new client states [C, ...]
        self.messages: list[tuple[np.ndarray, Tree]] = []  # positions, payloads and weights where they are combined
        self.chunk = 0  # the largest
        self.tried = False  # in a trial, some had no program, so those left split into chunks of other sizes
        self.steady = True  # nothing was tried or compiled, so that its seconds say what such a round takes


class Executor:
    """Runs chunks, and learns what is fastest: vmap, a compiled program or a loop, and how many clients at once."""

    def __init__(
        self,
        problem: Problem,
        execution: Execution,
        chunk: int | None,
        x: Tensor,
        place: torch.device,
        *,
        batch_bytes: int,
        work: str,
    ) -> None:
        if x.device.type == "cpu":
            keep_freed_memory()
        model_bytes = x.numel() * x.element_size() * (problem.replicas or 1)
        self.problem, self.device, self.place = problem, x.device, place
        self.sum_dtype = torch.promote_types(problem.dtype, torch.float32)
        # A chunk holds, for each client, at least the model, its gradient, the message and their temporaries.
        self.chunk = ChunkSize(chunk, 8 * model_bytes, self.device)
        many = torch.get_num_threads() if self.device.type == "cpu" else 1
        self.tuner = Tuner(execution, self.chunk, self._name(work) if chunk is None else None, many)
        graphs = functools.partial(recorder, self.device) if self.device.type == "cuda" else None
        self.programs = {"trace": Programs(problem, trace, graphs), "compile": Programs(problem, compiled, graphs)}
        self._layouts: dict[Any, Layout] = {}  # by the round's kind
        self._vmapped: set[Any] = set()  # the kinds of rounds that vmap has computed
        self._clock = choices.clock(self.device)
        self._compile_clock = processor_seconds if self._clock is time.thread_time else self._clock
        self._finding = chunk is None and self.device.type == "cpu"
        # Clients in a program's chunk, by its kind and whether they read their examples once; else as many as vmap's.
        self._most: dict[tuple[Mode, bool], int] = {}
        for mode in PROGRAMS:
            if chunk is not None:
                self._most |= {(mode, False): chunk, (mode, True): chunk}
            elif self._finding:
                # What a step reads and writes should stay near: model, gradient, new model and a minibatch.
                again, once = (max(many // 2, 1), many) if mode == "compile" else (1, 1)
                self._most[mode, False] = max(again * AGAIN[mode] * cache_bytes() // (3 * model_bytes + batch_bytes), 1)
                self._most[mode, True] = max(once * ONCE[mode] * cache_bytes() // (3 * model_bytes), 1)

    def run(self, queue: Queue, shared: Shared, round: Round) -> None:
        """Computes the queue's next clients, fewer if memory runs out."""
        while True:
            mode, alone, now = self._next(queue, round)
            growing = mode == "vmap" and not self.chunk.settled
            learning = growing or self.tuner.learning
            round.steady &= not learning
            round.tried |= self.tuner.learning and self.tuner.mode() not in PROGRAMS
            before, started = self.chunk.memory.used() if growing else None, self._clock()
            try:
                with threads(1 if alone else torch.get_num_threads()):
                    if mode in self.programs:
                        added = self._by_program(mode, now, shared, round)
                    else:
                        mode, added = self._run(mode, now, shared, round)
            except Exception as error:
                if out_of_memory(error):
                    for programs in self.programs.values():
                        programs.forget()
                if not out_of_memory(error) or not self.chunk.halve(now.chunk):
                    raise
                self._most = {case: min(most, self.chunk.size) for case, most in self._most.items()}
                round.steady = False
                continue
            if added is None:
                continue  # without a program
            queue.advance(now.clients)
            self._keep(now, added, round)
            if learning:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                steps, seconds = now.counts, self._clock() - started
                self.tuner.met(now.signature)
                warm = growing and self.chunk.warm
                if mode == "vmap":
                    self.chunk.report(now.clients, int(steps.sum()), seconds, before)
                if not growing or now.clients == self.chunk.size:
                    timed = int(steps.sum()), int(steps.max()), seconds
                    self.tuner.report(mode, now.signature, *timed, warm=warm)
            return

    def learn_layout(self, queue: Queue, shared: Shared, round: Round) -> None:
        """Learns from the next client what results look like, and adds nothing."""
        self._eager("vmap", queue.peek(1), shared, round)

    def _name(self, work: str) -> str:
        """What timings are good for: this algorithm on such a model, such work and this device."""
        update = self.problem.algorithm.client_update
        parts = (getattr(update, "__module__", ""), self.problem.sizes, self.problem.dtype, work,
                 choices.machine(self.device), torch.get_float32_matmul_precision())  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def layout(self, round: Round) -> Layout | None:
        """What the clients' results look like in such a round; None before the first."""
        return self._layouts.get(round.kind)

    def no_sums(self, round: Round) -> Sums:
        """The sums over no client at all."""
        known = self.layout(round)
        sizes = known.sizes if known else []
        return zeros(sizes, self.sum_dtype, self.device, self.problem.replicas)

    def _keep(self, now: Slice, added: list[Added], round: Round) -> None:
        round.sums = added[-1].sums
        for i, chunk in enumerate(added):
            of = now.now[..., i * now.chunk : (i + 1) * now.chunk]
            round.reports.append((of, chunk.report))
            round.states.append((of, _to(chunk.clients, self.place)))
            if chunk.messages:
                round.messages.append((of, _to(chunk.messages, self.place)))
        round.chunk = max(round.chunk, now.chunk)

    def _next(self, queue: Queue, round: Round) -> tuple[Mode, bool, Slice]:
        """How to compute the next clients, whether by one thread, and who they are."""
        *programs, (mode, alone) = self.tuner.ways()
        for kind, single in programs if not round.tried else ():
            # A lone client's layers are the library's own, which pays where more clients bring nothing.
            most = 1 if self._finding and self.tuner.heavy else self._most.get((kind, queue.once))
            clients = self.chunk.take(queue.alike, most)
            now, repeats = queue.peek(clients), queue.repeats(clients)
            sized = self.chunk.settled or bool(self._most)
            if not sized or round.kind not in self._vmapped or self.tuner.counting:
                return "vmap", single, now  # which also shows that nothing depends on a value
            self.tuner.met(now.signature, repeats)
            if self.tuner.wants(kind, now.signature, int(now.counts.max()), _share(queue, now)):
                many = queue.peek(clients, repeats) if repeats > 1 else now
                return kind, single, many if many.signature == now.signature else now
        clients = 1 if mode == "loop" else self.chunk.take(queue.alike)
        if programs and self.tuner.learning and clients < queue.alike:
            round.tried = True  # what is left of these clients is no shape that comes back
        return mode, alone, queue.peek(clients)

    def _by_program(self, mode: Mode, now: Slice, shared: Shared, round: Round) -> list[Added] | None:
        """What the slice's chunks left; None where there is no program for them, and there will be none."""
        programs, started = self.programs[mode], self._compile_clock()
        before, sums, most = len(programs), round.sums or self.no_sums(round), self.tuner.most_operators(mode)
        kind = (round.kind, now.signature, torch.get_num_threads())  # which are fixed in a program
        try:
            added = programs.run(kind, now.bounds, shared, now.inputs, sums, most, now.chunk)
        except Exception as error:
            if out_of_memory(error):
                raise
            self.tuner.give_up(mode)
            doing = {"trace": "tracing", "compile": "compiling"}[mode]
            log.warning("%s failed, so the run goes on without (%s)", doing, first_line(error))
            return None
        if len(programs) > before:
            round.steady = False
            if mode == "compile":
                self.tuner.compiled(self._compile_clock() - started)
        return added

    def _run(self, mode: Mode, now: Slice, shared: Shared, round: Round) -> tuple[Mode, list[Added]]:
        """How the slice was run in the end, and what it left."""
        if self.tuner.counting:
            with Operators() as operators:
                mode, results = self._eager(mode, now, shared, round)
            self.tuner.counted(operators.count, max(int(now.counts.max()), 1))
        else:
            mode, results = self._eager(mode, now, shared, round)
        sums, report = add_all(self.problem, round.sums or self.no_sums(round), results)
        return mode, [Added(sums, report, results[1], kept(self.problem, results))]

    def _eager(self, mode: Mode, now: Slice, shared: Shared, round: Round) -> tuple[Mode, Results]:
        if mode == "loop":
            return mode, self._learnt(
                round, by_loop(self.problem, now.bounds, shared, now.inputs, now.ids, round.number)
            )
        try:
            results = by_vmap(self.problem, now.bounds, shared, now.inputs)
            self._vmapped.add(round.kind)
        except Exception as error:
            if out_of_memory(error):
                raise
            _, results = self._eager("loop", now, shared, round)  # names the client if it fails there too
            if self._vmapped:
                raise
            mode = "loop"
            self.tuner.give_up("vmap")
            drawn = "randomness" in str(error)  # torch's advice is about vmap's options, which nobody here sets
            log.warning("this model or algorithm cannot run under vmap, so clients run one by one from here on (%s)",
                        OWN_NOISE if drawn else first_line(error))  # fmt: skip
        return mode, self._learnt(round, results)

    def _learnt(self, round: Round, results: Results) -> Results:
        if round.kind not in self._layouts:
            self._layouts[round.kind] = layout(results)
        return results


def _share(queue: Queue, now: Slice) -> float:
    """The part of the round's local steps that chunks of this shape take."""
    counts, longest = queue.clients.counts, now.counts.max()
    alike = counts[counts == longest] if (now.counts == longest).all() else now.counts
    return float(alike.sum() / counts.sum())


def processor_seconds() -> float:
    """What this process and those that it has waited for, compilers say, have computed."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch, and afterwards as many as before."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _to(clients: Tree, place: torch.device) -> Tree:
    return tree_map(lambda leaf: to_place(leaf, place), clients)
