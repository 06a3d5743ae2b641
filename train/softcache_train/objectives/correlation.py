"""Pearson's correlation, by unit vectors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def standardised(x: Tensor, dim: int) -> Tensor:
    """``x`` centred along ``dim`` and of length 1 there: the inner product of two is their correlation. What is constant
    becomes 0."""
    return F.normalize(x - x.mean(dim=dim, keepdim=True), dim=dim)
