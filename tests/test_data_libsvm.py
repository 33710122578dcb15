"""Files in the LIBSVM format: what they mean, and what is wrong with broken ones."""

import bz2
import gzip
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vfl.data import Dataset, federated, load
from vfl.data.libsvm import read
from vfl.errors import UsageError
from vfl.problems import LinearProblem
from vfl.regularizers import Regularizer

TEXT = """\
+1 1:0.5 3:-2e-1
# a comment, and a row without entries:
-1

-1 2:1 4:7.25   # the last one
"""
X = np.array([[0.5, 0, -0.2, 0], [0, 0, 0, 0], [0, 1, 0, 7.25]])


def put(root: Path, text: str = TEXT, name: str = "libsvm/small") -> Path:
    """A file below the root."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def libsvm(spec: str, root: Path) -> Dataset:
    return load(f"libsvm:{spec}", root)


def test_rows_become_a_dense_matrix_with_zeros_where_nothing_is_written(tmp_path: Path) -> None:
    put(tmp_path)
    data = libsvm("small", tmp_path)
    assert data.train.x.dtype == torch.float64 and np.array_equal(data.train.x, X)
    assert data.train.y.tolist() == [1, 0, 0] and data.train.y.dtype == torch.int64
    assert (data.name, data.classes, data.model, data.test) == ("small", 2, "linear", None)


@pytest.mark.parametrize(("ending", "pack"), [(".xz", lzma.open), (".gz", gzip.open), (".bz2", bz2.open)])
@pytest.mark.parametrize("named", [False, True])
def test_packed_files_read_as_plain_ones(tmp_path: Path, ending: str, pack, named: bool) -> None:
    with pack(put(tmp_path).with_suffix(ending), "wt") as file:
        file.write(TEXT)
    (tmp_path / "libsvm" / "small").unlink()
    data = libsvm("small" + ending * named, tmp_path)
    assert np.array_equal(data.train.x, X) and data.name == "small"


def test_a_file_is_found_in_the_roots_folder_then_in_the_root_then_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "1 1:1\n2 1:2\n", "small")
    assert libsvm("small", tmp_path / "other").train.x.tolist() == [[1], [2]]
    assert libsvm(str(tmp_path / "small"), tmp_path / "other").train.x.tolist() == [[1], [2]]
    put(tmp_path, "1 1:3\n2 1:4\n", "root/small")
    assert libsvm("small", tmp_path / "root").train.x.tolist() == [[3], [4]]
    put(tmp_path, "1 1:5\n2 1:6\n", "root/libsvm/small")
    assert libsvm("small", tmp_path / "root").train.x.tolist() == [[5], [6]]


def test_whole_numbers_from_0_to_255_are_kept_as_bytes(tmp_path: Path) -> None:
    for text, kind in (("1 1:255\n2 2:0\n", torch.uint8), ("1 1:256\n2 2:0\n", torch.float64),
                       ("1 1:-1\n2 2:0\n", torch.float64), ("1 1:0.5\n2 2:0\n", torch.float64)):  # fmt: skip
        put(tmp_path, text)
        assert libsvm("small", tmp_path).train.x.dtype == kind


@pytest.mark.parametrize(
    ("labels", "places", "classes", "model"),
    [
        (["1", "2", "1"], [0, 1, 0], 2, "linear"),
        (["0", "1.0", "+1"], [0, 1, 1], 2, "linear"),
        (["7", "-3", "5"], [2, 0, 1], 3, "softmax"),
    ],
)
def test_labels_become_their_places_in_rising_order(
    labels: list[str], places: list[int], classes: int, model: str, tmp_path: Path
) -> None:
    put(tmp_path, "".join(f"{label} 1:1\n" for label in labels))
    data = libsvm("small", tmp_path)
    assert (data.train.y.tolist(), data.classes, data.model) == (places, classes, model)


def test_regression_keeps_the_labels_as_numbers(tmp_path: Path) -> None:
    put(tmp_path, "-1 1:1\n2.5 1:2\n")
    data = libsvm("small,regression=true", tmp_path)
    assert data.train.y.tolist() == [-1, 2.5] and data.train.y.dtype == torch.float64
    assert (data.classes, data.model) == (0, "linear")


def test_a_test_file_shares_labels_and_features(tmp_path: Path) -> None:
    put(tmp_path, "3 1:1\n1 2:1\n")
    put(tmp_path, "2 3:1\n3 1:1\n", "libsvm/small.t")
    data = libsvm("small", tmp_path)
    assert data.test is not None and data.train.x.shape == data.test.x.shape == (2, 3)
    assert (data.train.y.tolist(), data.test.y.tolist(), data.classes) == ([2, 0], [1, 2], 3)


def test_the_number_of_features_may_be_given(tmp_path: Path) -> None:
    put(tmp_path)
    assert libsvm("small,features=9", tmp_path).train.x.shape == (3, 9)
    with pytest.raises(UsageError, match=r"small, line 5: the index 4 is above features=3"):
        libsvm("small,features=3", tmp_path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("one 1:1", "the label must be a finite number, not 'one'"),
        ("nan 1:1", "the label must be a finite number, not 'nan'"),
        ("0.5 1:1", "the label 0.5 is no class, a whole number; regression=true takes it as a target"),
        ("1,2 1:1", "the label must be a finite number, not '1,2'"),
        ("1 1", "'1' must be index:value with a whole number as the index"),
        ("1 qid:3 1:1", "'qid:3' must be index:value with a whole number as the index"),
        ("1 -1:1", "'-1:1' must be index:value with a whole number as the index"),
        ("1 1:", "the value of 1 must be a finite number, not ''"),
        ("1 1:two", "the value of 1 must be a finite number, not 'two'"),
        ("1 1:inf", "the value of 1 must be a finite number, not 'inf'"),
        ("1 0:1", "the index 0 must be above 0: indices start at 1 and rise"),
        ("1 3:1 3:2", "the index 3 must be above 3: indices start at 1 and rise"),
        ("1 3:1 2:2", "the index 2 must be above 3: indices start at 1 and rise"),
        ("1 99999999999999999999:1", "the index 99999999999999999999 is above any that can be held"),
    ],
)
def test_a_broken_line_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    path = put(tmp_path, f"1 1:1\n\n{line}\n2 1:1\n")
    with pytest.raises(UsageError) as error:
        libsvm("small", tmp_path)
    assert str(error.value) == f"{path}, line 3: {sentence}"


def test_files_that_hold_nothing_of_use_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "# nothing\n\n")
    with pytest.raises(UsageError, match="small has no rows"):
        libsvm("small", tmp_path)
    path.write_text("1 1:1\n1 1:2\n")
    with pytest.raises(UsageError, match="every label is 1, but classification needs at least two"):
        libsvm("small", tmp_path)
    path.write_text("1 1:1\n2 8000000000:2\n")
    with pytest.raises(UsageError, match="2 rows × 8,000,000,000 features are too many"):
        libsvm("small", tmp_path)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"a9a .* is missing from {tmp_path}/libsvm and {tmp_path}; copy it there"):
        libsvm("a9a", tmp_path)


@pytest.mark.parametrize("ending", [".xz", ".gz", ".bz2"])
def test_a_damaged_archive_is_refused(ending: str, tmp_path: Path) -> None:
    pack = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}[ending]
    path = put(tmp_path).with_suffix(ending)
    (tmp_path / "libsvm" / "small").unlink()
    for content in (pack(TEXT.encode() * 1000)[:-20], b"no archive at all"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"small\.\w+ cannot be read .*; replace it by a whole LIBSVM file"):
            libsvm("small", tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    put(tmp_path).write_bytes(b"1 1:1\n\xff\xfe\n")
    with pytest.raises(UsageError, match="small cannot be read"):
        libsvm("small", tmp_path)


def test_the_rows_are_dealt_to_clients_sorted_or_as_they_stand(tmp_path: Path) -> None:
    put(tmp_path, "".join(f"{n % 2} 1:{n}\n" for n in range(8)))
    ordered = federated("libsvm:small", root=tmp_path, partition="sorted", clients=2).clients
    assert ordered.x[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7] and ordered.y.tolist() == [0] * 4 + [1] * 4
    rows = federated("libsvm:small", root=tmp_path, partition="rows", clients=3).clients
    assert rows.x[:, 0].tolist() == list(range(8)) and rows.sizes().tolist() == [2, 3, 3]
    assert federated("libsvm:small", root=tmp_path, clients=2).model == "linear"


# --- the published files ---

REAL = pytest.mark.skipif("VFL_DATA" not in os.environ, reason="VFL_DATA does not name a folder of data sets")


@REAL
@pytest.mark.parametrize(
    ("name", "shape", "counts", "test"),
    [
        ("a9a", (32_561, 123), [24_720, 7_841], (16_281, 123)),
        ("mushrooms", (8_124, 112), [3_916, 4_208], None),
        ("phishing", (11_055, 68), [4_898, 6_157], None),
        ("w8a", (49_749, 300), [48_270, 1_479], (14_951, 300)),
    ],
)
def test_the_published_sets_have_their_published_sizes(
    name: str, shape: tuple[int, int], counts: list[int], test: tuple[int, int] | None
) -> None:
    data = load(f"libsvm:{name}")
    assert data.train.x.shape == shape and torch.bincount(data.train.y).tolist() == counts
    assert (data.test.x.shape if data.test else None) == test


@REAL
def test_reading_line_by_line_equals_splitting_the_whole_text_of_a9a() -> None:
    path = Path(os.environ["VFL_DATA"]) / "libsvm" / "a9a.xz"
    rows = [line.split() for line in lzma.decompress(path.read_bytes()).decode().splitlines()]
    found = read(path)
    assert found.labels.tolist() == [float(row[0]) for row in rows]
    assert found.columns.tolist() == [int(pair.split(":")[0]) - 1 for row in rows for pair in row[1:]]
    assert found.values.tolist() == [float(pair.split(":")[1]) for row in rows for pair in row[1:]]
    assert np.diff(found.offsets).tolist() == [len(row) - 1 for row in rows]


@REAL
def test_logistic_regression_on_mushrooms_has_the_minimum_that_gradient_descent_finds() -> None:
    """L and f* against Nesterov's accelerated descent in numpy, which knows the data alone."""
    dataset, l2 = load("libsvm:mushrooms"), 0.1
    A, s = dataset.train.x.double().numpy(), 2.0 * dataset.train.y.numpy() - 1
    L = np.linalg.norm(A, 2) ** 2 / (4 * len(A)) + l2
    x = y = np.zeros(A.shape[1])
    momentum = (np.sqrt(L) - np.sqrt(l2)) / (np.sqrt(L) + np.sqrt(l2))
    for _ in range(120):
        before, x = x, y - (l2 * y - A.T @ (s / (1 + np.exp(s * (A @ y)))) / len(A)) / L
        y = x + momentum * (x - before)
    value = np.log1p(np.exp(-s * (A @ x))).mean() + l2 / 2 * x @ x
    data = federated("libsvm:mushrooms", clients=1)
    problem = LinearProblem(data, Regularizer(l2))
    found = problem.smoothness.L
    assert found == pytest.approx(L, rel=1e-10)
    assert problem.solution.value == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(problem.solution.x, x, atol=1e-6)
