"""Activation checkpointing gives the same gradients under every execution, from the layers' inputs alone; TF32."""

import weakref

import pytest
import torch
from helpers import ALGORITHMS, CLASSES, FEATURES, assert_same, federated, make_task, run
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import vfl
from vfl import programs
from vfl.cli import _main
from vfl.cli import experiment as cli_experiment
from vfl.errors import UsageError
from vfl.precision import tf32
from vfl.task import Batch


def network() -> nn.Module:
    """Two blocks, of which the first holds another."""
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    return nn.Sequential(
        nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), inner), nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh()),
        nn.Linear(6, CLASSES),
    )  # fmt: skip


NAMES = ("0", "1")


def tasks(module: nn.Module, names: tuple[str, ...], **options) -> tuple[vfl.Task, vfl.Task]:
    """Without and with recomputation."""
    plain = make_task(module)
    return plain, vfl.task(module, dtype=torch.float64, recompute=names, **options)


def batch(rows: int = 7) -> Batch:
    """Random examples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(rows) % CLASSES, torch.ones(rows, dtype=torch.bool), vfl.random.key(0))


@pytest.mark.parametrize("names", [NAMES, ("0.2",), ("0", "2")])
def test_gradients_are_the_same_alone_and_under_vmap(names):
    plain, forgetful = tasks(network(), names)
    given = batch()
    wanted, _ = plain.grad_fn(plain.x, given, ())
    torch.testing.assert_close(forgetful.grad_fn(plain.x, given, ())[0], wanted, rtol=1e-13, atol=1e-13)
    models = plain.x + 0.1 * torch.arange(3, dtype=torch.float64)[:, None]  # [C, D]
    each = torch.stack([plain.grad_fn(x, given, ())[0] for x in models])
    found = vmap(lambda x: forgetful.grad_fn(x, given, ())[0])(models)
    torch.testing.assert_close(found, each, rtol=1e-13, atol=1e-13)


def test_second_derivatives_are_the_same():
    plain, forgetful = tasks(network(), NAMES)
    given, direction = batch(), torch.linspace(-1, 1, len(plain.x), dtype=torch.float64)
    found, wanted = (
        torch.func.grad(lambda x, task=task: (task.grad_fn(x, given, ())[0] * direction).sum())(plain.x)
        for task in (forgetful, plain)
    )
    assert wanted.norm() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("execution", ["vmap", "loop", "compile"])
def test_runs_are_the_same(execution, monkeypatch):
    monkeypatch.setattr(programs, "compile_graph", lambda graph, inputs: graph)
    plain, forgetful = tasks(network(), NAMES)
    options = {"clients_per_round": 6, "batch_size": 4, "chunk": 6, "local_steps": 1}
    wanted = run(ALGORITHMS["fedavg"], plain, federated(), 2, **options)
    assert_same(run(ALGORITHMS["fedavg"], forgetful, federated(), 2, execution=execution, **options), wanted, 1e-12)


class Held(TorchDispatchMode):
    """The most entries of tensors made inside that were ever held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def freed(_: object) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("clients", [None, 2])
def test_activations_within_a_layer_are_not_kept(clients):
    """Of three blocks of ten tanh, one at a time holds its activations."""
    blocks = [nn.Sequential(*[nn.Tanh()] * 10) for _ in range(3)]
    module = nn.Sequential(nn.Linear(FEATURES, 50), *blocks, nn.Linear(50, CLASSES))
    given, most = batch(40), []
    for task in tasks(module, ("1", "2", "3")):
        x = task.x if clients is None else task.x.expand(clients, -1).clone()

        def gradient(x: Tensor, task: vfl.Task = task) -> Tensor:
            return task.grad_fn(x, given, ())[0]

        with Held() as held:
            gradient(x) if clients is None else vmap(gradient)(x)
        most.append(held.most)
    activations = 40 * 50 * 8 * (clients or 1)
    assert most[0] > 30 * activations  # one after each tanh
    # The inputs of three blocks and one's ten activations, for each of which torch.func keeps its gradient, too.
    assert most[1] < (3 + 10 + 10 + 1) * activations


def test_the_state_dict_is_that_of_the_module():
    module = network()
    _, forgetful = tasks(module, NAMES)
    state = forgetful.state_dict(forgetful.x, ())
    assert state.keys() == module.state_dict().keys()
    assert "forward" not in vars(module[0])  # the module given is left alone


class Tokens(nn.Module):
    """Integer inputs, and weights that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.embed(x.long()[:, 0].clamp(0, 3)).tanh())


def test_integer_inputs_and_tied_weights():
    module = nn.Sequential(Tokens())
    plain, forgetful = tasks(module, ("0",))
    given = batch()
    wanted, _ = plain.grad_fn(plain.x, given, ())
    found = vmap(lambda x: forgetful.grad_fn(x, given, ())[0])(plain.x[None])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("module", "names", "sentence"),
    [
        (network(), ("3",), "recompute '3': the model has no such submodule; known: 0, 0.0"),
        (network(), ("",), "no such submodule"),
        (network(), ("0.2", "0"), "recompute '0.2': lies within '0'"),
        (nn.Sequential(nn.Linear(FEATURES, 3), nn.Dropout(0.5)), ("1",), "batch norm and dropout would go on twice"),
    ],
)
def test_bad_input_is_named(module, names, sentence):
    with pytest.raises(UsageError, match=sentence):
        vfl.task(module, recompute=names)


def test_a_layer_that_returns_more_than_a_tensor_is_named():
    task = vfl.task(nn.Sequential(nn.GRU(FEATURES, 2)), recompute=("0",))
    with pytest.raises(UsageError, match="recompute '0': the layer must return one tensor, not tuple"):
        task.grad_fn(task.x, batch()._replace(x=torch.zeros(1, 7, FEATURES)), ())


def test_a_run_takes_the_layers_to_recompute(tmp_path, monkeypatch):
    named, original = [], cli_experiment.task
    monkeypatch.setattr(cli_experiment, "task", lambda *a, **o: named.append(o["recompute"]) or original(*a, **o))
    arguments = ["run", "fedavg", "--data", "synthetic:features=4,examples=6", "--clients", "10", "--rounds", "1"]
    arguments += ["--model", "mlp:5", "--execution", "vmap", "--out", str(tmp_path / "run"), "--quiet"]
    assert _main([*arguments, "--recompute", "1, 2", "--dtype", "tf32"]) == 0
    assert named == [("1", "2")]
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_for_as_long_as_it_is_asked_for():
    for wanted, inside in ((True, "high"), (False, "highest")):
        with pytest.raises(KeyError), tf32(wanted):
            assert torch.get_float32_matmul_precision() == inside
            raise KeyError
        assert torch.get_float32_matmul_precision() == "highest"
