"""LEAF's, FLUTE's and TensorFlow Federated's files: read in a stream, in any order, and refused with the place."""

import json
import logging
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from cli_runs import here, metrics, vfl

from vfl.data import Dataset, Normalize, as_stored, federate, federated, from_leaf, json_stream, load, tff
from vfl.data.json_stream import Entry, entries
from vfl.errors import UsageError

__all__ = ["here"]  # a fixture
Users = dict[str, tuple[Any, Any]]  # name → x, y
PEOPLE: Users = {"ann": ([[1.5, 2], [3, 4]], [0, 2]), "böb": ([[5, 6]], [1]), "nobody": ([], [])}


def flute(path: Path, people: Users = PEOPLE, **changes: Any) -> Path:
    """A file of FLUTE's form, by its ending, with these sections changed (None: left out)."""
    sections = {
        "users": list(people),
        "num_samples": [len(y) for _, y in people.values()],
        "user_data": {name: {"x": x} for name, (x, _) in people.items()},
        "user_data_label": {name: y for name, (_, y) in people.items()},
    } | changes
    sections = {name: value for name, value in sections.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(sections), encoding="utf-8")
        return path
    with h5py.File(path, "w") as file:
        for name in ("users", "num_samples"):
            if name in sections:
                file[name] = sections[name]
        for user, own in sections.get("user_data", {}).items():
            for column, values in own.items():
                file[f"user_data/{user}/{column}"] = values
        for user, y in sections.get("user_data_label", {}).items():
            file[f"user_data_label/{user}"] = y
    return path


def of(dataset: Dataset) -> list[tuple[list, list]]:
    """Each client's x and y."""
    clients = federate(dataset).clients
    return [tuple(column.tolist() for column in clients.client(i)) for i in range(clients.population)]


# JSON as a stream


AWKWARD: dict[str, Any] = {
    "users": ['a "quoted" \\ one', "{[", "\U0001f600é\n", ""],
    "empty": {},
    "number": -12345.678e-9,
    "user_data": {"]}": {"x": [[], [1, [2.5, -3e5]], "}"], "y": None}, "": True, "\\": "\\\\", '"': [1e-300, 12]},
    "deep": {"a": {"b": {"c": [{"d": [0]}]}}},
    "last": 7,
}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 16])
@pytest.mark.parametrize("style", [{}, {"indent": 3, "ensure_ascii": False}, {"separators": (",", ":")}], ids=str)
def test_a_stream_of_a_json_file_is_what_the_whole_is(
    block: int, style: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(" " + json.dumps(AWKWARD, **style) + "\n", encoding="utf-8")
    wanted = []
    for section, value in AWKWARD.items():
        wanted += [Entry(section, *each) for each in value.items()] if isinstance(value, dict) else [
            Entry(section, None, value)
        ]  # fmt: skip
    assert list(entries(path, "LEAF", "remedy")) == wanted


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "expected { at character 1, not the end"),
        ('{"users": ["a" "b"]}', "in users (ValueError: Expecting ',' delimiter at character 16)"),
        ('{"user_data": {"a": [1, 2], "b": [1, 2', "in user_data, after b (ValueError: Expecting ',' delimiter at"),
        ('{"user_data": {"a": "endless}}', "in user_data, after a (ValueError: Unterminated string at"),
        ('{"user_data": {"a": 1 "b": 2}}', "in user_data, after a (ValueError: expected , or } at character 23"),
        ('{"users": [1],}', 'in users (ValueError: expected " at character 15)'),
        ('{"users" [1]}', "(ValueError: expected : at character 10, not [)"),
        ('{"users": [1]', "in users (ValueError: expected , or } at character 14, not the end)"),
        ('{"users": 12', "in users (ValueError: expected , or } at character 13, not the end)"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 16])
def test_a_json_error_says_where_it_is(
    block: int, content: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        list(entries(path, "FLUTE", "make it anew"))
    assert str(error.value).startswith(f"{path} is damaged: it is not of FLUTE's form") and says in str(error.value)


def test_reading_holds_no_second_copy_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", 1 << 12)  # small beside the data
    draw = np.random.default_rng(0)
    x = draw.integers(0, 100, (100, 10, 200)).astype(np.float32)  # 0.8 MB, 100 users
    names = [f"user {i}" for i in range(100)]
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["users"], file["num_samples"] = names, [10] * 100
        for name, own in zip(names, x, strict=True):
            file[f"user_data/{name}/x"], file[f"user_data_label/{name}"] = own, np.zeros(10, np.int64)
    with (tmp_path / "a.json").open("w") as file:  # JSON's objects of all this would take 5 MB
        users = ", ".join(f'"{n}": {{"x": {own.astype(int).tolist()}, "y": {[0] * 10}}}' for n, own in
                          zip(names, x, strict=True))  # fmt: skip
        file.write(f'{{"user_data": {{{users}}}, "users": {json.dumps(names)}}}')
    for spec in (f"flute:{tmp_path / 'a.hdf5'}", f"leaf:{tmp_path / 'a.json'}"):
        tracemalloc.start()
        dataset = load(spec)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert torch.equal(dataset.train.x, torch.from_numpy(x).flatten(0, 1))
        assert peak < 1.4 * x.nbytes, spec


# FLUTE


@pytest.mark.parametrize("ending", ["json", "hdf5"])
def test_flute_has_a_client_a_user_in_the_files_order(ending: str, tmp_path: Path) -> None:
    dataset = load(f"flute:{flute(tmp_path / f'a.{ending}')}")
    assert of(dataset) == [([[1.5, 2], [3, 4]], [0, 2]), ([[5, 6]], [1]), ([], [])]
    assert (dataset.train.x.dtype, dataset.train.y.dtype, dataset.classes) == (torch.float32, torch.int64, 3)
    assert dataset.test is None


def test_labels_may_stand_before_the_inputs_and_in_another_order(tmp_path: Path) -> None:
    data = {name: {"x": x} for name, (x, _) in PEOPLE.items()}
    labels = {name: PEOPLE[name][1] for name in reversed(PEOPLE)}
    sections = {"user_data_label": labels, "num_samples": [2, 1, 0], "user_data": data, "users": list(PEOPLE)}
    (tmp_path / "a.json").write_text(json.dumps(sections))
    assert of(load(f"flute:{tmp_path / 'a.json'}")) == of(load(f"flute:{flute(tmp_path / 'b.json')}"))


def test_the_shards_and_the_splits_of_a_folder_are_found(tmp_path: Path) -> None:
    for split, shard, users in (("train", 0, ["ann"]), ("train", 1, ["ann", "böb"]), ("test", 0, ["böb"])):
        flute(tmp_path / f"{split}_{shard}.json", {name: PEOPLE[name] for name in users})
    dataset = load(f"flute:{tmp_path}")
    assert [y for _, y in of(dataset)] == [[0, 2, 0, 2], [1]]
    assert dataset.test is not None and dataset.test.x.tolist() == [[5, 6]]
    other = load("flute:train_1.json,test=test_0.json", tmp_path)  # looked for in the data root
    assert other.offsets is not None and other.offsets.tolist() == [0, 2, 3] and other.test is not None
    flute(tmp_path / "train.hdf5")
    with pytest.raises(UsageError, match="holds files of several forms; name one file"):
        load(f"flute:{tmp_path}")


def test_a_folder_whose_files_say_no_split_is_a_training_set(tmp_path: Path) -> None:
    flute(tmp_path / "data" / "a.json")
    assert len(load(f"flute:{tmp_path / 'data'}").train.y) == 3
    flute(tmp_path / "data" / "test.json")
    with pytest.raises(UsageError, match=r"a\.json says neither train nor test, but test\.json beside it does"):
        load(f"flute:{tmp_path / 'data'}")
    (tmp_path / "data" / "a.json").unlink()
    with pytest.raises(UsageError, match="holds a test set alone; name its file to train on it"):
        load(f"flute:{tmp_path / 'data'}")
    assert len(load(f"flute:{tmp_path / 'data' / 'test.json'}").train.y) == 3
    with pytest.raises(UsageError, match="holds no file that ends in"):
        load(f"tff:{tmp_path / 'data'}")
    with pytest.raises(UsageError, match="there is no elsewhere, neither from here nor in"):
        load("flute:elsewhere")


@pytest.mark.parametrize("ending", ["json", "hdf5"])
def test_a_wrong_num_samples_is_reported_with_user_and_file(
    ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = flute(tmp_path / f"a.{ending}", num_samples=[2, 5, 0])
    with caplog.at_level(logging.WARNING, "vfl"):
        dataset = load(f"flute:{path}")
    assert len(dataset.train.y) == 3
    assert caplog.messages == [
        "num_samples is wrong for 1 of 3 users: it promises 7 examples, but the files hold 3, and those count "
        f"(the first: böb in {path}, 5 promised, 1 there)"
    ]


@pytest.mark.parametrize("ending", ["json", "hdf5"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"users": None}, "it has no users"),
        ({"users": ["ann", "böb", "nobody", "ann"], "num_samples": None}, "user ann stands twice among its users"),
        ({"num_samples": [1]}, "its users and num_samples are no two lists of one length"),
        ({"users": ["ann", "eve", "nobody"]}, "user eve has no inputs in user_data"),
        ({"users": ["ann", "böb"], "num_samples": [2, 1]}, "user nobody has data, but does not stand among its users"),
        ({"user_data_label": None}, "user ann has no targets, neither in user_data nor in user_data_label"),
        ({"user_data_label": {"ann": [0], "böb": [1], "nobody": []}}, "user ann has 2 inputs, but 1 targets"),
        ({"user_data_label": {"ann": 3, "böb": [1], "nobody": []}}, "user ann: y is no list"),
        ({"user_data_label": {"ann": ["a", "b"], "böb": ["c"], "nobody": []}}, "user ann: numbers are wanted, not "),
        ({"user_data": {"ann": {"x": [[1], [2]]}, "böb": {"x": [[1, 2]]}, "nobody": {"x": []}}},
         "one example's x has the shape [2], but user ann's has [1]; all must agree"),
    ],
)  # fmt: skip
def test_a_broken_file_of_flutes_is_named_with_the_place(
    ending: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    if ending == "hdf5" and "user_data" in changes:
        for own in changes["user_data"].values():
            own["x"] = np.array(own["x"], np.float32)
    path = flute(tmp_path / f"a.{ending}", **changes)
    with pytest.raises(UsageError) as error:
        load(f"flute:{path}")
    assert str(error.value).startswith(f"{path} is damaged: ") and says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mark_of_the_byte_order_before_json_is_none_of_it(tmp_path: Path) -> None:
    path = flute(tmp_path / "a.json")
    wanted = of(load(f"flute:{path}"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert of(load(f"flute:{path}")) == wanted


def test_a_folder_without_such_files_and_files_without_examples_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"flute: .* holds no file that ends in \.json, .* or \.hdf5, \.h5; name"):
        load(f"flute:{tmp_path}")
    path = flute(tmp_path / "a.json", {"nobody": ([], [])})
    with pytest.raises(UsageError, match=r"there is not an example in .*a\.json; name the files of one split"):
        load(f"flute:{path}")


def test_a_cut_or_a_foreign_hdf5_file_is_named(tmp_path: Path) -> None:
    path = flute(tmp_path / "a.hdf5")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UsageError, match=r"a\.hdf5 is damaged: it cannot be read .*truncated"):
        load(f"flute:{path}")
    path.write_bytes(b"{}")
    with pytest.raises(UsageError, match=r"a\.hdf5 is damaged: it cannot be read .*signature not found"):
        load(f"flute:{path}")
    flute(tmp_path / "b.hdf5")
    with pytest.raises(UsageError, match=r"b\.hdf5 is damaged: it has no group examples"):
        load(f"tff:{tmp_path / 'b.hdf5'}")
    places = {"flute": "user_data", "tff": "examples", "tff:": "examples/ann"}
    for form, place in places.items():
        with h5py.File(tmp_path / "c.h5", "w") as file:
            file[place] = [1.0]
        with pytest.raises(UsageError, match=rf"c\.h5 is damaged: its ({place} is no group|clients hold nothing)"):
            load(f"{form.rstrip(':')}:{tmp_path / 'c.h5'}")


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = flute(tmp_path / "a.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"a\.hdf5 is HDF5, which needs h5py; run `pip install vfl\[hdf5\]`"):
        load(f"flute:{path}")
    assert len(load(f"flute:{flute(tmp_path / 'a.json')}").train.y) == 3


# What is made of the values


@pytest.mark.parametrize("ending", ["json", "hdf5"])
def test_whole_numbers_of_one_user_and_fractions_of_another_are_one_kind(ending: str, tmp_path: Path) -> None:
    path = flute(
        tmp_path / f"a.{ending}", {"ann": ([[1], [2]], [3, 4]), "ben": ([[0.5]], [0.25]), "cleo": ([[7]], [8])}
    )
    dataset = load(f"flute:{path}")
    assert of(dataset) == [([[1], [2]], [3, 4]), ([[0.5]], [0.25]), ([[7]], [8])]
    assert (dataset.train.x.dtype, dataset.train.y.dtype) == (torch.float32, torch.float64)


def test_images_get_their_shape_and_scale(tmp_path: Path) -> None:
    path = flute(tmp_path / "a.json", {"ann": ([list(range(12))], [4])})
    dataset = load(f"flute:{path},shape=3x2x2,scale=2")
    assert dataset.train.x.shape == (1, 3, 2, 2) and dataset.classes == 5
    assert dataset.transform(dataset.train.x, torch.float64).flatten().tolist() == [i / 2 for i in range(12)]
    for wrong in ("5x2", "3x", "-1x-1"):
        with pytest.raises(UsageError, match=rf"shape={wrong} is no shape, as 1x28x28, for its examples of \[12\]"):
            load(f"flute:{path},shape={wrong}")
    for wrong in ("scale=0", "scale=2,inputs=tokens"):
        with pytest.raises(UsageError, match="scale divides numbers"):
            load(f"flute:{path},{wrong}")


def test_classes_are_found_or_given_and_zero_is_regression(tmp_path: Path) -> None:
    whole = flute(tmp_path / "a.json", {"ann": ([[1], [2]], [0.0, 3.0])})
    assert load(f"flute:{whole}").classes == 4 and load(f"flute:{whole}").train.y.dtype == torch.int64
    assert load(f"flute:{whole},classes=10").classes == 10
    regression = load(f"flute:{whole},classes=0")
    assert (regression.classes, regression.train.y.tolist()) == (0, [0.0, 3.0])
    with pytest.raises(UsageError, match="classes=3, but there are labels up to 3"):
        load(f"flute:{whole},classes=3")
    fractions = flute(tmp_path / "b.json", {"ann": ([[1], [2]], [0.5, -3.0])})
    assert load(f"flute:{fractions}").classes == 0
    with pytest.raises(UsageError, match="targets with fractions or below 0 belong to no 4 classes"):
        load(f"flute:{fractions},classes=4")
    with pytest.raises(UsageError, match=r"b\.json hold the label -1; class labels start at 0"):
        load(f"flute:{flute(tmp_path / 'b.json', {'ann': ([[1]], [-1])})}")


def test_tokens_and_characters_are_one_vocabulary_with_their_targets(tmp_path: Path) -> None:
    ids = load(f"flute:{flute(tmp_path / 'a.json', {'ann': ([[1, 9], [2, 3]], [[9, 4], [3, 0]])})},inputs=tokens")
    assert (ids.classes, ids.model, ids.transform(ids.train.x, torch.float32).dtype) == (10, "char_lstm", torch.int64)
    assert ids.train.y.tolist() == [[9, 4], [3, 0]]
    path = flute(tmp_path / "b.json", {"ann": (["to b", "o be"], ["e", " "])})
    text = load(f"flute:{path},inputs=characters")
    assert (text.train.x.shape, text.train.y.shape, text.classes) == ((2, 4), (2,), 80)
    assert text.train.x[0, 1] == text.train.x[1, 0]
    with pytest.raises(UsageError, match="user ann: its inputs are text, not numbers, so they need inputs=characters"):
        load(f"flute:{path}")
    with pytest.raises(UsageError, match="user ann: token ids are whole numbers"):
        load(f"flute:{path},inputs=tokens")
    with pytest.raises(UsageError, match="inputs must be numbers, tokens, characters, not 'text'"):
        load(f"flute:{path},inputs=text")
    with pytest.raises(UsageError, match="user ann: characters are strings of one length"):
        load(f"flute:{flute(tmp_path / 'c.json', {'ann': (['a', 'bc'], ['d', 'e'])})},inputs=characters")


def test_train_and_test_of_unlike_shapes_are_refused(tmp_path: Path) -> None:
    flute(tmp_path / "train.json", {"ann": ([[1, 2]], [0])})
    flute(tmp_path / "test.json", {"ann": ([[1, 2, 3]], [0])})
    with pytest.raises(UsageError, match=r"must have one shape, not \[2\] and \[3\]"):
        load(f"flute:{tmp_path}")


# npz


def test_npz_has_its_users_sorted_or_not(tmp_path: Path) -> None:
    x, y, u = np.arange(8, dtype=np.uint8).reshape(4, 2), np.array([0, 1, 2, 1]), np.array([2, 0, 2, 0])
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, u_train=u, x_test=x[:1], y_test=y[:1], u_test=u[:1])
    wanted = [([[2, 3], [6, 7]], [1, 1]), ([[0, 1], [4, 5]], [0, 2])]
    dataset = load(f"npz:{tmp_path},scale=255")
    assert of(dataset) == wanted and dataset.transform == Normalize(255.0)
    assert dataset.train.x.dtype == torch.uint8 and dataset.test is not None and len(dataset.test.y) == 1
    order = np.argsort(u, kind="stable")
    np.savez(tmp_path / "sorted.npz", x_train=x[order], y_train=y[order], u_train=u[order])
    assert of(load(f"npz:{tmp_path / 'sorted.npz'}")) == wanted
    np.savez(tmp_path / "broken.npz", x_train=x, y_train=y[:3], u_train=u)
    with pytest.raises(UsageError, match=r"broken\.npz is damaged: .*x_train, y_train and u_train have 4, 3 and 4"):
        load(f"npz:{tmp_path / 'broken.npz'}")
    for changed, says in (
        ({"y_train": np.array(3)}, "unsized"),
        ({"y_train": y - 1}, "y_train holds the label -1"),
        ({"users": np.array(["a", "b"])}, "u_train must be places in users, from 0 to 1"),
        ({"users": np.array(["a", "b", "c"]), "u_train": u - 1}, "u_train must be places in users, from 0 to 2"),
    ):
        np.savez(tmp_path / "broken.npz", **{"x_train": x, "y_train": y, "u_train": u} | changed)
        with pytest.raises(UsageError, match=rf"broken\.npz is damaged: .*{says}"):
            load(f"npz:{tmp_path / 'broken.npz'}")
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"broken\.npz is damaged: .*it is not packed as one"):
        load(f"npz:{tmp_path / 'broken.npz'}")
    np.savez(tmp_path / "less.npz", x_train=x)
    with pytest.raises(UsageError, match=r"less\.npz is damaged: it is no archive of x_train"):
        load(f"npz:{tmp_path / 'less.npz'}")


# TensorFlow Federated


def tff_file(path: Path, clients: dict[str, dict[str, Any]]) -> Path:
    with h5py.File(path, "w") as file:
        file.create_group("examples")
        for name, columns in clients.items():
            for column, values in columns.items():
                file[f"examples/{name}/{column}"] = values
    return path


def test_tff_emnist_is_images_of_one_channel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((3, 28, 28), np.float32)
    tff_file(tmp_path / "fed_emnist_train.h5", {
        "f0000_14": {"pixels": pixels[:2], "label": np.array([61, 3], np.int32)},
        "f0001_41": {"pixels": pixels[2:], "label": np.array([0], np.int32)},
    })  # fmt: skip
    tff_file(tmp_path / "fed_emnist_test.h5", {"f0000_14": {"pixels": pixels[:1], "label": np.array([61], np.int32)}})
    dataset = load(f"tff:{tmp_path}")
    assert dataset.offsets is not None and dataset.offsets.tolist() == [0, 2, 3]
    assert torch.equal(dataset.train.x, torch.from_numpy(pixels)[:, None]) and dataset.train.y.tolist() == [61, 3, 0]
    assert (dataset.classes, dataset.train.y.dtype) == (62, torch.int64)
    assert dataset.test is not None and dataset.test.y.tolist() == [61]


def test_tff_cifar100_is_colour_planes_with_fine_or_coarse_labels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    path = tff_file(tmp_path / "fed_cifar100_train.h5", {
        "0": {"image": image, "coarse_label": np.array([19, 1]), "label": np.array([99, 5])}
    })  # fmt: skip
    dataset = load(f"tff:{path}")
    assert dataset.train.x.dtype == torch.uint8
    np.testing.assert_array_equal(dataset.train.x, image.transpose(0, 3, 1, 2))
    assert (dataset.classes, dataset.train.y.tolist()) == (100, [99, 5])
    coarse = load(f"tff:{path},label=coarse_label")
    assert (coarse.classes, coarse.train.y.tolist()) == (20, [19, 1])
    with pytest.raises(UsageError, match="user 0 has no targets"):
        load(f"tff:{path},label=other")


def test_tff_shakespeare_is_windows_of_each_roles_snippets(tmp_path: Path) -> None:
    strings = h5py.string_dtype("ascii")
    snippets = {"A": ["To be,", "or é".replace("é", "~")], "B": ["x"], "C": []}
    path = tff_file(tmp_path / "shakespeare_train.h5", {
        name: {"snippets": np.array(texts, dtype=strings)} for name, texts in snippets.items()
    })  # fmt: skip
    dataset = load(f"tff:{path},length=3")
    start, end, unknown = 88, 89, 87
    number = {letter: n for n, letter in enumerate(tff.LETTERS, 1)}
    stream = [start, *(number[c] for c in "To be,"), end, start, *(number[c] for c in "or "), unknown, end]
    n = (len(stream) - 1) // 3  # 4 windows; the last token has no window of its own
    assert dataset.offsets is not None and dataset.offsets.tolist() == [0, n, n, n]
    assert dataset.train.x.flatten().tolist() == stream[: 3 * n]
    assert dataset.train.y.flatten().tolist() == stream[1 : 3 * n + 1]
    assert (dataset.classes, dataset.train.x.dtype, dataset.train.y.dtype) == (90, torch.uint8, torch.int64)
    assert len(set(tff.LETTERS)) == 86
    with pytest.raises(UsageError, match="length is at least 1 and words from 1"):
        load(f"tff:{path},length=0")


def test_tff_stackoverflow_numbers_the_most_frequent_training_words(tmp_path: Path) -> None:
    strings = h5py.string_dtype()

    def says(*sentences: str) -> dict[str, Any]:
        texts = np.array(sentences, dtype=strings)
        return {"tokens": texts, "title": texts, "score": np.zeros(len(sentences), np.int64)}

    tff_file(tmp_path / "stackoverflow_train.h5", {"1": says("b a b", "c a b"), "2": says("d a")})
    tff_file(tmp_path / "stackoverflow_test.h5", {"3": says("a d z")})
    dataset = load(f"tff:{tmp_path},length=2,words=3")
    known, unknown, start, end = {"a": 1, "b": 2, "c": 3}, 4, 5, 6  # a and b are three each, c stands before d
    first = [start, known["b"], known["a"], known["b"], end, start, known["c"], known["a"], known["b"], end]
    second = [start, unknown, known["a"], end]
    assert dataset.train.x.flatten().tolist() == [*first[:8], *second[:2]]
    assert dataset.train.y.flatten().tolist() == [*first[1:9], *second[1:3]]
    assert dataset.test is not None and dataset.test.x.flatten().tolist() == [start, 1, unknown, unknown]
    assert dataset.classes == 7


def test_another_layout_of_tffs_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    path = tff_file(tmp_path / "landmarks_train.h5", {"1": {"jpeg": np.zeros(2)}})
    with pytest.raises(UsageError, match=r"train\.h5 is damaged: its clients hold jpeg, but one of pixels, image"):
        load(f"tff:{path}")
    with pytest.raises(UsageError, match="its clients hold nothing"):
        load(f"tff:{tff_file(tmp_path / 'empty.h5', {})}")
    for column, shape in (("pixels", [2, 28]), ("image", [2, 32, 32])):
        path = tff_file(tmp_path / "flat.h5", {"7": {column: np.zeros(shape, np.uint8), "label": np.zeros(2, int)}})
        with pytest.raises(UsageError, match=r"user 7: an image is \[\d.*\], not \["):
            load(f"tff:{path}")


# Runs, and the real files


def test_a_run_takes_a_file_as_its_data(here: Path) -> None:
    draw = np.random.default_rng(0)
    flute(here / "train.hdf5", {f"u{i}": (draw.standard_normal((5, 4)), draw.integers(0, 3, 5)) for i in range(4)})
    options = ("--rounds", 2, "--clients-per-round", 2, "--execution", "vmap", "--chunk", 2, "--model", "softmax")
    assert vfl("fedavg", "--data", "flute:train.hdf5", *options, "--out", "run", "--quiet") == 0
    assert len(metrics(here / "run")) == 2


def real(name: str, file: str) -> str:
    root = os.environ.get("VFL_DATA")
    if not root or not (Path(root) / name / file).is_file():
        pytest.skip(f"VFL_DATA names no folder with {name}/{file}")
    return f"{name}/{file}"


def test_the_real_synthetic_files_hold_what_is_known_of_them(caplog: pytest.LogCaptureFixture) -> None:
    train, test = (real("synthetic", f"leaf_data_niid_0_keep_5_{split}_6.json.xz") for split in ("train", "test"))
    data = federated(f"leaf:{train},test={test}")
    assert (data.clients.population, data.clients.sizes().sum(), data.clients.x.shape[1]) == (100, 6_187, 30)
    assert data.test is not None and len(data.test.y) == 4_189
    data = federated(f"leaf:{real('synthetic', 'fedprox_synthetic_1_1_mytest.json.xz')}")
    assert (data.clients.population, data.clients.sizes().sum(), data.clients.x.shape[1]) == (30, 1_084, 60)
    assert data.classes == 10 and not caplog.messages


def test_the_real_femnist_shard_and_archive_hold_what_is_known_of_them() -> None:
    train, test = (real("femnist", f"all_data_0_niid_05_keep_0_{split}_9.json.xz") for split in ("train", "test"))
    shard = federated(f"leaf:{train},test={test},shape=1x28x28")
    archive = federated(f"npz:{real('femnist', 'femnist_leaf_niid05.npz')},shape=1x28x28,scale=255")
    assert (shard.clients.population, len(shard.clients.y), archive.clients.population) == (5, 779, 105)
    assert (len(archive.clients.y), archive.classes) == (14_708, 62)
    assert archive.test is not None and len(archive.test.y) == 4_088
    assert shard.test is not None and len(shard.test.y) == 89


def test_the_real_shakespeare_shard_holds_what_is_known_of_it(caplog: pytest.LogCaptureFixture) -> None:
    file = real("shakespeare", "leaf_all_data_niid_05_keep_0_test_9.json.xz")
    data = federated(f"leaf:{file},inputs=characters")
    assert (data.clients.population, len(data.clients.y), data.clients.x.shape[1]) == (34, 17_703, 80)
    (message,) = caplog.messages
    assert "it promises 20,389 examples, but the files hold 17,703, and those count" in message
    assert "(the first: THE_TAMING_OF_THE_SHREW_VINCENTIO in " in message and "184 promised, 105 there)" in message


def test_leaf_and_flute_files_are_one_for_who_reads_them_in_python(tmp_path: Path) -> None:
    packed, users = from_leaf([flute(tmp_path / "a.json")])
    assert users == list(PEOPLE) and packed.sizes().tolist() == [2, 1, 0]
    assert as_stored(packed.x, torch.float32) is packed.x
