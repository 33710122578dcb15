"""Packed clients from the user's own data, and normalization."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from vfl.data import FederatedData, Normalize, Packed, as_stored, cast, from_arrays, from_dataset, from_list
from vfl.errors import UsageError

RGB = Normalize(255.0, (0.5, 0.25, 0.1), (0.2, 0.3, 0.4))


def images() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).repeat(3)[: 2 * 5 * 3 * 4 * 4].view(2, 5, 3, 4, 4)


def by_hand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(x / scale − mean) / std on batches [..., 3, H, W]."""
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (RGB.mean, RGB.std))
    return (x.to(dtype) / RGB.scale - mean) / std


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_scales_and_standardizes_each_channel(dtype: torch.dtype) -> None:
    x = images()[0]
    out = RGB(x, dtype)
    assert out.dtype == dtype and out.shape == x.shape
    torch.testing.assert_close(out, by_hand(x, dtype))


def test_normalize_with_one_number_works_on_any_shape() -> None:
    x = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8)
    expected = torch.tensor([[-1.0, 3.0], [-0.2, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(Normalize(255.0, (0.25,), (0.25,))(x, torch.float64), expected)


def test_normalize_takes_one_std_for_many_means() -> None:
    x = torch.ones(2, 2)
    assert Normalize(mean=(1.0, 3.0), std=(2.0,))(x, torch.float32).tolist() == [[0.0, -1.0]] * 2


def test_normalize_by_default_only_casts() -> None:
    x = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert torch.equal(Normalize()(x, torch.float32), x.float())


def test_normalize_under_vmap_equals_a_loop() -> None:
    x = images()
    mapped = torch.func.vmap(lambda batch: RGB(batch, torch.float32))(x)
    assert torch.equal(mapped, torch.stack([RGB(batch, torch.float32) for batch in x]))


def test_normalize_compiles_as_one_graph_under_vmap() -> None:
    compiled = torch.compile(
        torch.func.vmap(lambda batch: RGB(batch, torch.float32)), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(images()), by_hand(images(), torch.float32))


def test_cast_changes_the_dtype_and_as_stored_does_not() -> None:
    x = torch.tensor([[1, 2]])
    assert cast(x, torch.float64).dtype == torch.float64
    assert as_stored(x, torch.float64) is x


def test_from_arrays_groups_rows_by_sorted_user_and_keeps_their_order() -> None:
    x = np.arange(10, dtype=np.uint8).reshape(5, 2)
    packed, names = from_arrays(x, [0, 1, 2, 3, 4], ["bo", "al", "bo", "cy", "al"])
    assert names == ["al", "bo", "cy"]
    assert packed.offsets.tolist() == [0, 2, 4, 5] and packed.offsets.dtype == np.int64
    assert packed.y.tolist() == [1, 4, 0, 2, 3] and packed.y.dtype == torch.int64
    assert packed.x.dtype == torch.uint8 and packed.x.tolist() == x[[1, 4, 0, 2, 3]].tolist()


def test_from_arrays_does_not_share_memory_with_its_input() -> None:
    x = torch.zeros(2, 1)
    packed, _ = from_arrays(x, torch.zeros(2, dtype=torch.int64), [0, 1])
    x += 1
    assert packed.x.sum() == 0


def test_from_arrays_reads_read_only_and_big_endian_arrays() -> None:
    x = np.array([[1.5], [2.5]], ">f4")
    x.flags.writeable = False
    packed, names = from_arrays(x, np.array([1, 0], ">i2"), np.array([7, 3]))
    assert packed.x.tolist() == [[2.5], [1.5]] and packed.y.tolist() == [0, 1] and names == [3, 7]


def test_float_targets_stay_float() -> None:
    packed, _ = from_arrays([[1.0], [2.0]], np.array([0.5, -1.5], np.float32), [0, 0])
    assert packed.y.dtype == torch.float32 and packed.y.tolist() == [0.5, -1.5]


@pytest.mark.parametrize(
    ("x", "y", "users", "message"),
    [
        ([[1.0]], [0, 1], [0, 1], r"one row an example.*x \[1, 1\], y \[2\], users \[2\]"),
        ([[1.0], [2.0]], [0, 1], [0], r"one row an example.*users \[1\]"),
        ([[1.0]], [0], [[0]], r"one row an example.*users \[1, 1\]"),
        (1.0, 0, 0, r"one row an example"),
        ([], [], [], "empty"),
        ([[1.0]], [-1], [0], "y holds the label -1; class labels start at 0"),
        ([[1.0]], [1j], [0], "y must be class labels or real targets"),
        ([["a"]], [0], [0], "x must be an array of numbers"),
        ([[1.0], [2.0, 3.0]], [0, 1], [0, 1], "x must be an array of numbers"),
        ([[1.0], [2.0]], [0, 1], np.array([None, "a"], object), "users must be ids of one kind"),
    ],
)
def test_from_arrays_refuses_what_it_cannot_pack(x: Any, y: Any, users: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_arrays(x, y, users)


def test_from_list_allows_a_client_without_examples() -> None:
    packed = from_list([([[1.0, 2.0]], [1]), ([], []), ([[3.0, 4.0], [5.0, 6.0]], [0, 2])])
    assert packed.population == 3 and packed.sizes().tolist() == [1, 0, 2]
    assert packed.y.dtype == torch.int64
    assert packed.client(1).x.shape == (0, 2) and packed.client(2).y.tolist() == [0, 2]


def test_from_list_allows_only_empty_clients() -> None:
    packed = from_list([(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))] * 2)
    assert packed.x.shape == (0, 3) and packed.offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "list of clients is empty"),
        ([([[1.0]], [0]), ([[1.0]], [0, 1])], r"client 1: x \[1, 1\] and y \[2\]"),
        ([(1.0, 0)], "client 0: .*one row an example"),
        ([([[1.0]], [0]), ([[1.0, 2.0]], [0])], r"client 1: one example's x is torch.float64 \[2\], but client 0's"),
        ([([], []), ([[1.0]], [0]), ([[1]], [0])], "client 2: one example's x is torch.int64.*but client 1's"),
        ([([[1.0]], [0]), ([[1.0]], [0.5])], "client 1: one example's y is torch.float64"),
        ([([[1.0]], [0]), ([[1.0]], [-2])], "client 1: y holds the label -2"),
    ],
)
def test_from_list_names_the_client_it_refuses(clients: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_list(clients)


class Pairs(TorchDataset[Any]):
    """A map-style data set of the given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_from_dataset_equals_from_arrays() -> None:
    x, y, users = torch.arange(12.0).view(4, 3), torch.tensor([3, 1, 2, 0]), ["b", "a", "b", "a"]
    packed, names = from_dataset(TensorDataset(x, y), users)
    expected, expected_names = from_arrays(x, y, users)
    assert names == expected_names
    assert torch.equal(packed.x, expected.x) and torch.equal(packed.y, expected.y)
    assert packed.offsets.tolist() == expected.offsets.tolist()


def test_from_dataset_reads_arrays_and_plain_numbers() -> None:
    packed, _ = from_dataset(Pairs((np.array([1, 2], np.uint8), 1), (np.array([3, 4], np.uint8), 0)), [1, 0])
    assert packed.x.dtype == torch.uint8 and packed.x.tolist() == [[3, 4], [1, 2]] and packed.y.tolist() == [0, 1]


class Stream(IterableDataset[Any]):
    """A data set without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "Stream must be a map-style data set"),
        (Pairs(), "at least one example"),
        (Pairs((0.0, 1), 3.0), r"item 1 of Pairs must be a pair \(x, y\), not float"),
        (Pairs((torch.zeros(2), 1), (torch.zeros(3), 1)), r"item 1: x is torch.float32 \[3\], but item 0's is"),
        (Pairs((torch.zeros(2), 1), (torch.zeros(2), 1.0)), "item 1: y is torch.float64"),
    ],
)
def test_from_dataset_names_the_item_it_refuses(dataset: TorchDataset[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_dataset(dataset, [0, 1])


def packed() -> Packed:
    return from_list([([[0.0], [1.0]], [0, 1]), ([[2.0], [3.0], [4.0]], [2, 3, 4])])


def test_a_client_is_a_view_of_its_rows() -> None:
    clients = packed()
    client = clients.client(1)
    assert client.y.tolist() == [2, 3, 4]
    assert client.x.data_ptr() == clients.x[2:].data_ptr()


def test_sizes_are_of_the_clients_asked_for() -> None:
    assert packed().sizes(np.array([1, 0, 1])).tolist() == [3, 2, 3]


def test_take_deals_rows_anew() -> None:
    taken = packed().take(np.array([4, 0, 2]), np.array([0, 1, 1, 3]))
    assert taken.population == 3
    assert [taken.client(i).y.tolist() for i in range(3)] == [[4], [], [0, 2]]


def test_to_moves_every_tensor_and_leaves_absent_parts_absent() -> None:
    clients = packed()
    moved = FederatedData("mine", clients, clients.client(0), None, clients, 5, cast).to("meta")
    assert moved.clients.x.is_meta and moved.clients.y.is_meta
    assert moved.test is not None and moved.test.x.is_meta and moved.test.y.is_meta
    assert moved.held_out is not None and moved.held_out.x.is_meta
    assert moved.validation is None
    assert moved.clients.offsets is clients.offsets
