"""Data sets written in other systems' forms, which read back as they were."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vfl.cli import main
from vfl.data import DATASETS, WRITERS, Dataset, Examples, Packed, cast, convert, load
from vfl.data.formats import flute, leaf, npz
from vfl.errors import UsageError

READERS = {"leaf": leaf, "flute_json": flute, "flute_hdf5": flute, "npz": npz}
X = np.random.default_rng(1).standard_normal((6, 2, 3)).astype(np.float32)
Y, U = np.array([2, 0, 1, 1, 0, 2]), np.array([0, 0, 0, 1, 2, 2])


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Three users, of whom the last two are in the test set too, in another order."""
    names = ["ann", "böb", 'c "quoted"']
    rows = {"x_test": X[[5, 4, 3]], "y_test": Y[[5, 4, 3]], "u_test": np.array([2, 2, 1])}
    np.savez(tmp_path / "source.npz", x_train=X, y_train=Y, u_train=U, users=np.array(names), **rows)
    return f"npz:{tmp_path / 'source.npz'}"


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_reads_back_as_it_was(form: str, source: str, tmp_path: Path) -> None:
    first = npz(source.partition(":")[2], root=tmp_path)
    written = convert(source, tmp_path / "a", form)
    assert [(w.split, w.path.is_file()) for w in written] == [("train", True), ("test", True)]
    again = READERS[form](str(tmp_path / "a"), root=tmp_path)
    assert again.classes == 3 and first.test is not None and again.test is not None
    for mine, other in ((again.train, first.train), (again.test, first.test)):
        assert mine.names == other.names and mine.packed.offsets.tolist() == other.packed.offsets.tolist()
        assert torch.equal(mine.packed.x, other.packed.x) and torch.equal(mine.packed.y, other.packed.y)
    assert not [path for path in (tmp_path / "a").rglob("*") if path.suffix == ".tmp"]


def test_from_form_to_form_to_form_nothing_is_lost(source: str, tmp_path: Path) -> None:
    steps = list(WRITERS)
    for n, form in enumerate(steps):
        convert(source, tmp_path / f"{n}", form)
        source = f"{form.partition('_')[0]}:{tmp_path / f'{n}'}"
    dataset = load(source)
    assert torch.equal(dataset.train.x, torch.from_numpy(X)) and dataset.train.y.tolist() == Y.tolist()


def toy(*, users: bool = True) -> Dataset:
    """A data set by another name whose clients are people."""
    examples = Examples(torch.from_numpy(X), torch.from_numpy(Y))
    return Dataset("toy", examples, Examples(*(t[:2] for t in examples)), 3, cast, users=U if users else None)


@pytest.mark.parametrize("form", ["leaf", "flute_json", "flute_hdf5"])
def test_what_is_interrupted_leaves_no_split_without_the_other(
    form: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(self: Packed, i: int) -> Examples:
        if self.population == 2:  # the test set, when the training set is written
            raise KeyboardInterrupt
        return Examples(self.x[:1], self.y[:1])

    monkeypatch.setattr(Packed, "client", client)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "a", form)
    assert not [path for path in (tmp_path / "a").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["a/b", "", "."])
def test_a_user_whose_name_hdf5_cannot_hold_is_named(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x_train=X, y_train=Y, u_train=U, users=np.array(["ann", name, "eve"]))
    with pytest.raises(UsageError, match=rf"the name of the user '{name}'; take the format flute_json"):
        convert(f"npz:{tmp_path / 's.npz'}", tmp_path / "a", "flute_hdf5")
    convert(f"npz:{tmp_path / 's.npz'}", tmp_path / "a", "flute_json")
    assert flute(str(tmp_path / "a"), root=tmp_path).train.names == ["ann", name, "eve"]


def test_users_without_names_are_numbered_and_the_test_set_is_one_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "toy", toy)
    convert("toy", tmp_path, "leaf")
    again = leaf(str(tmp_path), root=tmp_path)
    assert again.train.names == ["0", "1", "2"] and again.train.packed.sizes().tolist() == [3, 1, 2]
    assert again.test is not None and again.test.names == ["test"] and len(again.test.packed.y) == 2


def test_what_cannot_be_converted_is_said(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "toy", toy)
    with pytest.raises(UsageError, match="unknown format 'flute'; did you mean 'flute_"):
        convert(source, tmp_path, "flute")
    with pytest.raises(UsageError, match="toy:users=false has no users of its own"):
        convert("toy:users=false", tmp_path, "leaf")
    convert(source, tmp_path, "npz")
    with pytest.raises(UsageError, match=r"data\.npz is there already; remove it or name another folder"):
        convert(source, tmp_path, "npz")
    with pytest.raises(UsageError, match=r"cannot write .*; name another folder"):
        convert(source, tmp_path / "data.npz", "flute_json")


def test_the_command_writes_and_says_what(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "convert", source, str(tmp_path / "a"), "--format", "flute_hdf5"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert f"train: 3 users, 6 examples in {tmp_path / 'a' / 'train.hdf5'}\n" in said and "test: 2 users, 3 ex" in said
    with pytest.raises(SystemExit) as end:
        main(["data", "convert", source, str(tmp_path / "a"), "--format", "flute_hdf5"])
    assert end.value.code == 2 and "is there already" in capsys.readouterr().err
