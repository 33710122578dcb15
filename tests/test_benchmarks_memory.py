"""benchmarks.memory counts a client's parts, and benchmarks.sampling times what a large population could make slow."""

import json

import pytest
import torch
import tyro

from benchmarks import measuring, memory, report, sampling
from benchmarks.work import SHAPES
from vfl import models
from vfl.chunks import Memory
from vfl.errors import UsageError

TINY = ("--case.population=6", "--case.batch=3", "--models=softmax", "--chunks", "1", "2", "--cohorts", "2", "4")
needs_proc = pytest.mark.skipif(Memory(torch.device("cpu")).used() is None, reason="memory is read from /proc")


@pytest.mark.parametrize(("model", "kept"), [("softmax", 0), ("mlp", 2 * 200), ("mlp:7", 7)])
def test_activations_are_what_backward_needs(model, kept):
    x, y = torch.rand(20, 1, 28, 28), torch.zeros(20, dtype=torch.int64)
    log_probabilities, weights = 20 * 10, 1  # of the cross-entropy
    found = memory.activations(models.model(model, (1, 28, 28), 10), x, y)
    assert found == 4 * (20 * kept + log_probabilities + weights)


@needs_proc
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_the_parts_of_a_client_are_counted_in_bytes(algorithm):
    case = memory.Case(model="softmax", algorithm=algorithm, chunk=2, cohort=4, population=4, batch=3)
    found = memory.measure(case)
    D = 4 * sum(torch.Size(shape).numel() for shape in SHAPES["softmax"])
    control = D if algorithm == "scaffold" else 0
    wanted = {"model": D, "gradient": D, "message": D + control, "batch": 3 * (4 * 784 + 8), "state": 2 * control}
    assert wanted.items() <= found.items()
    assert found.keys() == {"peak", *memory.PARTS}


def test_growth_is_a_difference_between_chunks_beside_the_parts():
    parts = dict.fromkeys(memory.PARTS, 0.25e6)
    small, large = memory.Case(chunk=2, cohort=9), memory.Case(chunk=6, cohort=9)
    other = memory.Case(model="softmax", chunk=2, cohort=9)
    (row,) = memory.by_chunk({small: {"peak": 5e6, **parts}, large: {"peak": 17e6, **parts}, other: {"peak": 1.0}})
    assert (row["from"], row["to"], row["a_client"], row["ratio"]) == (2, 6, 3e6, 2.0)
    rows = memory.by_cohort({small: {"peak": 5e6}, large: {"peak": 6e6}, other: {"peak": 2e6}})
    assert [row["ratio"] for row in rows] == [1.0, 1.2, 1.0]


def test_memory_is_measured_for_each_chunk_and_cohort_written_and_rendered(tmp_path, monkeypatch, capsys):
    measured = []

    def pretended(case):
        measured.append(case)
        return {"peak": 1e6 * (3 + case.chunk) + len(measured), **dict.fromkeys(memory.PARTS, 0.5e6)}

    monkeypatch.setattr(memory, "measured_apart", pretended)
    path = tmp_path / "memory.json"
    tyro.cli(memory.main, args=[*TINY, "--repeats=3", "--json", str(path)])
    assert [(case.chunk, case.cohort) for case in measured] == [(1, 6), (2, 6), (25, 2), (25, 4)] * 3
    assert len(json.loads(path.read_text())["runs"]) == 12
    text = report.render([path])
    assert "## Memory of a round" in text
    assert "| softmax | 1 → 2 | 1 | 0.33 |" in text and "| softmax | 4 | 28 | 1.00 |" in text
    assert "memory of a round in chunks of 25" in capsys.readouterr().out


@needs_proc
def test_a_process_of_its_own_measures_a_setting_or_says_why_not():
    """Thirty clients of an mlp hold at least a message each, and not ten times their parts."""
    found = memory.measured_apart(memory.Case(chunk=30, cohort=30, population=30, batch=2, steps=1))
    assert found["model"] < found["peak"] / 30 < 10 * found["model"]
    with pytest.raises(UsageError, match=r"nothing could not be measured: .*nowhere"):
        measuring.apart(["-m", "nowhere"], "nothing")


def test_a_cohort_is_drawn_and_gathered_for_each_population(tmp_path, capsys):
    path = tmp_path / "sampling.json"
    arguments = ["--populations", "5", "3000", "--rounds=2", "--cohort=30", "--state=4", "--json", str(path)]
    tyro.cli(sampling.main, args=arguments)
    found = json.loads(path.read_text())
    assert [row["population"] for row in found["rows"]] == [5, 3000]
    for row in found["rows"]:
        assert all(row[name] > 0 for name in (*sampling.SAMPLERS, *sampling.GATHERING))
        assert row["together"] == pytest.approx(sum(row[name] for name in sampling.GATHERING))
    text = report.render([path])
    assert "## Sampling" in text and "| 3,000 |" in text
    assert "a cohort of 30" in text and "a cohort of 30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (memory, "--chunks 8", "chunks must be two or more ascending sizes from 1, not 8"),
        (memory, "--chunks 8 8", "ascending sizes from 1, not 8 8"),
        (memory, "--chunks 0 8", "ascending sizes from 1, not 0 8"),
        (memory, "--cohorts 2000", "no chunk or cohort can be above the population, 1000"),
        (memory, "--repeats 0", "repeats must be at least 1, not 0"),
        (sampling, "--rounds 0", "must all be at least 1"),
    ],
)
def test_bad_input_is_named(module, arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        tyro.cli(module.main, args=arguments.split())
