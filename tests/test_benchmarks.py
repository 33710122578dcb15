"""The benchmarks measure what they say: all systems do the same work, and nothing that did not run is left out."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from helpers import round_keys
from rich.console import Console

import vfl
from benchmarks import report, throughput
from benchmarks.systems import SYSTEMS, ours, torch_loop
from benchmarks.work import SHAPES, SMALL, Work, distance, gaps, parameters, peak_memory
from vfl.errors import UsageError
from vfl.local import minibatches

KEYS = {"clients_per_s", "s_per_round", "first_round_s", "peak_rss_mb", "execution", "chunk"}
TINY = Work(clients=3, rounds=2, examples=4, batch=4)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """The one line that the command prints."""
    tyro.cli(throughput.main, args=[*arguments, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_json_is_one_line_with_the_promised_numbers(capsys):
    line = said(capsys, "--system=vfl", "--model=softmax", "--clients=4", "--rounds=3")
    assert line.keys() >= KEYS
    assert line["clients_per_s"] == pytest.approx(4 / line["s_per_round"])
    assert line["execution"] == "vmap" and line["chunk"] == 4
    assert line["first_round_s"] > 0 and line["peak_rss_mb"] > 50


def test_two_processes_train_the_model_that_one_trains(capsys):
    sizes = [f"--{key}={value}" for key, value in asdict(TINY).items() if value is not False]
    line = said(capsys, "--system=torch-loop-2", "--model=softmax", *sizes)
    alone = distance(torch_loop.run("softmax", TINY).model, parameters("softmax", TINY))
    assert line["moved"] == pytest.approx(alone, rel=1e-6)


def vfl_orders(work: Work, seed: int = 0) -> Iterator[torch.Tensor]:
    """In which order vfl visits each client's examples, round by round."""
    sizes = np.full(work.clients, work.examples)
    for t in range(work.rounds):
        keys = vfl.random.fold_in(round_keys(seed, t)[1], torch.arange(work.clients))
        local = vfl.Work(work.batch, work.epochs)
        rows = minibatches(local, vfl.random.fold_in(keys, 0), np.zeros_like(sizes), sizes).rows  # [C, K, B]
        yield from rows.reshape(work.clients * work.epochs, work.examples)


SIZES = {"lstm": (2, 2, 2), "resnet18": (2, 2, 1)}  # clients, examples, batch: what takes longer


@pytest.mark.parametrize("model", SHAPES)
def test_the_plain_loop_and_vfl_do_the_same_work(monkeypatch, model):
    clients, examples, batch = SIZES.get(model, (3, 6, 2))
    work = Work(clients=clients, rounds=2, examples=examples, batch=batch, epochs=2 if model in SMALL else 1)
    orders = vfl_orders(work)
    monkeypatch.setattr(torch, "randperm", lambda n: next(orders))
    loop, ours_ = torch_loop.run(model, work), ours.run(model, work)
    assert next(orders, None) is None, "the loop visits as many examples"
    first = parameters(model, work)
    assert distance(loop.model, first) > 0.01
    assert distance(loop.model, ours_.model) < 1e-5 * distance(loop.model, first)
    assert len(loop.seconds) == len(ours_.seconds) == work.rounds


@pytest.mark.parametrize("model", SHAPES)
def test_a_models_shapes_are_those_of_vfls(model):
    with torch.device("meta"):
        made = list(torch_loop.models(model).parameters())
    assert [tuple(p.shape) for p in made] == list(SHAPES[model])
    values = parameters(model, Work())
    assert [v.shape for v in values] == list(SHAPES[model])
    norms = [(v == 1).all() or (v == 0).all() for v in values if v.ndim == 1]
    assert sum(norms) == (40 if model == "resnet18" else 0)


def test_only_what_a_system_can_do_is_measured_with_all(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(throughput, "measure", lambda name, model, work, peers: asked.append((name, model)) or RUN)
    monkeypatch.setattr(throughput, "plot", lambda found, path: asked.append(path.name))
    arguments = ["--models", "lstm", "mlp", "--device", "cuda", "--name", "gpu", "--out", str(tmp_path)]
    tyro.cli(throughput.main, args=arguments)
    able = ["vfl", "vfl-compile", "torch-loop"]
    assert asked == [(name, model) for model in ("lstm", "mlp") for name in able] + ["gpu.png"]
    text = report.render([tmp_path / "gpu.json"])
    assert "FedAvg on the GPU" in text and "](results/gpu.png)" in text
    monkeypatch.undo()
    with pytest.raises(throughput.MissingError, match="does not run lstm on cpu"):
        throughput.measure("fedjax", "lstm", TINY, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", SHAPES)
def test_the_plain_loop_and_vfl_move_a_model_as_far_on_a_gpu(model):
    work = Work(clients=3, rounds=2, examples=2, batch=2, device="cuda")  # a batch is all there is: no order matters
    loop, ours_ = torch_loop.run(model, work), ours.run(model, work)
    first = parameters(model, work)
    assert distance(loop.model, ours_.model) < 1e-3 * distance(loop.model, first)
    assert min(loop.peak_memory, ours_.peak_memory) > 1e6


def test_a_system_without_its_environment_is_reported(capsys, tmp_path):
    arguments = ["--system", "fedjax", "--model", "mlp", "--peers", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        tyro.cli(throughput.main, args=arguments)
    assert end.value.code == 1
    assert "not installed (run benchmarks/peers fedjax)" in capsys.readouterr().out
    assert "not installed (run benchmarks/peers fedjax)" in report.render([tmp_path / "throughput.json"])


def test_every_environment_can_be_made():
    script = (Path(throughput.ROOT) / "benchmarks" / "peers").read_text(encoding="utf-8")
    environments = {system.environment for system in SYSTEMS.values()} - {None}
    assert environments == {"jax", "pfl", "fedjax", "flwr"}
    assert all(f"\n        {name}) echo " in script for name in environments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--system vlf", "did you mean 'vfl'"),
        ("--model lenet", "unknown model 'lenet'"),
        ("--rounds 1", "rounds must be at least 2"),
        ("--batch 7", "a multiple of the batch, 7"),
        ("--repeats 0", "repeats must be at least 1"),
    ],
)
def test_bad_input_is_named(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        tyro.cli(throughput.main, args=arguments.split())


def run(system: str, rate: float, moved: float = 1.0, **other: object) -> dict[str, object]:
    """A run as `benchmarks.throughput` writes it."""
    numbers = {"clients_per_s": rate, "s_per_round": 100 / rate, "first_round_s": 2.5, "peak_rss_mb": 321.0}
    made = {"system": system, "model": "mlp", "moved": moved, "rounds": 30, "version": f"{system} 1.2.3"}
    return made | numbers | {"execution": None, "chunk": None} | other


RUN = run("vfl", 5.0)
RESULT = {
    "benchmark": "throughput",
    "date": "2025-01-02",
    "machine": {"cpu": "Some CPU", "cores": 2, "torch": "2.13.0", "python": "3.11.7"},
    "work": asdict(Work()),
    "runs": [
        *(run("vfl", rate, execution="vmap", chunk=50) for rate in (900.0, 1000.0, 4000.0)),
        *(run("torch-loop", rate) for rate in (400.0, 250.0, 240.0)),
        run("pfl", 50.0, moved=0.1),
        {"system": "jax-scan", "model": "mlp", "missing": "not installed (run benchmarks/peers jax)"},
    ],
}


def test_the_report_shows_medians_ratios_and_what_is_missing(tmp_path):
    (tmp_path / "throughput.json").write_text(json.dumps(RESULT))
    report.main(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "2025-01-02, 2 cores of Some CPU, torch 2.13.0, Python 3.11.7" in text
    assert "100 clients" in text and "3 SGD steps of 20" in text
    assert "| vfl | vfl (vfl 1.2.3) | 1,000 |" in text
    assert "| torch-loop | plain PyTorch loop (torch-loop 1.2.3) | 250 (4×) |" in text
    assert "| pfl | pfl-research (pfl 1.2.3) | 50 (20×) other work |" in text
    assert "| not installed (run benchmarks/peers jax) |" in text
    assert "| mlp | vfl | 0.1 | 2.5 | 321 | 900 … 4,000 | 30 × 3 | 1 | vmap, 50 |" in text


def test_the_table_and_the_plot_show_the_same_runs(tmp_path, capsys):
    found = report.summaries(RESULT["runs"])
    Console(width=120).print(throughput.table(found))
    shown = capsys.readouterr().out
    assert "1,000" in shown and "250 (4×)" in shown and "not installed" in shown
    throughput.plot(found, tmp_path / "throughput.png")
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": "other"}'])
def test_a_file_that_no_benchmark_wrote_is_named(tmp_path, content):
    (tmp_path / "strange.json").write_text(content)
    with pytest.raises(UsageError, match=r"strange\.json is not what a benchmark"):
        report.render([tmp_path / "strange.json"])


def test_nothing_to_render_says_what_to_run():
    with pytest.raises(UsageError, match=r"python -m benchmarks\.throughput"):
        report.render([])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory by process is read from /proc")
def test_peak_memory_counts_child_processes():
    before = peak_memory()
    held = 64_000_000
    code = f"import sys; held = b'x' * {held}; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as child:
        assert child.stdout.readline() == b"ready\n"
        during = peak_memory()
        child.stdin.close()
    assert during - before >= held


def test_rounds_are_timed_from_one_moment_to_the_next():
    assert gaps([1.0, 3.0, 3.5]) == [2.0, 0.5]
