"""CIFAR ResNets that can answer after each stage (Zhang et al. 2019, "Be Your Own Teacher", arXiv:1905.08094, §3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softcache.errors import SpecError
from softcache_train.students.cifar_resnet import CifarResNet, draw


class Exit(nn.Module):
    """A stage's map (B, C', h, w) → logits (B, C): convolutions with stride 2 bring it to the deepest stage's shape, and
    ``embedding`` is the means (B, 64) that are classified."""

    def __init__(self, planes: int, halvings: int, num_classes: int):
        super().__init__()
        widths = [planes * 2**i for i in range(halvings + 1)]
        self.align = nn.Sequential(*(_halving(width) for width in widths[:-1]))
        self.embedding = nn.Identity()
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embedding(torch.mean(self.align(x), dim=(2, 3))))


class EarlyExits(CifarResNet):
    """A CIFAR ResNet, its layers under their own names, with ``exit1`` behind ``layer1`` and ``exit2`` behind ``layer2``:
    (B, 3, 32, 32) → the deepest logits (B, C).

    Every exit runs, whoever listens: their logits are what ``exit1``, ``exit2`` and ``linear`` give, and the features
    behind those, (B, 64) each, what ``exit1.embedding``, ``exit2.embedding`` and ``embedding`` give.
    """

    def __init__(self, n: int, num_classes: int):
        super().__init__(n, num_classes)
        self.exit1, self.exit2 = Exit(16, 2, num_classes), Exit(32, 1, num_classes)
        draw(self.exit1)
        draw(self.exit2)

    def forward(self, x: Tensor) -> Tensor:
        return self.every_exit(x)[-1]

    def every_exit(self, x: Tensor) -> tuple[Tensor, ...]:
        """The logits of exits 1, 2 and 3, the deepest."""
        x = self.stem(x)
        first = self.exit1(x)
        x = self.layer2(x)
        return first, self.exit2(x), self.classified(x)

    def at_exit(self, x: Tensor, number: int) -> Tensor:
        """The logits of exit 1, 2 or 3, the deepest; nothing runs that these do not need. Raises :class:`SpecError` for
        another number."""
        if number not in (1, 2, 3):
            raise SpecError(f"this student has the exits 1, 2 and 3, and none of number {number}")
        x = self.stem(x)
        if number == 1:
            return self.exit1(x)
        x = self.layer2(x)
        return self.exit2(x) if number == 2 else self.classified(x)


def _halving(planes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(planes, 2 * planes, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * planes),
        nn.ReLU(),
    )


def resnet8_exits(num_classes: int = 10) -> EarlyExits:
    """ResNet-8 with two early exits, 0.12 M parameters."""
    return EarlyExits(1, num_classes)


def resnet20_exits(num_classes: int = 10) -> EarlyExits:
    """ResNet-20 with two early exits, 0.31 M parameters."""
    return EarlyExits(3, num_classes)
