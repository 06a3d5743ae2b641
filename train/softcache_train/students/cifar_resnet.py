"""ResNets for 32 × 32 images (He et al. 2016, "Deep Residual Learning", arXiv:1512.03385, §4.2).

Option-A shortcuts: where width or stride changes, the input is subsampled and padded with zero
channels, so that a shortcut has no parameters. Two places that are no layer have a name too: ``layer3.0.sum``, what a
block gives before its ReLU, and ``embedding``, the means (B, 64) that are classified.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions around a shortcut: (B, in, h, w) → (B, planes, h/stride, w/stride)."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.changes_shape = stride != 1 or in_planes != planes
        self.pad = planes // 4
        self.sum = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.changes_shape:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.sum(out + x))


class CifarResNet(nn.Module):
    """6n + 2 layers, three stages of n blocks 16, 32, 64 wide: (B, 3, 32, 32) → logits (B, C)."""

    input_spec: ClassVar[dict[str, Any]] = {
        "size": [32, 32],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "color": "RGB",
    }

    def __init__(self, n: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n, stride=1)
        self.layer2 = _stage(16, 32, n, stride=2)
        self.layer3 = _stage(32, 64, n, stride=2)
        self.embedding = nn.Identity()
        self.linear = nn.Linear(64, num_classes)
        draw(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classified(self.layer2(self.stem(x)))

    def stem(self, x: Tensor) -> Tensor:
        """Images → what the second stage is given, (B, 16, 32, 32)."""
        return self.layer1(F.relu(self.bn1(self.conv1(x))))

    def classified(self, x: Tensor) -> Tensor:
        """What the second stage gives, (B, 32, 16, 16) → logits."""
        return self.linear(self.embedding(torch.mean(self.layer3(x), dim=(2, 3))))


def draw(network: nn.Module) -> None:
    """Fresh weights for its layers (He et al. 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


def _stage(in_planes: int, planes: int, n: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(n - 1)))


def resnet8(num_classes: int = 10) -> CifarResNet:
    """n = 1, 0.08 M parameters: the student for a machine without an accelerator."""
    return CifarResNet(1, num_classes)


def resnet20(num_classes: int = 10) -> CifarResNet:
    """n = 3, 0.27 M parameters."""
    return CifarResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """n = 5, 0.46 M parameters."""
    return CifarResNet(5, num_classes)


def resnet44(num_classes: int = 10) -> CifarResNet:
    """n = 7, 0.66 M parameters."""
    return CifarResNet(7, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """n = 9, 0.85 M parameters."""
    return CifarResNet(9, num_classes)
