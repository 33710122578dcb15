"""The small models of the federated-learning papers, safe under vmap: nothing in place, no branch on values.

Letters: B batch, c channels, h and w the image's height and width. Weights are torch's default initialisation.
"""

from __future__ import annotations

import math

from torch import nn

from vfl.errors import UsageError


def linear(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """x ↦ aᵀx on the flattened input a: one output without bias, for regression and two classes; starts at x = 0."""
    if classes > 2:
        raise UsageError(f"linear: has one output, for regression or two classes, not for {classes}; take softmax")
    layer = nn.Linear(math.prod(input_shape), 1, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(nn.Flatten(), layer)


def softmax(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer on the flattened input; 7,850 parameters for 784 → 10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), outputs(classes)))


def mlp(*sizes: int, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Fully connected ReLU layers of these sizes; none given: 200 and 200.

    That is the 2NN of McMahan et al. (1602.05629, §3), 199,210 parameters for 784 → 10.
    """
    if any(size < 1 for size in sizes):
        raise UsageError(f"mlp: every layer must have at least 1 unit, not {min(sizes)}")
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(input_shape)
    for size in sizes or (200, 200):
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs(classes)))


def cnn(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The CNN of McMahan et al. (1602.05629, §3): 1,663,370 parameters for 1×28×28 → 10.

    Two 5×5 convolutions of 32 and 64 channels that keep the size, each with ReLU and 2×2 max pooling; 512 ReLU units.
    Images from 4×4 on.
    """
    c, h, w = image("cnn", input_shape, smallest=4)
    return nn.Sequential(
        nn.Conv2d(c, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (h // 4) * (w // 4), 512),
        nn.ReLU(),
        nn.Linear(512, outputs(classes)),
    )


def lenet(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al., Proc. IEEE 1998) with ReLU and max pooling: 61,706 parameters for 1×28×28 → 10.

    Two 5×5 convolutions of 6 and 16 channels, then 120 and 84 units. As the original, it works on 32×32 pixels, so
    smaller images get a border of 2. Images from 12×12 on.
    """
    c, h, w = image("lenet", input_shape, smallest=12)
    border = 2 if min(h, w) < 32 else 0
    height, width = (((side + 2 * border - 4) // 2 - 4) // 2 for side in (h, w))
    return nn.Sequential(
        nn.Conv2d(c, 6, 5, padding=border),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * height * width, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, outputs(classes)),
    )


def image(who: str, shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """(c, h, w) of an input shape that must be an image's."""
    if len(shape) != 3:
        raise UsageError(f"{who}: needs images [channels, height, width], not inputs of shape {list(shape)}")
    c, h, w = shape
    if min(h, w) < smallest:
        raise UsageError(f"{who}: needs images of at least {smallest}×{smallest} pixels, not {h}×{w}")
    return c, h, w


def outputs(classes: int) -> int:
    """Outputs for a number of classes, where 0 stands for regression on one value."""
    if classes < 0:
        raise UsageError(f"the number of classes must be at least 0, not {classes}")
    return max(classes, 1)
