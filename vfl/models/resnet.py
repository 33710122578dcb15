"""Residual networks for small images, safe under vmap: nothing in place, and no batch statistics unless asked for.

Letters: B batch, c channels, h and w the image's height and width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from vfl.errors import UsageError, unknown
from vfl.models.classic import image, outputs

NORMS = ("group", "batch")


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes (option B)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, groups, c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), _norm(norm, groups, c_out))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, c_in, h, w] → [B, c_out, h / stride, w / stride]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(
    width: int = 64, norm: str = "group", groups: int = 2, *, input_shape: tuple[int, ...], classes: int
) -> nn.Module:
    """ResNet-18 (He et al., arXiv 1512.03385) for small images: 11,173,962 parameters for 3×32×32 → 10.

    A 3×3 convolution in place of the 7×7 one and its pooling, then four stages of two blocks with 64, 128, 256 and 512
    channels (`width` is the first), global average pooling. `norm` is group (two groups, as Reddi et al., 2003.00295,
    have it for CIFAR-100: batch norm suffers where clients' data differ, Hsieh et al., 1910.00189) or batch.
    Convolutions start as He et al. (arXiv 1502.01852) draw them, the rest as torch does. Images from 8×8 on.
    """
    c, _, _ = image("resnet18", input_shape, smallest=8)
    if norm not in NORMS:
        raise unknown("norm of resnet18", norm, NORMS)
    if width < 1 or groups < 1 or (norm == "group" and width % groups):
        raise UsageError(f"resnet18: width must be a multiple of groups and both at least 1, not {width} and {groups}")
    layers: list[nn.Module] = [nn.Conv2d(c, width, 3, padding=1, bias=False), _norm(norm, groups, width), nn.ReLU()]
    c_in = width
    for stage in range(4):
        for stride in (1 if stage == 0 else 2, 1):
            layers.append(BasicBlock(c_in, width << stage, stride, norm, groups))
            c_in = width << stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, outputs(classes))]
    net = nn.Sequential(*layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _norm(norm: str, groups: int, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(groups, channels)
