"""Executions: compiled chunks give vmap's results, and auto takes what is measurably fastest."""

import logging
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers import ALGORITHMS, CLASSES, assert_same, every_algorithm, federated, make_task, regression, run
from torch import nn

import vfl
from algorithms.fedavg import FedAvg
from vfl import choices, programs
from vfl.chunks import SHORT, ChunkSize
from vfl.executor import Executor, processor_seconds, threads
from vfl.operators import Operators, TooManyOperatorsError
from vfl.tuning import ENOUGH, MODES, PATIENCE, PROGRAMS, SEEN, TRIES, Tuner, Way

CPU = torch.device("cpu")
COMPILED = PROGRAMS["compile"]
OPTIONS = {"clients_per_round": 4, "batch_size": 3, "chunk": 2}


@every_algorithm
def test_a_traced_program_gives_the_results_of_vmap(algorithm):
    task, data = regression(), federated()
    wanted = run(algorithm, task, data, 3, **OPTIONS)
    assert_same(run(algorithm, task, data, 3, execution="trace", **OPTIONS), wanted, 1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, on loading inductor
def test_a_compiled_program_gives_the_results_of_vmap_and_so_does_the_one_kept_on_disk():
    from torch._dynamo.utils import counters

    algorithm, task = ALGORITHMS["scaffold-option=2"], regression()
    data = federated()
    options = {"clients_per_round": "all", "batch_size": None, "chunk": 100}
    wanted = run(algorithm, task, data, 3, **options)
    assert_same(run(algorithm, task, data, 3, execution="compile", **options), wanted, 1e-9)
    made, found = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("miss", "hit"))
    torch._dynamo.reset()  # all that a process keeps in memory
    assert_same(run(algorithm, task, data, 3, execution="compile", **options), wanted, 1e-9)
    assert counters["inductor"]["fxgraph_cache_miss"] == made and counters["inductor"]["fxgraph_cache_hit"] > found


def test_a_program_tells_inputs_apart_that_were_one_tensor_when_it_was_made(monkeypatch):
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)

    class Previous(FedAvg):
        """Sends the model and the one before, which are one tensor at first."""

        def build(self, task, population):
            plain = super().build(task, population)

            def init_server(x):
                return x, plain.init_server(x)

            def broadcast(server, key):
                sent = plain.broadcast(server[1], key)
                return sent._replace(content=(server[0], server[1].x, sent.content))

            def client_update(sent, client, batches, key):
                message, client, metrics = plain.client_update(sent[2], client, batches, key)
                return message._replace(payload=message.payload + sent[1] - sent[0]), client, metrics

            def server_update(server, mean, key):
                after, reported = plain.server_update(server[1], mean, key)
                return Both(server[1].x, after), reported

            Both = namedtuple("Both", "previous inner")
            Both.x = property(lambda both: both.inner.x)
            return plain._replace(
                init_server=lambda x: Both(*init_server(x)),
                broadcast=broadcast,
                client_update=client_update,
                server_update=server_update,
            )

    task, data = regression(), federated()
    wanted = run(Previous(), task, data, 4, **OPTIONS)
    assert_same(run(Previous(), task, data, 4, execution="compile", **OPTIONS), wanted, 1e-9)


def test_a_program_is_made_once_for_a_shape(monkeypatch):
    made = []
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: made.append(graph) or graph)
    run(ALGORITHMS["fedavg"], regression(), federated(), 4, execution="compile", clients_per_round="all", chunk=100)
    assert len(made) == 1


def test_a_program_computes_chunk_after_chunk_of_like_clients(monkeypatch):
    """Clients with as many steps go through one program without the host looking around in between."""
    calls, slices = [], []
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: lambda *now: calls.append(0) or graph(*now))
    plain = programs.Programs.run
    monkeypatch.setattr(programs.Programs, "run", lambda *given: slices.append(0) or plain(*given))
    task, data = regression(), federated(sizes=[6] * 9)
    options = {"clients_per_round": "all", "batch_size": 3}
    wanted = run(ALGORITHMS["scaffold-option=2"], task, data, 3, execution="vmap", chunk=100, **options)
    found = run(ALGORITHMS["scaffold-option=2"], task, data, 3, execution="compile", chunk=3, **options)
    assert_same(found, wanted, 1e-9)
    assert len(calls) - len(slices) >= 2 * 2  # three chunks in each of the last two rounds, in one slice


def test_a_program_that_runs_out_of_memory_is_followed_by_smaller_chunks(monkeypatch, caplog):
    plain = programs.Programs.run

    def narrow(self, signature, bounds, shared, inputs, sums, most, chunk):
        if chunk > 2:
            raise torch.OutOfMemoryError("too many")
        return plain(self, signature, bounds, shared, inputs, sums, most, chunk)

    monkeypatch.setattr(programs.Programs, "run", narrow)
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
    task, data = regression(), federated()
    wanted = run(ALGORITHMS["fedavg"], task, data, 2, execution="vmap", clients_per_round="all", chunk=100)
    with caplog.at_level(logging.WARNING, "vfl"):
        found = run(ALGORITHMS["fedavg"], task, data, 2, execution="compile", clients_per_round="all", chunk=4)
    assert_same(found, wanted, 1e-9)
    assert "out of memory with" in caplog.text


def steady_rounds(execution: str, rounds: int, *, known_size: bool = True) -> list[bool]:
    """Whether each round's seconds say what such a round takes; eight like clients, their chunk left to the engine."""
    task, data = regression(), federated(sizes=[6] * 8)
    options = {"execution": execution, "chunk": None, "clients_per_round": "all"}
    engine = vfl.Engine(FedAvg().build(task, 8), task, data, **options)
    engine.timed = True  # as where there are several ranks
    if not known_size:
        engine.executor._most.clear()
    state, steady = engine.init(0), []
    for _ in range(rounds):
        state, _ = engine.play(state, rounds)
        steady.append(engine.seconds > 0)
    return steady


@pytest.mark.parametrize(("execution", "learning"), [("loop", 0), ("compile", 2), ("vmap", SHORT)])
def test_learning_ends_where_the_chunk_is_left_to_the_engine(execution, learning, monkeypatch):
    """Else no round would say how fast a rank is, and each slice would wait for a GPU."""
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
    assert steady_rounds(execution, SHORT + 3) == [False] * learning + [True] * (SHORT + 3 - learning)


def test_vmap_finds_the_chunk_to_compile_where_no_cache_gives_it(monkeypatch):
    made: list[int] = []
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: made.append(0) or graph)
    # The cohorts never fill the first chunk, so it settles after as many rounds; the next one compiles.
    assert steady_rounds("compile", SHORT, known_size=False) == [False] * SHORT and not made
    assert steady_rounds("compile", SHORT + 3, known_size=False) == [False] * (SHORT + 1) + [True] * 2
    assert len(made) == 1


def test_a_run_goes_on_under_vmap_when_compiling_fails(monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(programs, "compile_graph", broken)
    algorithm, task, data = ALGORITHMS["fedavg"], regression(), federated()
    with caplog.at_level(logging.WARNING, "vfl"):
        found = vfl.simulate(algorithm, task, data, 3, execution="compile", **OPTIONS)
    assert [r.getMessage() for r in caplog.records] == [
        "compiling failed, so the run goes on without (no compiler on this machine)"
    ]
    wanted = vfl.simulate(algorithm, task, data, 3, execution="vmap", **OPTIONS)
    assert torch.equal(found.x, wanted.x)


def test_auto_gives_the_results_of_vmap():
    algorithm, task, data = ALGORITHMS["fedavg"], regression(), federated()
    wanted = vfl.simulate(algorithm, task, data, 12, execution="vmap", **OPTIONS)
    found = vfl.simulate(algorithm, task, data, 12, execution="auto", **OPTIONS)
    torch.testing.assert_close(found.x, wanted.x, rtol=1e-9, atol=1e-9)


def played(tuner: Tuner, seconds: dict[str, float], chunks: int = 60) -> list[str]:
    """The modes of so many chunks, each 10 steps deep, of 4 clients (1 in the loop) that take `seconds` each.

    Traced programs bring nothing unless they have seconds of their own.
    """
    modes, seconds = [], {"trace": seconds["vmap"], "trace by one thread": seconds["vmap"]} | seconds
    for _ in range(chunks):
        way = tuner.way()
        clients = 1 if way.mode == "loop" else 4
        modes.append(str(way))
        if tuner.learning:
            tuner.met(clients)
            tuner.report(way.mode, clients, 10 * clients, 10, clients * seconds[str(way)])
    return modes


def tuner(steps_to_come: float, operators: int = 1400) -> Tuner:
    """With a model of so many operators in a chunk of 10 steps."""
    made = Tuner("auto", ChunkSize(4, 1, CPU))
    made.steps_to_come = steps_to_come
    made.counted(operators, 10)
    return made


def named(name: str, steps_to_come: float) -> Tuner:
    made = Tuner("auto", ChunkSize(4, 1, CPU), name)
    made.begin(steps_to_come)
    made.counted(1400, 10)
    return made


@pytest.mark.parametrize("fastest", ["loop", "vmap", "trace", "compile"])
def test_auto_ends_with_the_fastest(fastest):
    seconds = {"loop": 3.0, "vmap": 2.0, "trace": 2.2, "compile": 2.5} | {fastest: 1.0}
    assert set(played(tuner(1e9), seconds)[-20:]) == {fastest}


def test_auto_tries_one_thread_where_there_are_several():
    several = {"loop": 3.0, "loop by one thread": 0.8, "vmap": 2.0, "vmap by one thread": 2.5}
    for compiled, best in ((0.1, "compile by one thread"), (0.9, "loop by one thread")):
        one = Tuner("auto", ChunkSize(4, 1, CPU), threads=2)
        one.begin(1e9)
        one.counted(1400, 10)
        ways = played(one, several | {"compile by one thread": compiled})
        assert set(ways) == {*several, "trace by one thread", "compile by one thread"} and ways[-1] == best
    assert set(played(tuner(0.0), {"loop": 3.0, "vmap": 1.0})) == {"loop", "vmap"}


def test_one_thread_is_not_tried_where_few_steps_are_to_come():
    several = {"loop": 3.0, "loop by one thread": 0.8, "vmap": 2.0, "vmap by one thread": 2.5}
    for steps_to_come, tried in ((300.0, 2), (500.0, 4)):
        one = Tuner("auto", ChunkSize(4, 1, CPU), threads=2)
        one.begin(steps_to_come)
        assert len(set(played(one, several))) == tried


def test_one_thread_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    several = {"loop": 3.0, "loop by one thread": 0.8, "vmap": 2.0, "vmap by one thread": 2.5}
    for _ in range(2):
        one = Tuner("auto", ChunkSize(4, 1, CPU), "e", threads=2)
        one.begin(1000.0)  # too few steps to compile
        one.counted(1400, 10)
        ways = played(one, several)
    assert set(ways) == {"loop by one thread"}


def test_threads_are_as_before_after_a_chunk_by_one(monkeypatch):
    monkeypatch.setattr(Tuner, "way", lambda self: Way("loop", alone=True))
    during: list[int] = []
    task, data = regression(), federated()
    seen = task._replace(grad_fn=lambda *a: during.append(torch.get_num_threads()) or task.grad_fn(*a))
    broken = task._replace(grad_fn=lambda *a: 1 / 0)
    with threads(2):
        vfl.simulate(ALGORITHMS["fedavg"], seen, data, 1, **OPTIONS)
        assert torch.get_num_threads() == 2
        with pytest.raises(vfl.errors.ClientError):
            vfl.simulate(ALGORITHMS["fedavg"], broken, data, 1, **OPTIONS)
        assert torch.get_num_threads() == 2
    assert set(during) == {1}


def test_auto_does_not_change_for_a_difference_within_the_noise():
    assert played(tuner(1e9), {"loop": 0.99, "vmap": 1.0, "compile": 0.98})[-1] == "vmap"


def test_auto_does_not_compile_for_a_run_that_cannot_repay_it():
    assert "compile" not in played(tuner(100.0), {"loop": 3.0, "vmap": 0.01, "compile": 0.001})


def test_a_program_tried_late_is_compared_with_vmap_and_not_with_the_loop_timed_before_it():
    one, seconds = tuner(0.0), {"loop": 3.0, "vmap": 1.0, "compile": 2.0}
    assert "compile" not in played(one, seconds)
    one.steps_to_come = 1e9
    modes = played(one, seconds)
    assert "compile" in modes and modes[-1] == "vmap"


def test_auto_times_a_way_in_a_few_chunks_only_and_in_fewer_long_ones():
    for scale, chunks in ((1e-3 * ENOUGH, TRIES + 1), (ENOUGH, 2)):
        one = tuner(0.0)
        assert played(one, {"loop": 3.0 * scale, "vmap": scale}).count("loop") == chunks


def test_auto_does_not_trace_where_heavy_steps_leave_too_little_to_save():
    """It would cost 0.3 seconds, and is expected to save a quarter of 5 milliseconds of each step, which takes 50."""
    for steps, tried in ((200, False), (400, True)):
        assert ("trace" in played(tuner(steps), {"loop": 0.5, "vmap": 0.6, "compile": 1.0})) == tried


def test_chunks_that_found_their_size_have_warmed_vmap_up():
    ends = []
    for warm in (False, True):
        one = tuner(1e6)
        for chunk in range(1, 10):
            one.met(4)
            one.report("vmap", 4, 40, 10, 40.0, warm=warm and chunk == 1)
            if one.mode() != "vmap":
                break
        ends.append(chunk)
    assert ends == [2, 1]


def test_auto_does_not_compile_shapes_that_do_not_come_back():
    one = tuner(1e9)
    for n in range(50):
        mode = one.mode()
        assert mode not in PROGRAMS
        one.met(n)
        one.report(mode, n, 40, 10, 1.0 if mode == "vmap" else 3.0)
    assert not one.wants("compile", "a new shape", 10)
    one.met("a shape that does", SEEN)
    for mode, kind in PROGRAMS.items():
        assert not one.wants(mode, "a shape that does", 10 * kind.most // 1400 + 1)  # its program would be too large
        assert one.wants(mode, "a shape that does", 10)


def test_auto_compiles_only_shapes_whose_part_of_the_steps_repays_it():
    one = tuner(steps_to_come=1e7)
    assert set(played(one, {"loop": 3.0, "vmap": 1e-3, "compile": 0.5e-3})[-4:]) == {"compile"}
    saved = 1e7 * 0.5e-4  # seconds, by programs for all shapes: a client's 10 steps take half a millisecond less
    cost = one._cost("compile", 10)
    one.met("rare", SEEN)
    assert not one.wants("compile", "rare", 10, share=0.9 * cost / saved)
    assert one.wants("compile", "rare", 10, share=1.1 * cost / saved)
    one.steps_to_come = 0.0
    assert one.wants("compile", "rare", 10, share=0.0)  # whose program there is


def test_auto_ends_a_trial_in_which_no_shape_repays_a_program():
    one = tuner(1e9)
    for n in range(3 * PATIENCE):
        mode = "vmap" if one.mode() == "compile" else one.mode()
        if one.learning:
            one.met("like" if n < 30 else n)
            one.report(mode, "like" if n < 30 else n, 40, 10, 1.0 if mode == "vmap" else 3.0)
    assert not one.learning and one.mode() == "vmap"


@pytest.mark.parametrize(("most", "rounds"), [(5, 2), (25, 12)])
def test_a_trial_makes_programs_for_whole_cohorts_and_not_for_what_was_left_of_one(most, rounds, monkeypatch):
    made: list[int] = []
    plain = programs.Programs.run
    monkeypatch.setattr(programs.Programs, "run", lambda *given: made.append(given[-1]) or plain(*given))
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
    task, data = regression(), federated(sizes=[6] * 25)
    options = {"clients_per_round": "all", "work": vfl.Work(batch_size=3)}
    engine = vfl.Engine(FedAvg().build(task, 25), task, data, execution="auto", chunk=None, **options)
    engine.executor.chunk.keep(5)
    engine.executor._most = {(mode, once): most for mode in PROGRAMS for once in (False, True)}
    state = engine.init(0)
    for _ in range(rounds):  # in the first one four chunks by vmap, four clients one by one: one is left
        assert not made or state.round > 1
        state, _ = engine.play(state, 10**9)
    assert set(made) == {most}


def test_auto_does_not_compile_a_program_that_takes_minutes_and_stops_timing():
    large = tuner(1e9, operators=COMPILED.most + 1)
    assert "compile" not in played(large, {"loop": 3.0, "vmap": 1.0}, chunks=PATIENCE + TRIES + 1)
    assert not large.learning
    assert "compile" in played(tuner(1e9, operators=COMPILED.most), {"loop": 3.0, "vmap": 1.0, "compile": 0.1})


def test_auto_does_not_compile_before_it_has_counted():
    one = Tuner("auto", ChunkSize(4, 1, CPU))
    one.steps_to_come = 1e9
    assert one.counting and "compile" not in played(one, {"loop": 3.0, "vmap": 1.0})


class Recurrent(nn.Module):
    """Eight positions of a recurrent layer that autograd differentiates step by step."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.rnn, self.output, self.positions = nn.GRU(1, 2, batch_first=True), nn.Linear(2, CLASSES), positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.rnn(x[:, :1, None].expand(-1, self.positions, -1))
        return self.output(h[:, -1])


def test_operators_are_counted_in_the_first_chunk(monkeypatch):
    counts = {}
    for positions in (2, 4, 40):
        counted: list[int] = []
        monkeypatch.setattr(Tuner, "counted", _noting(counted))
        task, options = make_task(Recurrent(positions)), OPTIONS | {"clients_per_round": 6}
        vfl.simulate(ALGORITHMS["fedavg"], task, federated(), 1, execution="auto", local_steps=1, **options)
        (counts[positions],) = counted  # in one chunk alone
    assert counts[40] - counts[4] == 18 * (counts[4] - counts[2]) > 36 * 40  # each position's, forward and backward


def test_who_asks_for_a_program_that_takes_minutes_is_warned(caplog):
    with caplog.at_level(logging.WARNING, "vfl"):
        for wanted, operators in (("auto", 60_000), ("compile", COMPILED.most), ("compile", 60_000)):
            Tuner(wanted, ChunkSize(4, 1, CPU)).counted(operators, 10)
    (record,) = caplog.records
    assert "60,000 operators may take 25 minutes" in record.getMessage()


def _noting(counted: list[int]):
    original = Tuner.counted

    def noting(self: Tuner, operators: int, depth: int) -> None:
        counted.append(operators)
        original(self, operators, depth)

    return noting


def test_tracing_ends_at_the_limit(monkeypatch, caplog):
    """Even where the count was wrong; the run goes on, with the same results."""
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: pytest.fail("the program was traced"))
    monkeypatch.setattr(Tuner, "most_operators", lambda self, mode: 50)
    algorithm, task, data = ALGORITHMS["fedavg"], regression(), federated()
    with caplog.at_level(logging.WARNING, "vfl"):
        found = vfl.simulate(algorithm, task, data, 3, execution="compile", **OPTIONS)
    (record,) = caplog.records
    assert "its program would have more than 50 operators" in record.getMessage()
    assert torch.equal(found.x, vfl.simulate(algorithm, task, data, 3, execution="vmap", **OPTIONS).x)


def test_operators_are_those_that_run():
    with Operators(most=3) as operators, pytest.raises(TooManyOperatorsError, match="more than 3 operators"):
        x = torch.ones(2)
        assert operators.count == 1
        assert x.add(1).mul(2).sum() == 8  # and the comparison is a fifth
    assert operators.count == 4


def test_what_is_asked_for_is_what_runs():
    for wanted in MODES:
        assert set(played(Tuner(wanted, ChunkSize(4, 1, CPU)), dict.fromkeys(MODES, 1.0))) == {wanted}
    for wanted in ("trace", "compile"):
        assert Tuner(wanted, ChunkSize(4, 1, CPU)).wants(wanted, "anything", 10**6)


def test_round_metrics_say_how_it_ran():
    _, history = vfl.simulate(ALGORITHMS["fedavg"], regression(), federated(), 2, execution="loop", **OPTIONS)
    assert np.all([m["execution"] == "loop" for m in history])


def test_a_run_starts_with_what_an_earlier_one_has_measured():
    seconds = {"loop": 3.0, "vmap": 2.0, "compile": 1.0}
    first = named("a", 1e9)
    first.compiled(7.0)
    assert played(first, seconds)[-1] == "compile"
    assert set(played(named("a", 1e9), seconds)) == {"compile"}
    assert set(played(named("a", 10.0), seconds)) == {"vmap"}  # whose steps would not repay a program
    assert "loop" in played(named("b", 1e9), seconds)  # another kind of work


def test_the_cost_of_a_program_holds_the_compilers_seconds_and_no_waiting():
    before = processor_seconds()
    time.sleep(0.5)
    waited = processor_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(40_000_000))"], check=True)
    assert waited - before < 0.25 and processor_seconds() - waited > 0.1


def test_short_runs_that_keep_coming_repay_a_program_together(tmp_path, monkeypatch):
    """It is expected to cost 39 seconds, to save a third of these runs' 50 each, and worth it at twice its cost."""
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    ways = [played(named("g", 1000.0), {"loop": 1.0, "vmap": 0.5, "compile": 0.25}) for _ in range(5)]
    assert ["compile" in run for run in ways] == [False, False, False, False, True]


def test_short_runs_do_not_each_try_again_what_fails_to_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    tried = []
    for n in range(10):
        one = named("h", 1000.0)
        chunks = (1 if n else 3) * (TRIES + 1) + 1  # by vmap, in the first run by loop and trace too, then one compiled
        tried.append("compile" in played(one, {"loop": 1.0, "vmap": 0.5, "compile": 0.25}, chunks))
        if tried[-1]:
            one.give_up("compile")
    assert tried == [False, False, False, False, True] * 2


def test_where_tracing_fails_compiling_is_tried_all_the_same():
    one, seconds = tuner(1e9), {"loop": 1.0, "vmap": 0.5, "compile": 0.25}
    while one.way().mode != "trace":
        played(one, seconds, 1)
    one.give_up("trace")
    assert set(played(one, seconds)) == {"vmap", "compile"} and one.mode() == "compile"


def test_a_program_that_lies_on_disk_costs_less_and_what_that_is_is_remembered(tmp_path, monkeypatch):
    """Of 1,000 steps, a program in place of vmap saves 10 seconds."""
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "programs"))
    (tmp_path / "programs").mkdir()
    seconds = {"loop": 0.3, "vmap": 0.2, "compile": 0.1}
    first = named("f", 1e9)
    first.compiled(20.0)
    assert played(first, seconds)[-1] == "compile"
    again = named("f", 1000.0)
    assert again.way().mode == "compile"  # expected to cost 0.3 · 20 seconds
    again.compiled(12.0)
    assert named("f", 1000.0).way().mode == "vmap" and named("f", 1500.0).way().mode == "compile"
    (tmp_path / "programs").rmdir()
    assert named("f", 1500.0).way().mode == "vmap" and named("f", 2500.0).way().mode == "compile"


def test_a_later_run_compiles_from_its_first_round_and_rare_shapes_go_the_best_other_way(monkeypatch):
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
    ways: list[str] = []
    eager, by_program = Executor._eager, Executor._by_program
    monkeypatch.setattr(Executor, "_eager", lambda *given: ways.append(given[1]) or eager(*given))
    monkeypatch.setattr(Executor, "_by_program", lambda *given: ways.append(given[1]) or by_program(*given))
    task, data = regression(), federated(sizes=[12] * 12 + [3])
    options = {"clients_per_round": "all", "work": vfl.Work(batch_size=3)}
    engine = vfl.Engine(FedAvg().build(task, 13), task, data, execution="auto", chunk=None, **options)
    engine.executor.tuner._known = choices.Choice(
        16, {"vmap": 1.0, "loop": 2.0, "trace": 2.0, "compile": 4.0}, 1.0, None, None, 0.0
    )
    engine.executor._most = {(mode, once): 2 for mode in PROGRAMS for once in (False, True)}
    state, played = engine.init(0), []
    for _ in range(SEEN):
        ways.clear()
        state, _ = engine.play(state, 100)
        played.append(list(ways))
    # The first chunk shows that nothing depends on a value; the lone short client's shape has to come back.
    assert played == [["vmap", "compile", "loop"], *[["compile", "loop"]] * (SEEN - 2), ["compile", "compile"]]


def test_an_earlier_run_that_was_too_short_to_compile_leaves_that_to_the_next():
    seconds = {"loop": 1.0, "vmap": 2.0, "compile": 0.1}
    assert played(named("c", 0.0), seconds)[-1] == "loop"
    modes = played(named("c", 1e9), seconds)
    assert modes[0] == "loop" and modes[-1] == "compile"


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"d": {"chunk": "x"}}', '{"d": 3}'])
def test_a_broken_file_of_timings_is_no_file(text, tmp_path, monkeypatch):
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    (tmp_path / "executions.json").write_text(text)
    assert choices.recall("d") is None
    choices.remember("d", choices.Choice(4, {"vmap": 2.0}, 9.0, None, None, 7.0))
    assert choices.recall("d") == choices.Choice(4, {"vmap": 2.0}, 9.0, None, None, 7.0)


def test_timings_are_kept_for_the_next_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VFL_CACHE", str(tmp_path))
    for _ in range(2):
        with caplog.at_level(logging.INFO, "vfl"):
            vfl.simulate(ALGORITHMS["fedavg"], regression(), federated(), 40, clients_per_round=6, batch_size=3)
    assert sum("by an earlier run's timings" in r.getMessage() for r in caplog.records) == 1
