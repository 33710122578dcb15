"""Counts, summaries and pictures of what clients hold."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vfl.data import FederatedData, cast, federated, from_list, label_table, plot_labels, summary
from vfl.errors import UsageError


def of(*labels: list[int], classes: int = 3) -> FederatedData:
    """Clients with the given labels."""
    clients = from_list([(torch.zeros(len(y), 1), torch.tensor(y, dtype=torch.int64)) for y in labels])
    return FederatedData("toy", clients, None, None, None, classes, cast)


def regression() -> FederatedData:
    clients = from_list([([[0.0]], [0.5]), ([[0.0], [1.0]], [1.5, 2.5])])
    return FederatedData("toy", clients, None, None, None, 0, cast)


def test_the_label_table_counts_labels_by_client() -> None:
    table = label_table(of([0, 0, 2], [], [1]))
    assert table.dtype == np.int64 and table.tolist() == [[2, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_the_label_table_sums_to_the_data() -> None:
    data = federated("digits", partition="dirichlet:0.3", clients=30)
    table = label_table(data)
    assert table.sum(1).tolist() == data.clients.sizes().tolist()
    assert table.sum(0).tolist() == data.clients.y.bincount().tolist()


def test_the_label_table_refuses_regression_and_labels_beyond_the_classes() -> None:
    with pytest.raises(UsageError, match="toy has no class labels to count"):
        label_table(regression())
    with pytest.raises(UsageError, match="labels from 0 to 2, but classes=2 allows 0 to 1"):
        label_table(of([0, 2], classes=2))


def test_the_summary_tells_sizes_labels_and_distance() -> None:
    told = summary(of([0, 0, 0, 1], [], [1, 1], [2, 2]))
    assert (told.clients, told.examples, told.minimum, told.median, told.maximum, told.empty) == (4, 8, 0, 2.0, 4, 1)
    assert told.labels == pytest.approx(4 / 3)  # two, one and one, the empty client left out
    # Everyone's distribution is (3, 3, 2) / 8; the clients' are (6, 2, 0) / 8, (0, 8, 0) / 8 and (0, 0, 8) / 8.
    assert told.distance == pytest.approx(np.mean([3, 5, 6]) / 8)


def test_equal_clients_are_at_distance_zero() -> None:
    assert summary(of([0, 1], [1, 0, 0, 1])).distance == 0


def test_the_summary_of_regression_or_of_nothing_has_no_labels() -> None:
    told = summary(regression())
    assert (told.clients, told.examples, told.labels, told.distance) == (2, 3, None, None)
    nothing = summary(of([], []))
    assert (nothing.examples, nothing.empty, nothing.labels) == (0, 2, None)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_is_written_where_asked(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / f"labels.{ending}"
    assert plot_labels(of([0, 0, 2], [], [1]), path) == path
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if ending == "png" else b"<svg" in content


def test_the_picture_of_many_clients_says_how_many_it_shows(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        plot_labels(of(*[[i % 3] for i in range(250)]), tmp_path / "many.svg")
        plot_labels(of(*[[i % 3] for i in range(100)]), tmp_path / "all.svg")
    assert "100 of 250 clients, evenly spaced" in (tmp_path / "many.svg").read_text()
    everyone = (tmp_path / "all.svg").read_text()
    assert "100 clients" in everyone and "evenly spaced" not in everyone


def test_nobody_having_examples_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_labels(of([], []), tmp_path / "empty.png").stat().st_size > 0


def test_an_unknown_picture_format_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=r"labels.xyz cannot be drawn: Format 'xyz' is not supported"):
        plot_labels(of([0]), tmp_path / "labels.xyz")


def test_a_missing_matplotlib_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install vfl\[plots\]"):
        plot_labels(of([0]), tmp_path / "labels.png")
