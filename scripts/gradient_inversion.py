"""Deep leakage from gradients (Zhu, Liu, Han, arXiv 1906.08935): a client's digit, recovered from what it sends.

A client sends the gradient g of one example, as FedSGD does. The attacker, who knows the model x, draws an image,
reads a first guess of the label off g (Zhao et al., 2001.02610), and moves both until their gradient is g:
min ‖∇ℓ(x; image, label) − g‖². Nothing else is known to it.

    python scripts/gradient_inversion.py                      # an 8 × 8 digit, from the embedded data
    python scripts/gradient_inversion.py --data mnist --noise 0.01    # with Gaussian noise on what is sent
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

import vfl


class Recovered(NamedTuple):
    """What the attacker has in the end."""

    image: Tensor  # [1, channels, height, width]
    label: int
    mismatch: float  # ‖∇ℓ − g‖²


def network(kind: Literal["softmax", "mlp"], size: int, classes: int) -> nn.Module:
    """A model whose gradient can be differentiated again: sigmoids, where ReLUs would have no second derivative."""
    if kind == "softmax":
        return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
    module = nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.Sigmoid(), nn.Linear(64, classes))
    for layer in module.children():
        if isinstance(layer, nn.Linear):  # larger than torch's, which leave little to see, and no sigmoid saturated
            nn.init.uniform_(layer.weight, -2 / math.sqrt(layer.in_features), 2 / math.sqrt(layer.in_features))
    return module


def sent(task: vfl.Task, image: Tensor, label: int, noise: float, seed: int) -> Tensor:
    """The client's gradient [D] of one example, with noise of this standard deviation."""
    one = torch.ones(1, dtype=torch.bool)
    batch = vfl.Batch(image, torch.tensor([label]), one, vfl.random.key(seed))
    g, _ = task.grad_fn(task.x, batch, task.buffers)
    return g + noise * vfl.random.normal(vfl.random.key(seed + 1), g.shape, g.dtype)


def attack(
    module: nn.Module, g: Tensor, shape: torch.Size, classes: int, seed: int, steps: int, restarts: int
) -> Recovered:
    """The image and label whose gradient is nearest to g [D], by L-BFGS from several random beginnings."""
    parameters = list(module.parameters())
    bias = g[-classes:][None]  # its gradient is softmax(scores) − label: below 0 at the label alone (2001.02610)
    best = None
    for key in vfl.random.split(vfl.random.key(seed), restarts):
        # Near to blank: from brighter noise, whose softmax is all but certain, the descent often cannot leave.
        image = (0.1 * vfl.random.normal(key, shape, g.dtype)).requires_grad_()
        scores = (-5 * bias / bias.abs().max()).clone().requires_grad_()  # the label's, before softmax
        optimizer = torch.optim.LBFGS([image, scores], max_iter=steps, tolerance_change=1e-14, tolerance_grad=1e-12,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def mismatch(image: Tensor = image, scores: Tensor = scores) -> Tensor:
            loss = -(scores.softmax(-1) * module(image).log_softmax(-1)).sum()
            found = torch.autograd.grad(loss, parameters, create_graph=True)
            return (torch.cat([part.flatten() for part in found]) - g).square().sum()

        def closure(optimizer: torch.optim.LBFGS = optimizer, mismatch=mismatch) -> Tensor:
            optimizer.zero_grad()
            value = mismatch()
            value.backward()
            return value

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        value = float(mismatch().detach())
        if best is None or value < best.mismatch:
            best = Recovered(image.detach(), int(scores.argmax()), value)
    if best is None:
        raise vfl.UsageError(f"restarts must be at least 1, not {restarts}")
    return best


@dataclass(frozen=True)
class Inversion:
    """Recovers an example from its gradient, prints the error and draws both images."""

    data: str = "digits"
    """Images: digits, mnist, fashion_mnist, cifar10."""
    model: Literal["softmax", "mlp"] = "mlp"
    """The model: softmax regression, or one hidden layer of 64 sigmoids."""
    example: int = 0
    """Which training example the client has."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise on each entry of the gradient."""
    steps: int = 300
    """Steps of L-BFGS from each beginning."""
    restarts: int = 3
    """Random beginnings."""
    seed: int = 0
    """Seed of the model and of the attack."""
    data_root: Path | None = None
    """Folder of the data sets. Default: $VFL_DATA, else the user's cache."""
    out: Path = Path("gradient_inversion.png")
    """The picture's file."""

    def run(self) -> float:
        """The mean squared error of the recovered pixels, in units of their standard deviation over the data."""
        dataset = vfl.data.load(self.data, self.data_root)
        images, labels = dataset.train
        if not 0 <= self.example < len(labels):
            raise vfl.UsageError(f"example must be from 0 to {len(labels) - 1}, not {self.example}")
        image = dataset.transform(images[self.example : self.example + 1], torch.float64)
        label = int(labels[self.example])
        torch.manual_seed(self.seed)
        module = network(self.model, image.numel(), dataset.classes).double()
        task = vfl.task(module, dtype=torch.float64)
        g = sent(task, image, label, self.noise, self.seed)
        found = attack(module, g, image.shape, dataset.classes, self.seed, self.steps, self.restarts)
        error = float((found.image - image).square().mean())
        print(f"gradient: {g.numel():,} numbers, mismatch {found.mismatch:.3g}")
        print(f"label:    {found.label}, in truth {label}")
        print(f"pixels:   mean squared error {error:.3g} (1 is as far as two images of the data are from their mean)")
        draw(image, found.image, self.out)
        print(f"images:   {self.out}")
        return error


def draw(image: Tensor, recovered: Tensor, out: Path) -> None:
    """Both images side by side. Raises UsageError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise vfl.UsageError("the picture needs matplotlib; run `pip install vfl[plots]`") from None
    figure = Figure(figsize=(4, 2.2), layout="constrained")
    low, high = float(image.min()), float(image.max())
    for axes, pixels, title in zip(
        figure.subplots(1, 2), (image, recovered), ("the client's", "recovered"), strict=True
    ):
        shown = ((pixels[0] - low) / (high - low)).clamp(0, 1).permute(1, 2, 0)
        axes.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    try:
        tyro.cli(Inversion).run()
    except vfl.UsageError as error:
        raise SystemExit(f"gradient_inversion: {error}") from None
