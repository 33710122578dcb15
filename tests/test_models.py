"""Models: sizes, shapes, vmap, and the errors of models by import path."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from vfl.errors import UsageError
from vfl.models import MODELS, model


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("spec", "shape", "count"),
    [
        ("softmax", (784,), 7_850),
        ("softmax", (1, 28, 28), 7_850),
        ("mlp", (1, 28, 28), 199_210),
        ("mlp:200,200", (784,), 199_210),
        ("mlp:30", (64,), 64 * 30 + 30 + 30 * 10 + 10),
        ("cnn", (1, 28, 28), 1_663_370),
        ("lenet", (1, 28, 28), 61_706),
        ("lenet", (3, 32, 32), 62_006),
    ],
)
def test_model_has_the_papers_number_of_parameters(spec: str, shape: tuple[int, ...], count: int) -> None:
    assert parameters(model(spec, shape, 10)) == count


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("softmax", (5,)),
        ("softmax", (3, 8, 8)),
        ("mlp:7", (5,)),
        ("mlp", (1, 8, 8)),
        ("cnn", (1, 4, 5)),
        ("cnn", (1, 8, 8)),
        ("cnn", (3, 32, 32)),
        ("lenet", (1, 12, 13)),
        ("lenet", (1, 28, 40)),
        ("lenet", (3, 32, 32)),
        ("lenet", (1, 35, 64)),
    ],
)
@pytest.mark.parametrize(("classes", "outputs"), [(0, 1), (1, 1), (7, 7)])
def test_model_gives_one_output_a_class(spec: str, shape: tuple[int, ...], classes: int, outputs: int) -> None:
    assert model(spec, shape, classes)(torch.zeros(2, *shape)).shape == (2, outputs)


@pytest.mark.parametrize(
    ("spec", "shape"), [("softmax", (4,)), ("mlp:6,5", (2, 3)), ("cnn", (1, 8, 8)), ("lenet", (2, 12, 12))]
)
def test_vmapped_gradients_equal_a_loop(spec: str, shape: tuple[int, ...]) -> None:
    C, B, classes = 3, 4, 5
    torch.manual_seed(0)
    modules = [model(spec, shape, classes).double() for _ in range(C)]
    stacked = {
        n: torch.stack([dict(m.named_parameters())[n].detach() for m in modules]) for n in modules[0].state_dict()
    }
    x, y = torch.randn(C, B, *shape, dtype=torch.float64), torch.randint(classes, (C, B))

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(modules[0], p, (x,)), y)

    mapped = vmap(grad(loss))(stacked, x, y)
    for i, module in enumerate(modules):
        cross_entropy(module(x[i]), y[i]).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.any()
            torch.testing.assert_close(mapped[name][i], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", [name for name in MODELS if name != "linear"])
def test_the_same_seed_draws_the_same_parameters(spec: str) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        shape = (12,) if spec.startswith("char") else (1, 12, 12)
        made.append(nn.utils.parameters_to_vector(model(spec, shape, 10).parameters()))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_linear_is_one_vector_that_starts_at_zero(classes: int) -> None:
    module = model("linear", (2, 3), classes)
    (x,) = module.parameters()
    assert x.numel() == 6 and not x.any()
    with torch.no_grad():
        x.copy_(torch.arange(6.0).reshape(x.shape))
    a = torch.randn(4, 2, 3)
    torch.testing.assert_close(module(a), a.flatten(1) @ torch.arange(6.0)[:, None])


@pytest.mark.parametrize(
    ("spec", "shape", "says"),
    [
        ("mpl:200", (4,), "unknown model 'mpl'; did you mean 'mlp'?"),
        ("transformer", (4,), "known: char_gru, char_lstm, cnn, lenet, linear, mlp, resnet18, softmax"),
        ("mlp:0", (4,), "mlp: every layer must have at least 1 unit, not 0"),
        ("mlp:wide", (4,), "expected mlp[:SIZES,…], where sizes is a whole number, not 'wide'"),
        ("linear", (4,), "linear: has one output, for regression or two classes, not for 10; take softmax"),
        ("softmax:3", (4,), "expected softmax, which takes no unnamed values, not 1"),
        ("cnn", (784,), "cnn: needs images [channels, height, width], not inputs of shape [784]"),
        ("cnn", (1, 3, 8), "cnn: needs images of at least 4×4 pixels, not 3×8"),
        ("lenet", (1, 8, 8), "lenet: needs images of at least 12×12 pixels, not 8×8"),
    ],
)
def test_a_model_refuses_what_it_cannot_take(spec: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        model(spec, shape, 10)
    assert says in str(caught.value)


def test_a_negative_number_of_classes_raises() -> None:
    with pytest.raises(UsageError, match="at least 0, not -1"):
        model("softmax", (4,), -1)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package vfl_zoo on Python's path, forgotten afterwards."""
    package = tmp_path / "vfl_zoo"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(
        "from torch import nn\n"
        "def wide(input_shape, classes): return nn.Linear(*input_shape, classes)\n"
        "def fixed(): return nn.Linear(3, 2)\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, shape, outputs):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(*shape, outputs)\n"
        "def greedy(a, b, c): return nn.Identity()\n"
        "def broken(): raise KeyError('weights')\n"
        "def other(): return 3\n"
        "number = 3\n"
    )
    (package / "lacking.py").write_text("import vfl_no_such_package\n")
    (package / "faulty.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vfl_zoo"]:
        del sys.modules[name]


@pytest.mark.parametrize(("factory", "count"), [("wide", 50), ("fixed", 8), ("Net", 50)])
def test_a_model_by_import_path_comes_from_its_factory(zoo: None, factory: str, count: int) -> None:
    assert parameters(model(f"vfl_zoo.nets:{factory}", (4,), 10)) == count


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "vfl_nowhere:make",
            "no module named 'vfl_nowhere' can be imported, nor is it one of linear, softmax, mlp, cnn, lenet",
        ),
        ("vfl_zoo.nowhere:make", "no module named 'vfl_zoo.nowhere'"),
        ("vfl_zoo.lacking:make", "importing vfl_zoo.lacking failed: ModuleNotFoundError: No module named 'vfl_no_such"),
        ("vfl_zoo.faulty:make", "importing vfl_zoo.faulty failed: ZeroDivisionError"),
        ("vfl_zoo.nets:absent", "vfl_zoo.nets has no function or class 'absent'"),
        ("vfl_zoo.nets:number", "vfl_zoo.nets has no function or class 'number'"),
        ("vfl_zoo.nets:greedy", "greedy must take (input_shape, classes), or nothing"),
        ("vfl_zoo.nets:broken", "broken failed: KeyError: 'weights'"),
        ("vfl_zoo.nets:other", "other must return a torch.nn.Module, not int"),
    ],
)
def test_a_bad_import_path_is_explained(zoo: None, path: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        model(path, (4,), 10)
    assert says in str(caught.value)
    assert repr(path) in str(caught.value)
