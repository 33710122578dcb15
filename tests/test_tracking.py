"""Trackers take the metric stream and write below the run's folder; a resumed run goes on as the same one."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vfl import UsageError, runs
from vfl.cli import _main
from vfl.tracking import TRACKERS, trackers

CONFIG = {"seed": 3, "data": "digits", "about": "x" * 2000, "chunk": None}


def row(t: int) -> dict[str, Any]:
    """A round's metrics, of every kind there is."""
    return {"round": t, "train_loss": 1 / t, "clients": 4, "execution": "vmap", "stopping": False,
            "test_loss": float("nan"), "replicas": [{"replica": 0}]}  # fmt: skip


def played(spec: str, folder: Path, rounds: list[int]) -> None:
    with trackers(spec, folder, CONFIG) as track:
        for t in rounds:
            track(row(t))


class FakeMlflow:
    """What vfl uses of MLflow, with all of it kept."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self.experiments: dict[str, str] = {}
        self.names: list[str] = []
        self.params: dict[str, str] = {}
        self.metrics: list[tuple[str, str, float, int]] = []
        self.status: dict[str, str] = {}
        self.entities = SimpleNamespace(Param=lambda name, value: (name, value), Metric=lambda *given: given)

    def MlflowClient(self, uri: str) -> "FakeMlflow":  # noqa: N802
        self.uris.append(uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = name
        return name

    def get_run(self, run: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=dict(self.params)))

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.names.append(f"{experiment}/{run_name}")
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(self.names)}"))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        for name, value in params:
            assert self.params.setdefault(name, value) == value, "MLflow refuses to change a parameter"
        self.metrics += [(run, name, value, step) for name, value, _, step in metrics]

    def update_run(self, run: str, status: str) -> None:
        self.status[run] = status

    def set_terminated(self, run: str, status: str) -> None:
        self.status[run] = status


class FakeWandb:
    """What vfl uses of Weights & Biases, with all of it kept."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.codes: list[int] = []

    def Settings(self, **given: Any) -> dict[str, Any]:  # noqa: N802
        return given

    def init(self, **given: Any) -> "FakeWandb":
        self.inits.append(given)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeMlflow, FakeWandb]:
    mlflow, wandb = FakeMlflow(), FakeWandb()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return mlflow, wandb


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    return found.Reload()


def test_tensorboard_reads_back_what_was_tracked(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    played("tensorboard", tmp_path, [1, 2, 3])
    found = events(tmp_path)
    assert set(found.Tags()["scalars"]) == {"train_loss", "clients", "test_loss"}
    assert [(e.step, e.value) for e in found.Scalars("clients")] == [(1, 4), (2, 4), (3, 4)]
    assert [e.value for e in found.Scalars("train_loss")] == pytest.approx([1, 1 / 2, 1 / 3])
    assert b"data: digits" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_rounds_played_again_replace_those_of_an_earlier_attempt(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    played("tensorboard", tmp_path, [1, 2, 3, 4])
    played("tensorboard", tmp_path, [3, 4, 5])
    assert [e.step for e in events(tmp_path).Scalars("train_loss")] == [1, 2, 3, 4, 5]


def test_mlflow_takes_finite_numbers_and_parameters(tmp_path: Path, fakes: tuple[FakeMlflow, FakeWandb]) -> None:
    mlflow, _ = fakes
    played("mlflow", tmp_path / "run", [1, 2])
    assert mlflow.uris == [(tmp_path / "run" / "mlflow").as_uri()] and mlflow.names == ["vfl/run"]
    assert mlflow.metrics == [("run1", "train_loss", 1.0, 1), ("run1", "clients", 4.0, 1),
                              ("run1", "train_loss", 0.5, 2), ("run1", "clients", 4.0, 2)]  # fmt: skip
    assert mlflow.params == {"seed": "3", "data": "digits", "about": "x" * 500, "chunk": "None"}
    assert mlflow.status == {"run1": "FINISHED"}


def test_a_run_that_is_resumed_is_the_same_one_for_its_trackers(
    tmp_path: Path, fakes: tuple[FakeMlflow, FakeWandb]
) -> None:
    mlflow, wandb = fakes
    with pytest.raises(ZeroDivisionError), trackers("mlflow,wandb", tmp_path, CONFIG) as track:
        track(row(1))
        track(row(0))
    assert mlflow.status == {"run1": "FAILED"} and wandb.codes == [1]
    played("mlflow,wandb", tmp_path, [2])
    assert mlflow.names == [f"vfl/{tmp_path.name}"] and mlflow.status == {"run1": "FINISHED"}
    assert wandb.inits[0]["id"] == wandb.inits[1]["id"] and wandb.codes == [1, 0]
    runs.create(tmp_path, {}, overwrite=True)  # another run takes the folder
    played("mlflow,wandb", tmp_path, [1])
    assert len(mlflow.names) == 2 and wandb.inits[2]["id"] != wandb.inits[0]["id"]


def test_a_run_that_azure_gives_is_used_and_not_ended(
    tmp_path: Path, fakes: tuple[FakeMlflow, FakeWandb], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow, _ = fakes
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "azureml://here")
    monkeypatch.setenv("MLFLOW_RUN_ID", "theirs")
    mlflow.params = {"seed": "3.0"}  # as a sweep wrote what it chose
    played("mlflow", tmp_path, [1])
    assert mlflow.uris == ["azureml://here"] and not mlflow.names and not mlflow.status
    assert {run for run, *_ in mlflow.metrics} == {"theirs"}
    assert mlflow.params["seed"] == "3.0" and mlflow.params["data"] == "digits"


def test_wandb_is_offline_unless_the_environment_says_otherwise(
    tmp_path: Path, fakes: tuple[FakeMlflow, FakeWandb], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, wandb = fakes
    played("wandb", tmp_path, [1])
    monkeypatch.setenv("WANDB_MODE", "online")
    played("wandb", tmp_path, [2])
    assert [given["mode"] for given in wandb.inits] == ["offline", "online"]
    assert [given["settings"]["silent"] for given in wandb.inits] == [True, False]
    assert wandb.inits[0]["config"] == CONFIG and wandb.inits[0]["dir"] == str(tmp_path)
    assert [step for step, _ in wandb.logged] == [1, 2]
    assert wandb.logged[0][1].keys() == {"train_loss", "clients", "test_loss"}


def test_several_trackers_get_every_round_and_none_is_fine(tmp_path: Path, fakes: tuple[FakeMlflow, FakeWandb]) -> None:
    mlflow, wandb = fakes
    played(" mlflow , wandb ", tmp_path, [1, 2])
    assert len(wandb.logged) == 2 and len(mlflow.metrics) == 4
    played("", tmp_path / "none", [1])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_named_with_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mlflow", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"tracking with {name} needs its library .*`pip install vfl\[{name}\]`"):
        played(name, tmp_path, [1])


def test_a_wrong_name_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        played("tensorbord", tmp_path, [])
    with pytest.raises(UsageError, match="names wandb twice"):
        played("wandb,wandb", tmp_path, [])


@pytest.mark.parametrize("name", ["azureml_job", "azureml_sweep"])
def test_the_azure_templates_give_options_that_there_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = yaml.safe_load((Path(__file__).parent.parent / "scripts" / f"{name}.yml").read_text())
    trial = job.get("trial", job)
    assert trial["distribution"]["type"] == "pytorch"
    words = trial["command"].split()
    assert words[:4] == ["python", "-m", "vfl", "run"]
    for kind, field in re.findall(r"\$\{\{(\w+)\.(\w+)\}\}", trial["command"]):
        assert field in job[kind]
    with pytest.raises(SystemExit):
        _main([*words[3:5], "--help"])
    known = capsys.readouterr().out
    assert not [word for word in words if word.startswith("--") and word != "--track" and word not in known]
