"""benchmarks.algorithms finds everything there is, and compares it with what it should be compared with."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import vfl
from algorithms.fedavg import FedAvg
from benchmarks import algorithms, compressors, measuring, report
from benchmarks.counting import counted
from vfl import native
from vfl.errors import UsageError

SMALL = algorithms.Setting(
    model="softmax", features=3, clients=2, examples=4, batch=2, rounds=1, chunk=2, dim=2, tries=2
)


def algorithms_json(folder: Path, *arguments: str) -> dict:
    """What the command writes, for small work; whether it found everything fast enough is the clock's to say."""
    path = folder / "algorithms.json"
    sizes = [f"--setting.{key}={value}" for key, value in vars(SMALL).items()]
    with contextlib.suppress(SystemExit):
        tyro.cli(algorithms.main, args=[*sizes, "--json", str(path), *arguments])
    return json.loads(path.read_text())


def test_every_algorithm_with_an_entry_point_is_measured(tmp_path):
    found = algorithms_json(tmp_path, "--compressors", "none")
    assert [row["algorithm"] for row in found["algorithms"]] == list(vfl.algorithms.algorithms())
    assert "fedavg" in vfl.algorithms.algorithms()
    for row in found["algorithms"]:
        assert row["ratio"] > 0 and row["execution"] == "vmap"
    assert "| fedavg | softmax, vmap |" in report.render([tmp_path / "algorithms.json"])


DISTILLING = "feddf --public-examples 6 --distill-steps 5 --distill-batch-size 4"


@pytest.mark.parametrize(
    ("text", "gradients"),
    [
        ("fedavg", 1),
        ("scaffold --option 1", 2),
        ("scaffold", 1),
        ("qfedavg", 1 + 1 / 3),  # the loss at the model sent
        (DISTILLING, (2 * (4 + 6 / 3) + 5 * 4) / 8),  # both clients' logits, and the server's own steps
        ("feddf --public synthetic:features=3 --distill-steps 0", (8 + 2 * 500 / 3) / 8),  # as many as there may be
    ],
)
def test_gradients_beyond_fedavgs_are_allowed_for(text, gradients):
    row = algorithms.measure(text, SMALL)
    assert row["gradients"] == pytest.approx(gradients)
    assert row["allowed"] == pytest.approx(1.5 * gradients)


def test_an_algorithm_about_norm_layers_is_measured_on_a_model_that_has_them():
    row = algorithms.measure("fedbn", SMALL)
    assert row["model"] == "softmax with norms" and row["gradients"] == 1
    module, plain = (make(SMALL).task.names for make in (algorithms.normalized, algorithms.network))
    assert len(module) == len(plain) + 2
    with pytest.raises(UsageError, match="char_lstm is no chain of layers"):
        algorithms.normalized(algorithms.Setting(model="char_lstm", features=3, clients=2, examples=2))


def test_computed_gradients_are_counted_for_every_client_and_example_masked_or_not():
    task, count = counted(vfl.task(torch.nn.Linear(3, 2)))
    x, y, mask = torch.zeros(5, 4, 3), torch.zeros(5, 4, dtype=torch.int64), torch.arange(4) < 1
    key = vfl.random.key(0)

    def gained(call) -> tuple[int, int]:
        before = count.gradients, count.passes
        call()
        return count.gradients - before[0], count.passes - before[1]

    def gradient(w, x, y):
        return task.grad_fn(w, vfl.Batch(x, y, mask, key), ())[0]

    def total(w, x, y):
        return task.outputs(w, vfl.Batch(x, y, mask, key), (), training=True).sum()

    def scores(w, x, y):
        return task.outputs(w, vfl.Batch(x, y, mask, key), ())

    over = torch.func.vmap
    assert gained(lambda: gradient(task.x, x[0], y[0])) == (4, 0)
    assert gained(lambda: over(gradient, (None, 0, 0))(task.x, x, y)) == (20, 0)
    assert gained(lambda: over(gradient, (0, None, None))(task.x.expand(3, -1), x[0], y[0])) == (12, 0)
    assert gained(lambda: over(over(gradient, (None, 0, 0)), (0, None, None))(task.x.expand(3, -1), x, y)) == (60, 0)
    assert gained(lambda: over(torch.func.grad(total), (None, 0, 0))(task.x, x, y)) == (20, 0)
    assert gained(lambda: over(scores, (None, 0, 0))(task.x, x, y)) == (0, 20)
    assert gained(lambda: over(lambda n: n + scores(task.x, x[0], y[0]).sum())(torch.arange(3.0))) == (0, 4)
    assert gained(lambda: task.evaluate(task.x, vfl.Batch(x[0], y[0], mask, key), ())) == (0, 4)
    assert gained(lambda: total(task.x.clone().requires_grad_(), x[0], y[0]).backward()) == (4, 0)
    assert count.total == count.gradients + count.passes / 3


def play(monkeypatch: pytest.MonkeyPatch, rounds) -> None:
    """Rounds that take so long and compute so many gradients."""

    def timed(config, work, setting):
        return ({"seconds": s, "execution": "vmap"} for s, _ in rounds(config, work, setting))

    monkeypatch.setattr(algorithms, "_rounds", timed)
    monkeypatch.setattr(algorithms, "_computed", lambda *given: np.array([float(n) for _, n in rounds(*given)]))


@pytest.mark.parametrize(
    ("seconds", "gradients", "holds"),
    [(1.45, 100, True), (1.55, 100, False), (2.9, 200, True), (3.1, 200, False), (1.4, 50, True), (1.55, 50, False)],
)
def test_a_ratio_is_of_rounds_side_by_side_after_the_warm_up(monkeypatch, seconds, gradients, holds):
    slow = (1, 3, 9)  # the machine, from round to round

    def rounds(config, work, setting):
        mine = config == "other"
        each = [(50.0, 7) if mine else (1.0, 900)] * algorithms.WARM_UP
        each += [(seconds * s, gradients) if mine else (float(s), 100) for s in slow]
        return each

    play(monkeypatch, rounds)
    row = algorithms._beside_fedavg("other", algorithms.network(SMALL), SMALL)
    assert row["ratio"] == pytest.approx(seconds)
    assert row["gradients"] == gradients / 100
    assert row["fedavg_s_per_round"] == 3
    assert row["holds"] == holds


def test_rounds_of_two_kinds_are_each_compared_with_what_is_fair(monkeypatch):
    def rounds(config, work, setting):
        kinds = [(1.2, 100), (2.4, 200)] if config == "mime" else [(1.0, 100)]
        return [kinds[t % len(kinds)] for t in range(algorithms.WARM_UP + 4)]

    play(monkeypatch, rounds)
    row = algorithms._beside_fedavg("mime", algorithms.network(SMALL), SMALL)
    assert (row["gradients"], row["allowed"], row["holds"]) == (1.5, 2.25, True)
    assert row["ratio"] == pytest.approx(1.8)


@dataclass(frozen=True)
class Theorist(vfl.LocalTraining):
    """Asks for what no network knows."""

    def build(self, task, population):
        assert vfl.smoothness(task).L > 0
        return FedAvg().build(task, population)


@dataclass(frozen=True)
class Refuser(vfl.LocalTraining):
    """Never runs."""

    def build(self, task, population):
        raise UsageError("it needs the | moon")


def test_an_algorithm_that_needs_constants_is_measured_on_a_quadratic_and_a_refusal_is_shown(tmp_path):
    names = [f"{__name__}:{kind.__name__}" for kind in (Theorist, Refuser)]
    found = algorithms_json(tmp_path, "--compressors", "none", "--algorithms", *names)
    theorist, refuser = found["algorithms"]
    assert theorist["model"] == "quadratic"
    assert refuser == {"algorithm": names[1], "missing": "it needs the | moon"}
    assert f"- {names[1]}: it needs the | moon" in report.render([tmp_path / "algorithms.json"])


COMPRESSORS = """
from __future__ import annotations
import torch, vfl
from typing import NamedTuple
from vfl.spec import resolve

class Compressor(NamedTuple):
    compress: object

def bits(v, count):
    return torch.full((), float(count), dtype=torch.float64)

def same(*, shapes, dtype):
    return Compressor(lambda v, key: (v.clone(), bits(v, 32 * len(v))))

def largest(k: str, *, shapes, dtype):
    def compress(v, key):
        n = int(k[:-1]) * len(v) // 100
        return v.where(v.abs() >= v.abs().topk(n).values[-1], 0), bits(v, 50 * n)
    return Compressor(compress)

def noisy(sigma: float = 1.0, *, shapes, dtype):
    return Compressor(lambda v, key: (v + vfl.random.uniform(key, v.shape), bits(v, 8 * len(v))))

def odd(moon: float, *, shapes, dtype):
    raise AssertionError

COMPRESSORS = {f.__name__: f for f in (same, largest, noisy, odd)}

def compressor(spec, shapes, dtype):
    return resolve(spec, COMPRESSORS, "compressor", shapes=shapes, dtype=dtype)
"""


def test_a_compressor_is_compared_with_the_dearest_primitive_it_calls(tmp_path, monkeypatch):
    (tmp_path / "few_compressors.py").write_text(COMPRESSORS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compressors, "MODULE", "few_compressors")
    monkeypatch.setattr(compressors, "in_turn", lambda first, second, tries: ([3.0, 8.0, 9.0], [2.0, 2.0, 3.0]))
    found = algorithms_json(tmp_path, "--algorithms", "none", "--setting.features", "2000", "--setting.tries", "5")
    same, largest, noisy, odd = found["compressors"]
    assert [row["compressor"] for row in found["compressors"]] == ["same", "largest:1%", "noisy", "odd"]
    assert [row["primitive"] for row in (same, largest, noisy)] == ["copy", "topk", "uniform"]
    assert [round(row["bits_per_entry"], 2) for row in (same, largest, noisy)] == [32, 0.5, 8]
    assert largest["ratio"] == 3  # the median of 3/2, 8/2 and 9/3
    assert largest["ns_per_entry"] == 4 * largest["primitive_ns_per_entry"]
    assert "expected odd:MOON" in odd["missing"]
    assert "| largest:1% | 0.5 |" in report.render([tmp_path / "algorithms.json"])


@pytest.mark.parametrize(
    ("spec", "found"),
    [("identity", []), ("sign", ["reduction + copy"]), ("quantize:8", ["reduction + copy"]),
     ("rand_k:1%", ["subset + copy"]), ("qsgd:16", ["reduction + copy", "uniform"]), ("top_k:1%", ["topk"])],
)  # fmt: skip
def test_what_must_be_known_before_writing_is_counted_with_the_copy(spec, found):
    keys = vfl.random.split(vfl.random.key(0), 3)
    D = 2 * native.LARGE  # where many a compressor is one kernel, if nobody watches
    v = vfl.random.normal(keys, (D,))
    with compressors.Calls() as calls:
        torch.func.vmap(vfl.compressor(spec, ((D,),), torch.float32).compress)(v, keys)
    assert sorted(compressors.written(primitive, v).name for primitive in calls.primitives()) == found


def test_without_compressors_a_sentence_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compressors, "MODULE", "vfl.no_such_module")
    assert algorithms_json(tmp_path, "--algorithms", "none")["compressors"] == []
    assert "no compressor was measured" in capsys.readouterr().out


def test_calls_that_are_compared_take_turns():
    made = []
    first, second = measuring.in_turn(lambda: made.append("a"), lambda: made.append("b"), 3)
    assert made == ["a", "b"] * 4, "one pair warms up"
    assert len(first) == len(second) == 3 and min(first + second) > 0
