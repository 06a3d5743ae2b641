"""Two small networks for the 8 × 8 handwritten digits of ``softcache-train demo``.

They take RGB like every network here, and average it: the digits are grey. Both are fed alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

INPUT_SPEC: dict[str, Any] = {"size": [8, 8], "mean": [0.306] * 3, "std": [0.376] * 3, "color": "RGB"}


class Grey(nn.Module):
    """The mean of the channels: (B, 3, h, w) → (B, 1, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class Digits(nn.Sequential):
    """Layers behind :class:`Grey`: (B, 3, 8, 8) → logits (B, C)."""

    input_spec = INPUT_SPEC

    def __init__(self, *layers: nn.Module):
        super().__init__(Grey(), *layers)


def digits_cnn(num_classes: int = 10) -> Digits:
    """Two convolutions and a hidden layer with dropout, 0.15 M parameters: the demo's teacher."""
    return Digits(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.4)),
        *(nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Dropout(0.4)),
        nn.Linear(128, num_classes),
    )


def digits_mlp(num_classes: int = 10) -> Digits:
    """Two hidden layers of 128, 0.03 M parameters: the demo's student."""
    return Digits(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.ReLU()),
        nn.Linear(128, num_classes),
    )
