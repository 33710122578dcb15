"""A run's folder: files that survive a crash whole, and what readers of them meet."""

import errno
import json
import math
import os
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml
from cli_runs import tree

from vfl import UsageError, runs

CONFIG = {"algorithm": "fedavg", "rounds": 3, "clients": None, "local_lr": 0.1, "data": "α"}


def full_disk(*arguments: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_else(step, tmp_path, monkeypatch):
    runs.write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError):
        runs.write_atomically(tmp_path / "file", b"new content")
    assert tree(tmp_path) == {"file": b"old"}


def test_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append(("fsync", os.fstat(f).st_size)), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", Path(b).name)), replace(a, b)))
    runs.write_atomically(tmp_path / "file", b"12345")
    assert events == [("fsync", 5), ("replace", "file")]


def test_a_folder_is_created_with_its_configuration(tmp_path):
    folder = runs.create(tmp_path / "a" / "b", CONFIG)
    assert folder == tmp_path / "a" / "b" and runs.is_run(folder)
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) == CONFIG
    assert runs.read_config(folder / "config.yaml") == CONFIG
    assert list(tree(folder)) == ["config.yaml"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "model.safetensors", "curves.png", "checkpoints"])
def test_no_file_of_a_run_is_overwritten_unasked(name, tmp_path):
    if name == "checkpoints":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="already holds a run; continue it with --resume, replace it with --overwrite"):
        runs.create(tmp_path, CONFIG)
    assert tree(tmp_path) == before


def test_overwriting_takes_the_old_runs_files_and_no_others(tmp_path):
    runs.create(tmp_path, {"algorithm": "old"})
    (tmp_path / "checkpoints").mkdir()
    old = ["metrics.jsonl", "model.safetensors", "curves.png", "best.safetensors", "trace.json",
           "checkpoints/round-00000005.safetensors"]  # fmt: skip
    for name in [*old, ".metrics.jsonl.1.tmp", "checkpoints/.round-00000009.safetensors.7.tmp", "notes.txt"]:
        (tmp_path / name).write_text("old")
    runs.create(tmp_path, CONFIG, overwrite=True)
    assert set(tree(tmp_path)) == {"config.yaml", "checkpoints", "notes.txt"}
    assert runs.read_config(tmp_path / "config.yaml") == CONFIG


def test_a_taken_name_gets_a_number(tmp_path):
    found = [runs.create(tmp_path / "runs" / "now", CONFIG, numbered=True) for _ in range(3)]
    assert [folder.name for folder in found] == ["now", "now-2", "now-3"]
    assert all(runs.is_run(folder) for folder in found)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        for numbered in (False, True):
            if folder.exists() and numbered:
                continue  # another name is free
            with pytest.raises(UsageError, match=f"cannot write {folder}: .*; name another folder with --out"):
                runs.create(folder, CONFIG, numbered=numbered)
    assert tree(tmp_path) == {"file": b""}


def test_what_a_killed_writer_left_is_cleared_when_the_run_goes_on(tmp_path):
    runs.create(tmp_path, CONFIG)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".config.yaml.12.tmp").write_text("half")
    (tmp_path / "checkpoints" / ".round-00000009.safetensors.12.tmp").write_text("half")
    (tmp_path / "checkpoints" / "round-00000008.safetensors").write_text("whole")
    (tmp_path / ".hidden").write_text("mine")
    runs.reopen(tmp_path, CONFIG | {"rounds": 9})
    assert set(tree(tmp_path)) == {"config.yaml", ".hidden", "checkpoints", "checkpoints/round-00000008.safetensors"}
    assert runs.read_config(tmp_path / "config.yaml")["rounds"] == 9


def test_a_launch_knows_its_own_run(tmp_path):
    runs.create(tmp_path / "a", CONFIG, launch="one")
    runs.create(tmp_path / "b", CONFIG)
    assert runs.launched_by(tmp_path / "a", "one")
    assert not runs.launched_by(tmp_path / "a", "two")
    assert not runs.launched_by(tmp_path / "b", "one")
    runs.create(tmp_path / "a", CONFIG, overwrite=True)
    assert not runs.launched_by(tmp_path / "a", "one")


# --- metrics ---


def log_of(folder: Path, *rows: dict, rounds: int = 0) -> None:
    log = runs.MetricsLog(folder, rounds)
    for row in rows:
        log.write(row)
    log.close()


def test_a_round_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = runs.MetricsLog(tmp_path)
    log.write({"round": 1, "train_loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 1, "train_loss": 0.5}\n'
    log.close()


def test_what_is_no_number_in_json_is_written_as_null(tmp_path):
    log_of(tmp_path, {"round": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": "vmap"})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"round": 1, "a": None, "b": None, "c": None, "d": 1.5, "e": "vmap"}


def test_numbers_keep_every_digit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 1e-300, 12345678901234.0]
    log_of(tmp_path, {"round": 1, "values": values})
    assert runs.read_metrics(tmp_path)[0]["values"] == values


def test_rounds_after_the_checkpoint_are_dropped_and_a_cut_line_too(tmp_path):
    log_of(tmp_path, *({"round": t, "first": True} for t in (1, 2, 3)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "fir')
    assert [row["round"] for row in runs.read_metrics(tmp_path)] == [1, 2, 3]
    log_of(tmp_path, *({"round": t, "first": False} for t in (3, 4)), rounds=2)
    rows = runs.read_metrics(tmp_path)
    assert [(row["round"], row["first"]) for row in rows] == [(1, True), (2, True), (3, False), (4, False)]


def test_a_damaged_line_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": \n{"round": 3}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2: not JSON .*; remove the line to go on"):
        runs.read_metrics(tmp_path)


def test_metrics_that_are_not_there_are_no_rounds(tmp_path):
    assert runs.read_metrics(tmp_path) == []


def test_metrics_that_cannot_be_written_are_an_error_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UsageError, match=r"cannot write .*metrics\.jsonl: No space left on device; then --resume"):
        runs.MetricsLog(tmp_path)


# --- tensors ---


def test_tensors_come_back_to_the_bit_with_their_metadata(tmp_path):
    wanted = {"a": torch.tensor([0.1, math.nan, -0.0]), "b": torch.arange(6).reshape(2, 3).T, "c": torch.tensor(True)}
    runs.write_tensors(tmp_path / "x.safetensors", wanted, {"round": "7"})
    found, metadata = runs.read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"round": "7"}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_tensors_that_cannot_be_read_are_an_error_that_names_the_file(damage, tmp_path):
    path = tmp_path / "x.safetensors"
    runs.write_tensors(path, {"a": torch.zeros(100)}, {})
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[:-40], "empty": b"", "garbage": b"\xff" * 500}[damage])
    with pytest.raises(UsageError, match=rf"^{path} cannot be read \(.*\); delete it to go on from the one before$"):
        runs.read_tensors(path)


def test_tensors_that_cannot_be_written_are_an_error_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UsageError, match=r"cannot write .*x\.safetensors: No space left on device"):
        runs.write_tensors(tmp_path / "x.safetensors", {}, {})
    assert tree(tmp_path) == {}


# --- configurations ---


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"a: [", "is not valid YAML"), (b"\xff\xfe\x00", "is not valid YAML"), (b"", "must hold one `option: value`"),
     (b"- a\n", "must hold one `option: value`"), (b"3: 4\n", "must hold one `option: value`"),
     (b"!!python/object/apply:os.getcwd []\n", "is not valid YAML"), (None, "cannot read the configuration")],
)  # fmt: skip
def test_a_configuration_that_is_none_is_an_error_of_one_line_that_names_the_file(content, says, tmp_path):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        runs.read_config(path)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
