"""The example of gradient inversion recovers what a client sent, and noise keeps it from it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vfl

PATH = Path(__file__).parent.parent / "scripts" / "gradient_inversion.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gradient_inversion", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gradient_inversion"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("model", "example"), [("mlp", 0), ("mlp", 7), ("softmax", 2)])
def test_a_digit_is_recovered_from_its_gradient(
    model: Any, example: int, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "digit.png"
    error = script.Inversion(model=model, example=example, restarts=1, out=out).run()
    label = int(vfl.data.load("digits").train.y[example])
    assert error < 1e-6 and f"label:    {label}, in truth {label}" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")


def test_noise_on_the_gradient_hides_the_digit(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    errors = [script.Inversion(noise=noise, steps=60, restarts=1, out=tmp_path / "a.png").run() for noise in (0.0, 0.3)]
    assert errors[1] > 0.1 > 100 * errors[0]


def test_what_the_client_sends_is_the_gradient_of_its_loss(script: ModuleType) -> None:
    torch.manual_seed(0)
    module = script.network("mlp", 4, 3).double()
    image, task = torch.randn(1, 1, 2, 2, dtype=torch.float64), vfl.task(module, dtype=torch.float64)
    loss = torch.nn.functional.cross_entropy(module(image), torch.tensor([2]))
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(script.sent(task, image, 2, 0.0, 1), wanted)
    noisy = script.sent(task, image, 2, 0.5, 1) - wanted
    assert abs(noisy.std().item() - 0.5) < 0.08


def test_bad_input_is_one_sentence(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(vfl.UsageError, match="example must be from 0 to 1436, not 1437"):
        script.Inversion(example=1437).run()
    with pytest.raises(vfl.UsageError, match="restarts must be at least 1, not 0"):
        script.Inversion(restarts=0, out=tmp_path / "a.png").run()
