"""The readers of the official files, on small files of the same form and, where VFL_DATA says so, on the real ones."""

import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vfl.data import DATASETS, Dataset, load
from vfl.data.formats import FORMATS
from vfl.errors import UsageError

IDX = {"train": 5, "t10k": 3}  # examples of the small files
RECORDS, RECORD = 10_000, 3073
BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, ending: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random images and labels in MNIST's form, and what is in them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending]
    made = {}
    for split, M in IDX.items():
        made[split] = x, y = rng.integers(0, 256, (M, 28, 28)), rng.integers(0, 10, M)
        (folder / f"{split}-images-idx3-ubyte{ending}").write_bytes(pack(idx(x)))
        (folder / f"{split}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(y)))
    return made


def holds(dataset: Dataset, made: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    assert dataset.test is not None
    for examples, split in ((dataset.train, "train"), (dataset.test, "t10k")):
        x, y = made[split]
        assert examples.x.dtype == torch.uint8 and examples.y.dtype == torch.int64
        assert np.array_equal(examples.x.numpy(), x[:, None]) and np.array_equal(examples.y.numpy(), y)


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_read_plain_or_packed(name: str, ending: str, tmp_path: Path) -> None:
    made = write_idx(tmp_path / name, ending)
    dataset = load(name, tmp_path)
    holds(dataset, made)
    assert (dataset.name, dataset.classes, dataset.users) == (name, 10, None)


@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
def test_idx_files_may_lie_in_the_root_or_where_torchvision_puts_them(folder: str, tmp_path: Path) -> None:
    made = write_idx(tmp_path / folder)
    holds(load("mnist", tmp_path), made)


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        UsageError, match=r"t10k-labels-idx1-ubyte .*missing.*vfl data get mnist.*--data-root or VFL_DATA"
    ):
        load("mnist", tmp_path)


def labels_of(*labels: int) -> Callable[[bytes], bytes]:
    return lambda _: idx(np.array(labels))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("images-idx3", lambda content: content[:-1], "3,935 bytes instead of the 3,936 its header promises"),
        ("images-idx3", lambda content: content + b"0", "3,937 bytes instead of the 3,936"),
        ("images-idx3", lambda content: content[:9], "magic number is 0x00000803"),
        ("images-idx3", lambda _: b"", "magic number is 0x00000000, not the 0x00000803 of IDX images"),
        ("images-idx3", lambda content: b"<htm" + content[4:], "magic number is 0x3c68746d"),
        ("images-idx3", lambda _: idx(np.zeros((5, 14, 28))), "images are 14 × 28, not 28 × 28"),
        ("labels-idx1", lambda _: idx(np.zeros((5, 28, 28))), "magic number is 0x00000803, not the 0x00000801"),
        ("labels-idx1", labels_of(0, 1, 2, 3), "4 labels for the 5 images of train-images-idx3-ubyte"),
        ("labels-idx1", labels_of(0, 1, 2, 3, 10), "holds the label 10, but labels are 0 to 9"),
    ],
)
def test_a_damaged_idx_file_is_named_with_its_damage(
    file: str, damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    write_idx(tmp_path / "mnist")
    path = tmp_path / "mnist" / f"train-{file}-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=message) as error:
        load("mnist", tmp_path)
    assert str(error.value).startswith(f"{path} is damaged")
    assert "delete it and run `vfl data get mnist`" in str(error.value)


@pytest.mark.parametrize("ending", [".gz", ".xz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:100] + bytes(50) + content[150:],
        lambda content: b"no archive at all",
    ],
    ids=["truncated", "overwritten", "replaced"],
)
def test_a_damaged_archive_is_named(ending: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", ending)
    path = tmp_path / "mnist" / f"train-images-idx3-ubyte{ending}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=r"is damaged: it cannot be read .*vfl data get mnist") as error:
        load("mnist", tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every file")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / "train-images-idx3-ubyte").chmod(0)
    with pytest.raises(UsageError, match="train-images-idx3-ubyte cannot be read: permission denied"):
        load("mnist", tmp_path)


def test_the_other_sets_files_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    write_idx(tmp_path)
    opening = np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 4])  # MNIST's first labels
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(opening))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((10, 28, 28))))
    assert len(load("mnist", tmp_path).train.y) == 10
    with pytest.raises(UsageError, match="belongs to mnist, not fashion_mnist; give each set its own folder"):
        load("fashion_mnist", tmp_path)


def batch(number: int) -> bytes:
    """A CIFAR-10 file of the official size: labels 0 … 9 in turn; number, 100 and 200 in the three planes' corners."""
    records = np.zeros((RECORDS, RECORD), np.uint8)
    records[:, 0] = np.arange(RECORDS) % 10
    records[:, [1, 1 + 1024, 1 + 2048]] = number, 100, 200
    return records.tobytes()


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(BATCHES):
        (folder / name).write_bytes(batch(i))


def write_tar(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name in ["readme.html", *reversed(names)]:  # whatever their order in the archive
            content = batch(BATCHES.index(name)) if name in BATCHES else b"hello"
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def holds_batches(dataset: Dataset) -> None:
    x, y = dataset.train
    assert dataset.test is not None
    assert x.shape == (50_000, 3, 32, 32) and dataset.test.x.shape == (10_000, 3, 32, 32)
    assert x.dtype == torch.uint8 and y.dtype == torch.int64
    assert x[::RECORDS, :, 0, 0].tolist() == [[i, 100, 200] for i in range(5)]
    assert dataset.test.x[0, :, 0, 0].tolist() == [5, 100, 200]
    assert x[:, :, 0, 1:].max() == 0
    assert torch.equal(y, torch.arange(50_000) % 10) and torch.equal(dataset.test.y, torch.arange(10_000) % 10)


def test_cifar_is_read_from_its_binary_files(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar10")
    path = tmp_path / "cifar10" / BATCHES[1]
    Path(f"{path}.xz").write_bytes(lzma.compress(path.read_bytes(), preset=0))
    path.unlink()
    holds_batches(load("cifar10", tmp_path))


def test_cifar_is_read_from_the_official_archive(tmp_path: Path) -> None:
    write_tar(tmp_path / "cifar10" / "cifar-10-binary.tar.gz", BATCHES)
    holds_batches(load("cifar10", tmp_path))


def test_an_incomplete_or_damaged_cifar_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    write_tar(path, BATCHES[:1])
    with pytest.raises(
        UsageError, match=r"cifar-10-binary.tar.gz is damaged: it lacks data_batch_2.bin.*test_batch.bin"
    ):
        load("cifar10", tmp_path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"no archive at all"):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"cifar-10-binary.tar.gz is damaged: it cannot be unpacked .*get cifar10"):
            load("cifar10", tmp_path)


def test_a_damaged_or_missing_cifar_file_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    third, last = tmp_path / BATCHES[2], tmp_path / BATCHES[5]
    content = batch(2)
    third.write_bytes(content[:-RECORD])  # cut at a record, as a broken copy may be
    with pytest.raises(UsageError, match=r"data_batch_3.bin is damaged: .* has 30,726,927 bytes instead of 30,730,000"):
        load("cifar10", tmp_path)
    third.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(UsageError, match=r"data_batch_3.bin is damaged: it holds the label 10"):
        load("cifar10", tmp_path)
    third.unlink()
    (tmp_path / f"{BATCHES[2]}.xz").write_bytes(lzma.compress(content, preset=0)[:-100])
    with pytest.raises(UsageError, match=r"data_batch_3.bin.xz is damaged: it cannot be read .*vfl data get cifar10"):
        load("cifar10", tmp_path)
    last.unlink()
    with pytest.raises(UsageError, match=r"test_batch.bin .*missing.*vfl data get cifar10"):
        load("cifar10", tmp_path)


def test_no_cifar_at_all_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data_batch_1.bin .*missing.*vfl data get cifar10"):
        load("cifar10", tmp_path)


def standardized(dataset: Dataset, places: float) -> None:
    """After its transform, the train split has mean 0 and standard deviation 1 in every channel."""
    x = dataset.train.x
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(-1, x.shape[1], -1, -1)
    values = dataset.transform(levels, torch.float64)[..., 0, 0].T  # [channels, 256]
    share = torch.stack([channel.flatten().bincount(minlength=256) for channel in x.unbind(1)]).double()
    share /= share.sum(1, keepdim=True)
    mean = (share * values).sum(1)
    assert mean.abs().max() < places
    assert ((share * values**2).sum(1) - mean**2 - 1).abs().max() < 2 * places


def test_digits_come_with_the_package_and_are_split_by_label() -> None:
    dataset = load("digits")
    assert dataset.test is not None
    assert dataset.train.x.shape == (1437, 1, 8, 8) and dataset.test.x.shape == (360, 1, 8, 8)
    assert dataset.train.x.dtype == torch.uint8 and dataset.train.x.max() == 16
    assert dataset.train.y.bincount().tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
    assert dataset.test.y.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    standardized(dataset, 1e-3)


def test_digits_are_those_of_the_origin() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, target = datasets.load_digits(return_X_y=True)
    dataset = load("digits")
    assert dataset.test is not None
    mine = [
        (*x.flatten().tolist(), int(y)) for part in (dataset.train, dataset.test) for x, y in zip(*part, strict=True)
    ]
    theirs = [(*map(int, x), int(y)) for x, y in zip(images, target, strict=True)]
    assert sorted(mine) == sorted(theirs)


REAL = {  # train and test examples, train labels, the first five
    "mnist": (60_000, 10_000, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], [5, 0, 4, 1, 9]),
    "fashion_mnist": (60_000, 10_000, [6000] * 10, [9, 0, 0, 3, 0]),
    "cifar10": (50_000, 10_000, [5000] * 10, [6, 9, 9, 4, 1]),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_files_hold_what_is_known_of_them(name: str) -> None:
    root = os.environ.get("VFL_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"VFL_DATA names no folder with {name}")
    dataset = load(name)
    train, test, counts, first = REAL[name]
    assert dataset.test is not None
    assert (len(dataset.train.y), len(dataset.test.y)) == (train, test)
    assert dataset.train.y.bincount().tolist() == counts
    assert dataset.train.y[:5].tolist() == first
    standardized(dataset, 1e-3)


def test_every_reader_is_tested_here_or_with_the_data_sets_or_leaf() -> None:
    elsewhere = {"digits", "synthetic", "femnist", "shakespeare", "tiny_shakespeare"}
    assert set(DATASETS) == {*REAL, *elsewhere, *FORMATS, "fedprox_synthetic", "quadratic", "libsvm"}
