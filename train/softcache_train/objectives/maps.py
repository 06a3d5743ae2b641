"""What the losses on two maps share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, C, H, W) and (B, C', H', W'), each averaged over areas to the smaller height and width of both."""
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)
