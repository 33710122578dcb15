"""Models by name, and anyone's own by `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping

from torch import nn

from vfl.errors import UsageError
from vfl.models.classic import cnn, lenet, linear, mlp, softmax
from vfl.models.recurrent import char_gru, char_lstm
from vfl.models.resnet import resnet18
from vfl.spec import resolve

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "softmax": softmax,
    "mlp": mlp,
    "cnn": cnn,
    "lenet": lenet,
    "resnet18": resnet18,
    "char_lstm": char_lstm,
    "char_gru": char_gru,
}
"""Factories (…spec arguments…, *, input_shape, classes) → module; a factory may ask for `target_shape` too."""


def model(spec: str, input_shape: tuple[int, ...], classes: int, target_shape: tuple[int, ...] = ()) -> nn.Module:
    """A new module for inputs [B, *input_shape] with outputs [B, classes]; 0 classes (regression) mean one output.

    Where each example has a label a position, targets [B, *target_shape], sequence models give [B, T, classes].
    `spec` is a name of `MODELS` with its arguments, as `mlp:200,200`, or `package.module:factory`, where the factory
    takes (input_shape, classes), or nothing. The parameters are drawn by torch's global generator: seed that first.
    Raises UsageError for an unknown name, a bad argument, inputs the model cannot take, and a factory that cannot be
    imported, fails or returns something else than a module.
    """
    path, colon, attribute = (part.strip() for part in spec.partition(":"))
    if path not in MODELS and colon and attribute.isidentifier() and all(p.isidentifier() for p in path.split(".")):
        return _imported(spec, path, attribute, input_shape, classes)
    return resolve(spec, MODELS, "model", input_shape=input_shape, classes=classes, target_shape=target_shape)


def _imported(spec: str, path: str, attribute: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):  # the module is there, but imports one that is not
            raise UsageError(f"model {spec!r}: importing {path} failed: {_said(error)}") from error
        names = ", ".join(MODELS)
        raise UsageError(
            f"model {spec!r}: no module named {error.name!r} can be imported, nor is it one of {names}"
        ) from error
    except Exception as error:  # whatever else the module does on import
        raise UsageError(f"model {spec!r}: importing {path} failed: {_said(error)}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise UsageError(f"model {spec!r}: {path} has no function or class {attribute!r}")
    try:
        arguments = (input_shape, classes) if inspect.signature(factory).parameters else ()
        inspect.signature(factory).bind(*arguments)
    except (TypeError, ValueError):  # ValueError: written in C, without a signature
        raise UsageError(f"model {spec!r}: {attribute} must take (input_shape, classes), or nothing") from None
    try:
        made = factory(*arguments)
    except Exception as error:  # the factory is anyone's code
        raise UsageError(f"model {spec!r}: {attribute} failed: {_said(error)}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"model {spec!r}: {attribute} must return a torch.nn.Module, not {type(made).__name__}")
    return made


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
