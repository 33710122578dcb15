"""From a name to federated data: roots, validation and held-out splits, the synthetic set."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vfl.data import Dataset, Examples, FederatedData, cast, data_root, federate, federated, load
from vfl.errors import UsageError

SIZES = [40, 1, 9, 50]  # examples of the users 2, 3, 5, 7
NAMES = np.array([2, 3, 5, 7])


def numbered(natural: str = "users") -> Dataset:
    """100 training examples numbered through, of four users."""
    x = torch.arange(100)
    train, test = Examples(x, x % 4), Examples(x[:5], x[:5] % 4)
    if natural == "users":
        return Dataset("numbered", train, test, 4, cast, users=np.repeat(NAMES, SIZES))
    if natural == "offsets":
        return Dataset("numbered", train, test, 4, cast, offsets=np.cumsum([0, *SIZES]))
    return Dataset("numbered", train, test, 4, cast)


def parts(data: FederatedData) -> list[list[int]]:
    """The numbers in the clients' training examples, the validation set and the held-out examples."""
    validation = data.validation.x.tolist() if data.validation else []
    return [data.clients.x.tolist(), validation, data.held_out.x.tolist() if data.held_out else []]


def test_the_root_is_the_argument_then_vfl_data_then_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VFL_DATA", str(tmp_path / "env"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_root(tmp_path / "given") == tmp_path / "given"
    assert data_root() == tmp_path / "env"
    monkeypatch.delenv("VFL_DATA")
    assert data_root() == tmp_path / "cache" / "vfl" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "vfl" / "data"
    assert data_root("~/here") == Path.home() / "here"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnits", "unknown data set 'mnits'; did you mean 'mnist'"),
        ("digits:3", "data set 'digits:3'"),
        ("synthetic:feature=3", "has no 'feature'"),
    ],
)
def test_an_unknown_data_set_or_parameter_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(spec)


def test_one_call_gives_federated_digits() -> None:
    data = federated("digits", partition="dirichlet:0.3", clients=50)
    assert (data.name, data.classes, data.clients.population) == ("digits", 10, 50)
    assert data.clients.x.shape == (1437, 1, 8, 8)
    assert data.test is not None and len(data.test.y) == 360
    assert data.validation is None and data.held_out is None


def test_the_clients_are_a_hundred_and_iid_where_nobody_says_otherwise() -> None:
    data = federated("digits")
    assert data.clients.population == 100 and np.ptp(data.clients.sizes()) == 1


def test_the_partition_is_natural_where_users_are_known() -> None:
    for natural in ("users", "offsets"):
        assert federate(numbered(natural)).clients.sizes().tolist() == SIZES
    assert federate(numbered("none"), clients=4).clients.sizes().tolist() == [25] * 4


def test_another_partition_may_be_dealt_over_users() -> None:
    for natural in ("users", "offsets"):
        assert federate(numbered(natural), partition="iid", clients=5).clients.sizes().tolist() == [20] * 5


def test_rows_that_lie_user_by_user_are_not_copied() -> None:
    dataset = numbered("offsets")
    assert federate(dataset).clients.x.data_ptr() == dataset.train.x.data_ptr()


@pytest.mark.parametrize("natural", ["users", "offsets", "none"])
@pytest.mark.parametrize(("validation", "held_out"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.3), (0.2, 0.3)])
def test_every_example_is_trained_on_or_validated_on_or_held_out(
    natural: str, validation: float, held_out: float
) -> None:
    clients = None if natural != "none" else 7
    data = federate(numbered(natural), clients=clients, validation=validation, held_out=held_out)
    assert sorted(number for part in parts(data) for number in part) == list(range(100))
    assert (data.validation is not None) == (validation > 0) and (data.held_out is not None) == (held_out > 0)


def test_validation_is_the_fraction_of_all_examples_before_they_are_dealt() -> None:
    data = federate(numbered("none"), clients=8, validation=0.2)
    assert data.validation is not None and len(data.validation.y) == 20
    assert data.clients.sizes().tolist() == [10] * 8


@pytest.mark.parametrize("natural", ["users", "offsets"])
def test_natural_validation_takes_evenly_from_each_user_and_loses_none(natural: str) -> None:
    data = federate(numbered(natural), validation=0.2)
    assert data.clients.sizes().tolist() == [32, 1, 7, 40]


def test_held_out_examples_are_the_clients_own() -> None:
    data = federate(numbered(), held_out=0.5)
    assert data.held_out is not None and data.held_out.population == 4
    assert data.held_out.sizes().tolist() == [20, 0, 5, 25]
    edges = np.cumsum([0, *SIZES])
    for i in range(4):
        both = data.clients.client(i).x.tolist() + data.held_out.client(i).x.tolist()
        assert sorted(both) == list(range(edges[i], edges[i + 1]))


def test_targets_stay_with_their_inputs() -> None:
    data = federate(numbered("none"), partition="dirichlet:0.5", clients=7, validation=0.2, held_out=0.3)
    assert data.validation is not None and data.held_out is not None
    for x, y in (data.clients[:2], data.validation, data.held_out[:2]):
        assert torch.equal(x % 4, y)


def test_federating_depends_on_the_seed_alone() -> None:
    splits = [parts(federate(numbered("none"), clients=7, seed=s, validation=0.2, held_out=0.3)) for s in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert all(a != b for a, b in zip(splits[0], splits[2], strict=True))


@pytest.mark.parametrize("natural", ["users", "offsets"])
def test_natural_refuses_another_number_of_clients(natural: str) -> None:
    with pytest.raises(UsageError, match="the data has 4 users, not 5"):
        federate(numbered(natural), partition="natural", clients=5)
    with pytest.raises(UsageError, match="natural:3"):
        federate(numbered(natural), partition="natural:3")


def test_natural_refuses_data_without_users() -> None:
    with pytest.raises(UsageError, match="does not say whose"):
        federate(numbered("none"), partition="natural")


@pytest.mark.parametrize("offsets", [[0, 50], [0, 60, 50, 100], [1, 100]])
def test_offsets_that_do_not_cover_the_examples_are_refused(offsets: list[int]) -> None:
    dataset = numbered("none")._replace(offsets=np.array(offsets))
    with pytest.raises(UsageError, match="offsets of numbered must rise from 0 to its 100 training examples"):
        federate(dataset)


@pytest.mark.parametrize("part", ["validation", "held_out"])
def test_a_fraction_that_leaves_nothing_is_refused(part: str) -> None:
    for fraction in (1.0, -0.5):
        with pytest.raises(UsageError, match=f"{part}: the fraction must be"):
            federate(numbered(), **{part: fraction})


def test_synthetic_gives_every_client_its_examples() -> None:
    data = federated("synthetic:features=5,classes=3,examples=7,test=11", clients=13)
    assert data.clients.x.shape == (91, 5) and data.clients.x.dtype == torch.float32
    assert data.clients.y.dtype == torch.int64 and set(data.clients.y.tolist()) == {0, 1, 2}
    assert (data.clients.sizes() == 7).all() and data.clients.population == 13
    assert data.test is not None and data.test.x.shape == (11, 5)
    assert load("synthetic:test=0", clients=2).test is None


def test_synthetic_may_be_dealt_by_label() -> None:
    data = federated("synthetic:examples=20", partition="labels:2", clients=30)
    assert data.clients.sizes().sum() == 600
    assert max(len(data.clients.client(i).y.unique()) for i in range(30)) == 2


def test_synthetic_is_gaussian_about_its_class_means() -> None:
    dataset = load("synthetic:features=16,classes=4,examples=400,separation=3", clients=100)
    x, y = dataset.train
    means = torch.stack([x[y == c].mean(0) for c in range(4)])
    noise = x - means[y]
    assert noise.std(0).numpy() == pytest.approx(1, abs=0.02)
    assert (noise.T @ noise / len(noise) - torch.eye(16)).abs().max() < 0.05
    # The squared distance of two means is 9 χ²₁₆ / 16: 9 on average. 6 pairs of 4 means, of 25 seeds.
    squares = []
    for seed in range(25):
        x, y = load("synthetic:features=16,classes=4,examples=400,separation=3", clients=1, seed=seed).train
        squares.append(torch.pdist(torch.stack([x[y == c].mean(0) for c in range(4)])).square().mean().item())
    # Each estimated mean adds its own noise, 16 / 100, to the square.
    assert np.mean(squares) == pytest.approx(9 + 2 * 16 / 100, rel=0.15)


def test_synthetic_shares_its_means_between_train_and_test() -> None:
    dataset = load("synthetic:examples=100", clients=50)
    assert dataset.test is not None
    means = torch.stack([dataset.train.x[dataset.train.y == c].mean(0) for c in range(10)])
    nearest = torch.cdist(dataset.test.x, means).argmin(1)
    accuracy = (nearest == dataset.test.y).float().mean()
    assert 0.75 < accuracy < 0.98  # learnable, and not for free


def test_synthetic_depends_on_the_seed_and_its_first_clients_not_on_how_many_there_are() -> None:
    few, more, other = (load("synthetic", clients=n, seed=s).train for n, s in ((3, 0), (9, 0), (3, 1)))
    assert torch.equal(few.x, more.x[:60]) and torch.equal(few.y, more.y[:60])
    assert not torch.equal(few.x, other.x) and not torch.equal(few.y, other.y)


def test_synthetic_does_not_depend_on_its_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load("synthetic", clients=30).train
    monkeypatch.setattr("vfl.data.synthetic._BLOCK", 32 * 7)
    blocks = load("synthetic", clients=30).train
    assert torch.equal(whole.x, blocks.x) and torch.equal(whole.y, blocks.y)


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ("synthetic:features=0", 5, "features must be at least 1, not 0"),
        ("synthetic:classes=1", 5, "classes must be at least 2, not 1"),
        ("synthetic:examples=0", 5, "examples must be at least 1, not 0"),
        ("synthetic:test=-1", 5, "test must be at least 0, not -1"),
        ("synthetic:separation=-1", 5, "separation must be a number from 0 up"),
        ("synthetic:separation=inf", 5, "separation must be a number from 0 up"),
        ("synthetic", 0, "clients must be at least 1, not 0"),
    ],
)
def test_synthetic_refuses_what_it_cannot_draw(spec: str, clients: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        federated(spec, clients=clients)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory where Linux tells it")
def test_synthetic_peaks_at_its_own_bytes() -> None:
    program = """
import re, pathlib
from vfl.data import federated

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

federated("synthetic", clients=10)
before = peak()
data = federated("synthetic:features=32", clients=100_000).clients
print(data.x.nbytes + data.y.nbytes, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    data, grown = map(int, done.stdout.split())
    assert data == 2_000_000 * (32 * 4 + 8)
    assert 0.9 * data < grown < data + 50e6  # a second copy would add 272 MB


def test_importing_the_data_module_loads_no_plotting() -> None:
    program = "import sys, vfl.data; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
