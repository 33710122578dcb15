"""`vfl list`, `vfl show`, `vfl data`, and the algorithms that installed packages offer."""

import dataclasses
import functools
import hashlib
import http.server
import io
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vfl import UsageError, runs
from vfl.algorithms import algorithms, load_algorithm
from vfl.cli import data as data_command
from vfl.cli import main
from vfl.cli.catalog import TABLES, List, summary, usage
from vfl.cli.data import DataConvert, DataGet, DataShow
from vfl.cli.inspect import Show
from vfl.data.download import SOURCES, Source
from vfl.spec import parse

Package = Callable[..., None]

MINE = '''
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Mine:
    """My algorithm: it does
    nothing.

    More about it."""

    mu: float = 0.5
    local_lr: float = 0.1

    def build(self, task, population):
        return None

def function(): ...

class Plain:
    def build(self, task, population): ...
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Installs a package of this name that offers these algorithms; its module is `<name>_module`."""

    def install(name: str, code: str = MINE, **offers: str) -> None:
        site = tmp_path / "site" / name
        about = site / f"{name}-2.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
        targets = "".join(f"{offer} = {name}_module:{target}\n" for offer, target in offers.items())
        (about / "entry_points.txt").write_text(f"[vfl.algorithms]\n{targets}")
        (site / f"{name}_module.py").write_text(code)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)

    return install


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def row(round: int, **scores: float | None) -> dict[str, Any]:
    costs = {"bits_up": 1e6 * round, "bits_down": 2e6 * round, "gradients": 100.0 * round}
    return {"round": round, "train_loss": 1 / round, **costs, "clients": 5, "dropped": 0, "chunk": 5,
            "execution": "vmap", "seconds": 30.0, **scores}  # fmt: skip


def write_run(folder: Path, history: list[dict[str, Any]], **options: Any) -> Path:
    """A run's folder."""
    config = {"algorithm": "mine", "data": "digits", "model": "mlp", "rounds": 50, "mu": 0.5, "local_lr": 0.1}
    runs.create(folder, config | options, overwrite=False)
    log = runs.MetricsLog(folder)
    for metrics in history:
        log.write(metrics)
    log.close()
    return folder


def cells(text: str, title: str) -> dict[str, list[str]]:
    """The rows under a title until the next empty line: first cell → the others."""
    lines = text.splitlines()
    body = lines[lines.index(title) + 1 :]
    body = body[: body.index("")] if "" in body else body
    return {parts[0].strip(): parts[1:] for line in body if (parts := [p for p in line.split("  ") if p.strip()])}


# --- algorithms of installed packages ---


def test_algorithms_of_any_package_are_found_without_importing_them(package: Package) -> None:
    package("other", "raise RuntimeError('imported')", broken="Mine")
    assert algorithms()["broken"].value == "other_module:Mine"
    assert "other_module" not in sys.modules


def test_an_algorithm_is_loaded_by_its_name(package: Package) -> None:
    package("other", mine="Mine")
    assert load_algorithm("mine").__name__ == "Mine"


def test_an_unknown_algorithm_is_an_error_with_the_nearest_name(package: Package) -> None:
    package("other", my_algorithm="Mine")
    with pytest.raises(UsageError, match="unknown algorithm 'my_algoritm'; did you mean 'my_algorithm'"):
        load_algorithm("my_algoritm")


@pytest.mark.parametrize(
    ("code", "target", "reason"),
    [("import no_such_module", "Mine", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
     ("1 / 0", "Mine", "cannot be imported: ZeroDivisionError"),
     (MINE, "Missing", "cannot be imported: AttributeError"),
     (MINE, "function", "must be a dataclass with a method build"),
     (MINE, "Plain", "must be a dataclass with a method build"),
     (MINE.replace("def build", "def make"), "Mine", "must be a dataclass with a method build")],
)  # fmt: skip
def test_an_entry_point_that_is_no_algorithm_is_an_error_that_names_it(
    code: str, target: str, reason: str, package: Package
) -> None:
    package("other", code, mine=target)
    with pytest.raises(UsageError, match=rf"algorithm 'mine' \(other_module:{target} of other 2\.0\) {reason}"):
        load_algorithm("mine")


def test_a_name_that_two_packages_define_is_an_error_that_names_both(package: Package) -> None:
    package("first", mine="Mine", own="Mine")
    package("second", mine="Mine")
    with pytest.raises(UsageError, match=r"'mine' is defined by first 2\.0 and second 2\.0"):
        load_algorithm("mine")
    assert load_algorithm("own").__name__ == "Mine"


def test_without_any_algorithm_the_error_says_that_vfl_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfl.algorithms.entry_points", lambda group: [])
    with pytest.raises(UsageError, match="no algorithms are installed"):
        load_algorithm("fedavg")


# --- vfl list ---


def test_list_shows_an_algorithm_with_its_package_and_its_first_paragraph(
    package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    package("other", mine="Mine")
    List("algorithms").run()
    assert cells(capsys.readouterr().out, "algorithms: vfl run NAME")["mine"] == [
        "other 2.0", "My algorithm: it does nothing.",
    ]  # fmt: skip


def test_list_shows_a_broken_package_beside_the_others(package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    package("other", "1 / 0", broken="Mine")
    package("good", mine="Mine")
    List("algorithms").run()
    found = cells(capsys.readouterr().out, "algorithms: vfl run NAME")
    assert found["broken"][1].startswith("broken: ") and "ZeroDivisionError" in found["broken"][1]
    assert found["mine"][0] == "good 2.0"


@pytest.mark.parametrize("kind", list(TABLES))
def test_list_shows_every_entry_of_a_registry_as_it_is_written(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    List(kind).run()
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [parse(line.split()[0].replace("[", "")).name for line in lines] == list(TABLES[kind][1])


def test_list_without_a_kind_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    List().run()
    titles = [line.partition(":")[0] for line in ("\n" + capsys.readouterr().out).split("\n\n")]
    assert [title.strip() for title in titles] == ["algorithms", *TABLES]


@pytest.mark.parametrize(
    ("kind", "name", "written"),
    [("models", "mlp", "mlp[:SIZES,…]"), ("data", "mnist", "mnist"), ("partitions", "shards", "shards:SHARDS"),
     ("partitions", "dirichlet", "dirichlet:ALPHA[,min=0]"), ("samplers", "fixed", "fixed[:IDS,…]"),
     ("optimizers", "lars", "lars[:momentum=0.9,weight_decay=0.0005,trust=0.001]"),
     ("schedules", "multistep", "multistep[:MILESTONES,…,factor=0.1]")],
)  # fmt: skip
def test_usage_shows_what_a_user_writes_and_nothing_that_vfl_fills_in(kind: Any, name: str, written: str) -> None:
    assert usage(name, TABLES[kind][1][name]) == written


def test_every_registered_entry_says_what_it_is() -> None:
    entries = {f"{kind} {name}": f for kind, (_, table) in TABLES.items() for name, f in table.items()}
    assert not [name for name, function in entries.items() if not summary(function).endswith((".", ".)"))]


def test_data_that_can_be_downloaded_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    List("data").run()
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0].partition("[")[0] for line in lines if "vfl data get" in line} == set(SOURCES)


# --- vfl show ---


def test_show_gives_options_scores_totals_and_files(
    package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package("other", mine="Mine")
    history = [row(t, **({"test_accuracy": t / 10, "test_loss": 1 / t} if t % 2 else {})) for t in range(1, 7)]
    history[4]["test_accuracy"] = 0.2
    run = write_run(tmp_path / "run", history, mu=0.25, seed=0, partition="iid")
    Show((run,)).run()
    out = capsys.readouterr().out
    options = cells(out, str(run))
    assert {name: value[0].strip() for name, value in options.items()} == {
        "algorithm": "mine", "data": "digits", "model": "mlp", "rounds": "50", "mu": "0.25", "partition": "iid",
    }  # fmt: skip
    scores = cells(out, "round 6/50")
    assert [cell.strip() for cell in scores["test accuracy"]] == ["0.2000", "0.3000", "3", "▁█▅"]
    assert [cell.strip() for cell in scores["test loss"]] == ["0.2000", "0.2000", "5", "█▂▁"]
    assert scores["train loss"][0].strip() == "0.1667" and len(scores["train loss"]) == 2
    totals = {name: value[0].strip() for name, value in cells(out, "totals").items()}
    assert totals["uplink"] == "6 Mbit" and totals["downlink"] == "12 Mbit" and totals["sample-gradients"] == "600"
    assert totals["clients trained"] == "30" and totals["time"] == "0:03:00, without evaluation"
    assert set(cells(out, "files")) == {"config.yaml", "metrics.jsonl"}


def test_show_gives_all_options_of_an_algorithm_that_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [row(1)], algorithm="gone")
    Show((run,)).run()
    assert set(cells(capsys.readouterr().out, str(run))) == {
        "algorithm", "data", "model", "rounds", "mu", "local-lr",
    }  # fmt: skip


def test_show_says_what_a_run_without_rounds_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [])
    Show((run,)).run()
    assert "round 0/50" in capsys.readouterr().out


def test_show_counts_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [row(1)])
    (run / runs.BEST).write_bytes(b"x" * 300)
    for t in (50, 100):
        runs.write_atomically(run / runs.CHECKPOINTS / f"round-{t:08d}.safetensors", b"x" * 500)
    Show((run,)).run()
    files = cells(capsys.readouterr().out, "files")
    assert files["best.safetensors"][0].strip() == "300 B"
    (saved,) = files["checkpoints/"]
    assert saved.strip() == "1 kB, 2 of them, the newest of round 100"


def test_show_compares_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", [row(1, test_accuracy=0.5), row(2, test_accuracy=0.25)], mu=0.25)
    two = write_run(tmp_path / "two", [row(1)], mu=1.0, local_lr=0.5, clip_norm=None)
    Show((one, two)).run()
    out = capsys.readouterr().out
    scores = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:5]}
    assert scores["one"] == ["2/50", "0.2500", "0.5000", "@1", "0.5000", "2", "Mbit", "200", "0:01:00"]
    assert scores["two"] == ["1/50", "-", "-", "1.0000", "1", "Mbit", "100", "0:00:30"]
    options = cells(out, "what differs")
    assert options["one"][0].strip() == "mu=0.25 local-lr=0.1"
    assert options["two"][0].strip() == "mu=1.0 local-lr=0.5"


def test_show_compares_regression_runs_by_their_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [row(1, test_loss=0.5), row(2, test_loss=0.75)]
    Show((write_run(tmp_path / "one", losses), write_run(tmp_path / "two", [row(1)]))).run()
    assert "2/50 0.7500 0.5000 @1" in " ".join(capsys.readouterr().out.split())


def test_show_draws_only_when_asked_and_says_where(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra: pip install vfl[plots]")
    one, two = (write_run(tmp_path / name, [row(1), row(2)]) for name in ("one", "two"))
    Show((one,)).run()
    Show((one, two)).run()
    assert not (one / runs.CURVES).exists() and not list(here.iterdir())
    for command, picture in (
        (Show((one,), plot=True), one / runs.CURVES),
        (Show((two,), x_axis="bits_up"), two / runs.CURVES),
        (Show((one, two), plot=True), Path("comparison.png")),
        (Show((one, two), out=tmp_path / "both.png"), tmp_path / "both.png"),
    ):
        capsys.readouterr()
        command.run()
        assert capsys.readouterr().out.splitlines()[-1] == f"plot   {picture}"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_runs_of_the_same_name_are_told_apart_by_their_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [write_run(tmp_path / name / "run", [row(1)]) for name in ("one", "two")]
    Show(tuple(same)).run()
    out = capsys.readouterr().out
    assert all(out.count(str(folder)) == 2 for folder in same)


def test_show_of_no_run_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the folder of a run: it has no config"):
        Show((tmp_path,)).run()
    with pytest.raises(UsageError, match="at least one run"):
        Show(()).run()


# --- vfl data ---


def test_data_show_prints_sizes_and_labels_and_draws_the_picture(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra: pip install vfl[plots]")
    DataShow("digits", partition="labels:2", clients=30, seed=1).run()
    out = capsys.readouterr().out
    facts = {name: value[0].strip() for name, value in cells(out, "digits, labels:2").items()}
    assert facts["clients"] == "30" and facts["training examples"] == "1,437" and facts["classes"] == "10"
    assert facts["one input"] == "1×8×8, uint8" and facts["labels a client"] == "2.0 of 10, mean"
    rows = [line.split() for line in out.splitlines() if len(line.split()) == 12 and line.split()[0].isdigit()]
    assert [r[0] for r in rows] == [str(i) for i in range(20)]
    assert all(int(r[1]) == sum(int(n) for n in r[2:] if n != "·") and r.count("·") == 8 for r in rows)
    picture = "digits-labels-2-30-clients.png"
    assert out.splitlines()[-1] == f"plot   {picture}"
    assert (here / picture).read_bytes().startswith(b"\x89PNG")


def test_data_show_takes_another_file_for_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra: pip install vfl[plots]")
    picture = tmp_path / "deep" / "labels.svg"
    DataShow("synthetic:features=3,examples=4", clients=5, out=picture).run()
    assert "<svg" in picture.read_text() and str(picture) in capsys.readouterr().out


def test_without_matplotlib_data_show_still_prints_its_tables(
    monkeypatch: pytest.MonkeyPatch, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    DataShow("digits").run()
    out = capsys.readouterr().out
    assert "training examples" in out and out.splitlines()[-1].startswith("no picture: plots need matplotlib")
    with pytest.raises(UsageError, match=r"pip install vfl\[plots\]"):
        DataShow("digits", out=here / "labels.png").run()


def test_labels_that_do_not_fit_the_width_are_left_to_the_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for classes, fits in ((5, True), (50, False)):
        DataShow(f"synthetic:classes={classes}", clients=5, out=tmp_path / "labels.png").run()
        assert ("examples of each label" in capsys.readouterr().out) == fits


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that has the files of a data set `tiny`, the second with more than 10 MB."""
    folder = tmp_path / "web"
    folder.mkdir()
    files = {"a.bin": b"a" * 3000, "b.bin": b"b" * 12_000_000}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in files.items()}

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as httpd:
        address = f"http://127.0.0.1:{httpd.server_address[1]}/"
        monkeypatch.setitem(SOURCES, "tiny", Source((address,), sums))
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield address
        httpd.shutdown()
        thread.join()


def test_data_get_reports_plain_lines_without_a_terminal(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DataGet("tiny", tmp_path / "root").run()
    folder = tmp_path / "root" / "tiny"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a.bin  3 kB of 3 kB" and lines[-1] == f"tiny is in {folder}"
    assert len(lines) == 4 and lines[1].startswith("b.bin  10") and lines[2] == "b.bin  12 MB of 12 MB"
    assert (folder / "a.bin").stat().st_size == 3000
    DataGet("tiny", tmp_path / "root").run()
    assert capsys.readouterr().out.splitlines() == [f"tiny is in {folder}"]


def test_data_get_shows_a_bar_a_file_in_a_terminal(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(data_command, "terminal", lambda: Console(file=file, force_terminal=True, width=100))
    DataGet("tiny", tmp_path, url=server).run()
    last = file.getvalue().rpartition("a.bin")[2]
    assert "━" in last and "12.0/12.0 MB" in last


# --- as commands ---


@pytest.mark.parametrize(
    ("argv", "text"),
    [(["list", "models"], "mlp[:SIZES,…]"), (["list"], "schedules: "), (["show", "RUN"], "round 2/50"),
     (["show", "RUN", "RUN", "--x-axis", "bits_up"], "2 runs"), (["data", "get", "tiny"], "tiny is in"),
     (["data", "show", "digits", "--clients", "5"], "plot  ")],
)  # fmt: skip
def test_commands_run_from_the_command_line(
    argv: list[str], text: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("VFL_DATA", str(tmp_path / "data"))
    run = write_run(tmp_path / "run", [row(1), row(2)])
    with pytest.raises(SystemExit) as end:
        main([str(run) if arg == "RUN" else arg for arg in argv])
    assert end.value.code == 0 and text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "text"),
    [(["list", "model"], "'model'"), (["show", "here"], "is not the folder of a run"),
     (["data", "convert", "femnist"], "`vfl data convert` needs FOLDER, --format; `vfl data convert --help` says"),
     (["show"], "at least one run"), (["data", "get", "digits"], "needs no download"),
     (["data", "get", "mnst"], "did you mean 'mnist'"), (["data", "show", "digits", "--partition", "iidd"], "'iid'")],
)  # fmt: skip
def test_bad_input_ends_with_code_2_and_one_message(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize("command", [List, Show, DataGet, DataShow, DataConvert])
def test_every_option_has_a_help_text(command: type, capsys: pytest.CaptureFixture[str]) -> None:
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = Path(sys.modules[command.__module__].__file__ or "").read_text()
    for field in dataclasses.fields(command):
        body = source.partition(f"class {command.__name__}")[2].partition(f"    {field.name}:")[2]
        about = " ".join(body.partition('"""')[2].partition('"""')[0].split())
        assert about and about in text
