"""The student's map at the size of the teacher's, which is the one that was cached."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) → (B, C, *size), size (H, W).

    Means over areas where it is at least as large in both, bilinear where it is not.
    """
    (h, w), (height, width) = maps.shape[2:], size
    if (h, w) == (height, width):
        return maps
    if h >= height and w >= width:
        return F.adaptive_avg_pool2d(maps, (height, width))
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
