"""LEAF's JSON, FEMNIST, Shakespeare: small files of the same form and, where VFL_DATA says so, the real ones."""

import gzip
import json
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import here, metrics, vfl

from vfl.data import SOURCES, Dataset, Examples, federate, federated, from_leaf, get, label_table, load, tokens
from vfl.data.leaf import leaf_files
from vfl.data.text import LETTERS, earlier_and_later, encode, speakers
from vfl.errors import UsageError

__all__ = ["here"]  # a fixture
User = tuple[str, list[Any], list[Any]]  # name, x, y
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def leaf(path: Path, users: list[User], counts: list[int] | None = None) -> Path:
    """A LEAF file of these users, packed by its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "users": [name for name, _, _ in users],
        "num_samples": counts or [len(y) for _, _, y in users],
        "user_data": {name: {"x": x, "y": y} for name, x, y in users},
    }
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](json.dumps(data).encode()))
    return path


ANNA: User = ("anna", [[1.5, 2], [3, 4]], [0, 1])
BEN: User = ("ben", [[5, 6]], [2])
NOBODY: User = ("nobody", [], [])


# Any LEAF files


@pytest.mark.parametrize("ending", PACK)
def test_each_user_is_a_client_in_the_files_order(ending: str, tmp_path: Path) -> None:
    packed, users = from_leaf([leaf(tmp_path / f"a.json{ending}", [BEN, NOBODY, ANNA])])
    assert users == ["ben", "nobody", "anna"]
    assert packed.offsets.tolist() == [0, 1, 1, 3]
    assert packed.x.tolist() == [[5, 6], [1.5, 2], [3, 4]] and packed.y.tolist() == [2, 0, 1]
    assert (packed.x.dtype, packed.y.dtype) == (torch.float32, torch.int64)


def test_a_user_of_several_files_has_the_examples_of_them_all(tmp_path: Path) -> None:
    files = [leaf(tmp_path / "0.json", [ANNA, BEN]), leaf(tmp_path / "1.json", [("anna", [[7, 8]], [5]), NOBODY])]
    packed, users = from_leaf(files)
    assert users == ["anna", "ben", "nobody"] and packed.sizes().tolist() == [3, 1, 0]
    assert packed.client(0).y.tolist() == [0, 1, 5]


def test_numbers_of_samples_are_not_trusted_but_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    right, wrong = leaf(tmp_path / "0.json", [ANNA]), leaf(tmp_path / "1.json", [BEN, NOBODY], [4, 0])
    with caplog.at_level(logging.WARNING, "vfl"):
        from_leaf([right])
        assert not caplog.messages
        packed, _ = from_leaf([right, wrong])
    assert packed.sizes().tolist() == [2, 1, 0]
    assert caplog.messages == [
        "num_samples is wrong for 1 of 3 users: it promises 6 examples, but the files hold 3, and those count "
        f"(the first: ben in {wrong}, 4 promised, 1 there)"
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is damaged: it is not of LEAF's form (ValueError: expected \" at character 2)"),
        (b"\xff\xfe\xfa", "is damaged: it is not of LEAF's form (UnicodeDecodeError: "),
        (b"[1]", "is damaged: it is not of LEAF's form (ValueError: expected { at character 1, not [)"),
        (b'{"users": ["a"], "num_samples": [1]}', "is damaged: user a has no inputs in user_data"),
        (b'{"users": ["a"], "num_samples": [1], "user_data": {}}', "is damaged: user a has no inputs in user_data"),
        (b'{"users": ["a"], "num_samples": [1], "user_data": {"a": {"x": 1, "y": 2}}}', "user a: x is no list"),
        (b'{"users": ["a"], "num_samples": [], "user_data": {"a": {"x": [], "y": []}}}', "LEAF's form: its users and"),
        (b'{"users": ["a"], "num_samples": [1], "user_data": {"a": {"x": [1, 2], "y": [1]}}}',
         "is damaged: user a has 2 inputs, but 1 targets"),
        (b'{"users": ["a"], "num_samples": [2], "user_data": {"a": {"x": [[1], [1, 2]], "y": [1, 1]}}}', "user a: "),
        (b'{"users": ["a"], "num_samples": [0], "user_data": {"a": {"x": [], "y": []}}}', "there is not an example in"),
        (b'{"users": ["a"], "user_data": {"a": {"x": [[1, null]], "y": [1]}}}', "user a: its inputs hold null"),
        (b'{"users": ["a"], "user_data": {"a": {"x": [[1], [1, 2]], "y": [1, 1]}}}', "user a: its inputs differ in"),
        (b'{"num_samples": [1], "user_data": {"a": {"x": [1], "y": [1]}}}', "it has no users"),
        (b'{"users": [], "num_samples": [], "user_data": {"a": {"x": [1], "y": [1]}}}', "user a has data, but"),
        (b'{"users": ["a"], "num_samples": [1], "user_data": {"a": {"x": [1]}}}', "user a has no targets"),
        (b'{"users": ["a"], "num_samples": [1], "user_data": {"a": {"x": ["t"], "y": [1]}}}', "user a: its inputs are"),
        (b'{"users": ["a"], "num_samples": [1], "user_data": {"a": {"x": [1], "y": ["t"]}}}', "user a: numbers are"),
        (b'{"users": ["a"], "user_data": {"a": {"x": [1], "y": [1]}, "a": {"x": [1], "y": [1]}}}', "there twice"),
        (b'{"users": ["a"], "user_data": {"a": {"x": [1], "y": [1', "form in user_data, after a (ValueError: "),
        (b'{"users": ["a"], "user_data": [{"x": [1], "y": [1]}]}', "its user_data is no object"),
        (b'{"users": ["a"], "user_data": {"a": [1]}}', "user a has no object with an x in user_data"),
        (b'{"users": ["a"], "user_data": {}} []', "more follows at character 35"),
        (b'{"users": ' + b"[" * 100_000, "form in users (RecursionError: "),
    ],
)  # fmt: skip
def test_a_file_that_is_not_of_leafs_form_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        from_leaf([path])
    assert says in str(error.value)
    if "damaged" in says:
        assert str(error.value).startswith(f"{path} is damaged: ")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = leaf(tmp_path / "a.json.xz", [ANNA])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"a\.json\.xz is damaged: it cannot be read .*LEAF's preprocess\.sh"):
        from_leaf([path])


def test_users_whose_examples_differ_in_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.json is damaged: user ben: one example's x has the shape"):
        from_leaf([leaf(tmp_path / "a.json", [ANNA, ("ben", [[1, 2, 3]], [0])])])


def test_the_split_is_in_a_files_name_or_else_in_its_folders(tmp_path: Path) -> None:
    names = {
        "train": ["train/all_data.json", "x/all_data_0_niid_05_keep_0_train_9.json.xz", "test/all_data_train_9.json"],
        "test": ["test/all_data.json.gz", "x/mytest.json", "latest/data.json"],
    }
    for name in (*names["train"], *names["test"], "x/all_data.json", "train/readme.md"):
        leaf(tmp_path / name, [ANNA])
    for split, wanted in names.items():
        assert leaf_files(tmp_path, split) == sorted(tmp_path / name for name in wanted)


# FEMNIST


def writers() -> dict[str, list[User]]:
    """Two writers who are in both splits and one who is in test alone; pixels are multiples of 1/255."""
    draw = np.random.default_rng(0)

    def user(name: str, n: int) -> User:
        return name, (draw.integers(0, 256, (n, 784)) / 255).tolist(), draw.integers(0, 62, n).tolist()

    return {"train": [user("w1", 3), user("w0", 2)], "test": [user("w1", 2), user("w2", 4), user("w0", 1)]}


def write_writers(root: Path) -> dict[str, list[User]]:
    made = writers()
    for split, users in made.items():
        for i, one in enumerate(users):
            leaf(root / "femnist" / split / f"all_data_{i}_niid_05_keep_0_{split}_9.json", [one])
    return made


def as_bytes(users: list[User]) -> tuple[list[list[float]], list[int]]:
    x = [[round(255 * pixel) for pixel in image] for _, images, _ in users for image in images]
    return x, [label for _, _, labels in users for label in labels]


def test_femnist_has_a_client_a_writer(tmp_path: Path) -> None:
    made = write_writers(tmp_path)
    dataset = load("femnist", tmp_path)
    assert dataset.test is not None and dataset.classes == 62
    for examples, split in ((dataset.train, "train"), (dataset.test, "test")):
        x, y = as_bytes(made[split])
        assert examples.x.shape == (len(y), 1, 28, 28) and examples.x.dtype == torch.uint8
        assert examples.x.flatten(1).tolist() == x and examples.y.tolist() == y
    assert federate(dataset).clients.sizes().tolist() == [3, 2]
    assert federate(dataset, partition="iid", clients=5).clients.sizes().tolist() == [1] * 5


def test_femnist_is_read_from_a_compact_archive_too(tmp_path: Path) -> None:
    made, columns = writers(), {}
    for split, users in made.items():
        x, y = as_bytes(users)
        sizes = [len(labels) for _, _, labels in users]
        turns = np.argsort(np.concatenate([np.arange(n) for n in sizes]), kind="stable")  # the writers take turns
        owner = np.repeat([{"w1": 0, "w0": 1, "w2": 2}[name] for name, _, _ in users], sizes)
        columns |= {f"x_{split}": np.array(x, np.uint8).reshape(-1, 28, 28)[turns], f"u_{split}": owner[turns]}
        columns[f"y_{split}"] = np.array(y, np.uint8)[turns]
    (tmp_path / "femnist").mkdir()
    np.savez(tmp_path / "femnist" / "femnist_small.npz", **columns)
    dataset = load("femnist", tmp_path)
    x, y = as_bytes(made["train"])
    assert dataset.train.x.flatten(1).tolist() == x and dataset.train.y.tolist() == y
    assert federate(dataset).clients.sizes().tolist() == [3, 2]
    assert dataset.test is not None and len(dataset.test.y) == 7


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ([[1.5] * 784], [0], "user w: a pixel is from 0 to 1, not 1.5 to 1.5"),
        ([[0.5] * 784], [62], "user w: labels are 0 to 61, not 62 to 62"),
        ([[0.5] * 783], [0], "user w: cannot reshape"),
    ],
)
def test_what_is_no_femnist_is_refused(x: list[Any], y: list[int], says: str, tmp_path: Path) -> None:
    path = leaf(tmp_path / "femnist" / "train" / "a.json", [("w", x, y)])
    with pytest.raises(UsageError) as error:
        load("femnist", tmp_path)
    assert str(error.value).startswith(f"{path} is damaged: ") and says in str(error.value)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "it cannot be read"),
        ({"x_train": np.zeros((2, 28, 28)), "y_train": [0, 1], "u_train": [0, 1]}, "are not bytes [M, 28, 28]"),
        ({"x_train": np.zeros((2, 28, 28), np.uint8), "y_train": [0], "u_train": [0, 1]}, "are not bytes"),
        ({"x_train": np.zeros((1, 28, 28), np.uint8), "y_train": [62], "u_train": [0]}, "labels are 0 to 61"),
    ],
)
def test_a_damaged_archive_of_femnist_is_named(columns: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "femnist" / "femnist.npz"
    path.parent.mkdir()
    np.savez(path, **columns)
    with pytest.raises(UsageError) as error:
        load("femnist", tmp_path)
    assert str(error.value).startswith(f"{path} is damaged: ") and says in str(error.value)


@pytest.mark.parametrize("name", ["femnist", "shakespeare"])
def test_what_leaf_makes_is_said_to_be_made_with_leaf(name: str, tmp_path: Path) -> None:
    for ask in (lambda: load(name, tmp_path), lambda: get(name, tmp_path)):
        with pytest.raises(UsageError, match=rf"make it with LEAF .*data/{name}/preprocess\.sh"):
            ask()


# Shakespeare by role


def role(name: str, text: str) -> User:
    """LEAF's windows of a text: 80 characters, and the next one."""
    places = range(len(text) - 80)
    return name, [text[i : i + 80] for i in places], [text[i + 80] for i in places]


TEXT = {"HAMLET": "To be, or not to be: that is the question! " * 12, "GHOST": "Mark me.\n" * 12}


def test_characters_are_numbered_as_leaf_does() -> None:
    assert len(LETTERS) == 80 and list(LETTERS) == sorted(LETTERS)
    assert encode(LETTERS).tolist() == list(range(80)) and encode("").tolist() == []
    with pytest.raises(ValueError, match="the character 'é' is none of the 80"):
        encode("théatre")


def test_shakespeare_has_a_client_a_role_and_predicts_the_next_character(tmp_path: Path) -> None:
    for split, words in (("train", TEXT), ("test", {"GHOST": TEXT["HAMLET"][:83]})):
        leaf(tmp_path / "shakespeare" / split / "all_data.json.xz", [role(*each) for each in words.items()])
    dataset = load("shakespeare", tmp_path)
    data = federate(dataset)
    assert data.clients.sizes().tolist() == [len(text) - 80 for text in TEXT.values()]
    assert dataset.test is not None and len(dataset.test.y) == 3 and dataset.classes == 80
    for i, text in enumerate(TEXT.values()):
        x, y = data.clients.client(i)
        assert (x.shape[1:], x.dtype, y.dtype) == ((80,), torch.uint8, torch.int64)
        assert x[0].tolist() + y.tolist() == encode(text).tolist()
        assert torch.equal(x[1:, -1].long(), y[:-1])
    assert data.transform(data.clients.x[:2], torch.float64).dtype == torch.int64


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_split_alone_is_cut_in_time_so_that_no_window_reaches_over(
    split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leaf(tmp_path / "shakespeare" / f"all_data_{split}_9.json", [role(*each) for each in TEXT.items()])
    dataset = load("shakespeare", tmp_path)
    assert "one of LEAF's two splits" in caplog.text
    assert dataset.test is not None and dataset.offsets is not None
    hamlet, ghost = (len(text) - 80 for text in TEXT.values())
    assert np.diff(dataset.offsets).tolist() == [-(-4 * hamlet // 5), -(-4 * ghost // 5)]
    # The ghost's last fifth is shorter than a window, so Hamlet alone is tested: from where his training ended.
    first = 4 * hamlet // 5 + 80
    wanted = encode(TEXT["HAMLET"])[first:].tolist()
    assert dataset.test.x[0].tolist() + dataset.test.y.tolist() == wanted


def test_a_cut_in_time_takes_four_fifths_of_each_client_and_leaves_the_gap_out() -> None:
    sizes = [10, 0, 1, 6]
    before, after = earlier_and_later(np.cumsum([0, *sizes]))
    assert before.order.tolist() == [*range(8), 10, 11, 12, 13, 14, 15] and before.offsets.tolist() == [0, 8, 8, 9, 14]
    assert after.order.tolist() == [8, 9, 16] and after.offsets.tolist() == [0, 2, 2, 2, 3]
    _, after = earlier_and_later(np.cumsum([0, *sizes]), gap=1)
    assert after.order.tolist() == [9] and after.offsets.tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (["a" * 79], ["b"], "x must be strings of 80 characters and y of one"),
        (["a" * 80], ["bc"], "x must be strings of 80 characters and y of one"),
        (["a" * 79 + "%"], ["b"], "the character '%' is none of the 80"),
    ],
)
def test_what_is_no_shakespeare_is_refused(x: list[str], y: list[str], says: str, tmp_path: Path) -> None:
    leaf(tmp_path / "shakespeare" / "train" / "a.json", [("ROLE", x, y)])
    with pytest.raises(UsageError, match=f"user ROLE: {says}"):
        load("shakespeare", tmp_path)


# Shakespeare by speaker

PLAY = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die
than to famish for $3?
"""


def test_speakers_are_told_apart_and_keep_their_order() -> None:
    said = speakers(PLAY)
    assert list(said) == ["First Citizen", "All"]
    assert said["First Citizen"] == "\n".join(line for line in PLAY.split("\n") if len(line) > 15)
    assert said["All"] == "Speak, speak."


def tiny(root: Path, play: str = PLAY) -> Path:
    path = root / "tiny_shakespeare" / "input.txt"
    path.parent.mkdir()
    path.write_text(play, encoding="utf-8")
    return path


def test_tiny_shakespeare_cuts_each_speakers_words_into_windows(tmp_path: Path) -> None:
    tiny(tmp_path)
    dataset = load("tiny_shakespeare:length=9", tmp_path)
    data, words = federate(dataset), speakers(PLAY)["First Citizen"].replace("$", "")
    n = (len(words) - 1) // 9
    train = -(-4 * n // 5)
    assert data.clients.sizes().tolist() == [train, 1] and dataset.classes == 80
    assert dataset.test is not None and len(dataset.test.y) == n - train > 0
    x = torch.cat([data.clients.client(0).x, dataset.test.x])
    y = torch.cat([data.clients.client(0).y, dataset.test.y])
    assert (x.shape[1:], x.dtype, y.dtype) == ((9,), torch.uint8, torch.int64)
    assert x.flatten().tolist() == encode(words)[: 9 * n].tolist()
    assert y.flatten().tolist() == encode(words)[1 : 9 * n + 1].tolist()


def test_who_says_too_little_for_a_window_is_left_out(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    assert federated("tiny_shakespeare:length=12", root=tmp_path).clients.population == 2
    assert federated("tiny_shakespeare:length=13", root=tmp_path).clients.population == 1
    with pytest.raises(UsageError, match="length must be at least 1, not 0"):
        load("tiny_shakespeare:length=0", tmp_path)
    with pytest.raises(UsageError, match="no speaker has 1001 characters"):
        load("tiny_shakespeare:length=1000", tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"input\.txt is damaged: it is not UTF-8 .*vfl data get tiny_shakespeare"):
        load("tiny_shakespeare", tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match=r"input\.txt .*missing.*vfl data get tiny_shakespeare"):
        load("tiny_shakespeare", tmp_path)


def test_the_file_that_is_downloaded_is_the_one_that_is_read() -> None:
    assert list(SOURCES["tiny_shakespeare"].files) == ["input.txt"]


def test_labels_of_sequences_are_counted_position_by_position() -> None:
    y = torch.tensor([[0, 1, 1], [2, 2, 2], [1, 0, 2]])
    data = federate(Dataset("toy", Examples(y, y), None, 3, tokens, offsets=np.array([0, 1, 3])))
    assert label_table(data).tolist() == [[1, 2, 0], [1, 1, 4]]


@pytest.mark.parametrize("data", ["tiny_shakespeare:length=9", "shakespeare"])
def test_a_run_gives_a_character_model_the_targets_of_its_data(data: str, here: Path) -> None:
    tiny(here)
    leaf(here / "shakespeare" / "train" / "a.json", [role(*each) for each in TEXT.items()])
    leaf(here / "shakespeare" / "test" / "a.json", [role("GHOST", TEXT["GHOST"])])
    options = ("--rounds", 1, "--clients-per-round", 1, "--local-steps", 2, "--execution", "vmap", "--chunk", 1)
    model = ("--model", "char_lstm:embedding=2,hidden=3,layers=1")
    assert vfl("fedavg", "--data", data, "--data-root", here, *model, *options, "--out", "run", "--quiet") == 0
    assert 0 <= metrics(here / "run")[0]["test_accuracy"] <= 1


# The real files


def real(name: str) -> Path:
    root = os.environ.get("VFL_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"VFL_DATA names no folder with {name}")
    return Path(root) / name


def test_the_real_femnist_holds_what_is_known_of_it() -> None:
    folder = real("femnist")
    if not (folder / "femnist_leaf_niid05.npz").is_file():
        pytest.skip("VFL_DATA holds another sample of femnist")
    data = federated("femnist")
    sizes = data.clients.sizes()
    assert (data.clients.population, sizes.sum(), sizes.min(), sizes.max(), np.median(sizes)) == (
        105,
        14_708,
        4,
        165,
        152,
    )
    assert data.test is not None and len(data.test.y) == 4_088
    kinds = (label_table(data) > 0).sum(1)
    assert (kinds.min(), kinds.max(), np.median(kinds)) == (3, 58, 51)
    x = data.transform(data.clients.x, torch.float64)
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3
    with np.load(folder / "femnist_leaf_niid05.npz") as stored:
        names = stored["users"].tolist()
    packed, users = from_leaf(leaf_files(folder, "train"))
    assert len(users) == 5 and len(packed.y) == 779
    for i, user in enumerate(users):  # the archive and LEAF's own file agree
        mine = data.clients.client(names.index(user))
        assert torch.equal(mine.x.flatten(1), (255 * packed.client(i).x).round().to(torch.uint8))
        assert torch.equal(mine.y, packed.client(i).y)


def test_the_real_shakespeare_of_leaf_holds_what_is_known_of_it(caplog: pytest.LogCaptureFixture) -> None:
    folder = real("shakespeare")
    files = list(folder.glob("leaf_all_data_niid_05_keep_0_test_9.json.xz"))
    if not files:
        pytest.skip("VFL_DATA holds another sample of shakespeare")
    data = federated("shakespeare")
    assert "wrong for 34 of 34 users: it promises 20,389 examples, but the files hold 17,703" in caplog.text
    assert data.clients.population == 34 and data.test is not None
    sizes = data.clients.sizes()
    assert sizes.sum() + len(data.test.y) < 17_703 < sizes.sum() * 1.26
    x, y = data.clients.client(0)
    text = "".join(LETTERS[i] for i in x[0].tolist() + y[:5].tolist())
    assert text == "ot, Baptista; we will content you, go to; but I will in to be revenged for this villa"


def test_the_real_tiny_shakespeare_holds_what_is_known_of_it() -> None:
    folder = real("shakespeare")
    if not list(folder.glob("tinyshakespeare_input.txt*")):
        pytest.skip("VFL_DATA holds no tinyshakespeare_input.txt")
    data = federated("tiny_shakespeare")
    assert data.test is not None and data.clients.x.shape[1] == 80
    sizes = data.clients.sizes()
    assert (data.clients.population, sizes.min()) == (256, 1)
    assert (sizes.sum() + len(data.test.y)) * 80 < 1_115_394
    assert "".join(LETTERS[i] for i in data.clients.x[0]) == (
        "Before we proceed any further, hear me speak.\nYou are all resolved rather to die"
    )
