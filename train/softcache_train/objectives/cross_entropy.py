"""Cross entropy with hard labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """−1/B · Σᵢ log softmax(zᵢ)[yᵢ], a scalar.

    ``student_logits`` float (B, C); ``labels`` int64 (B,), −1 where the label is unknown. Such a
    row adds nothing and still counts in B, so that the mean over ranks is the mean over the global
    batch. Raises :class:`MismatchError` when the shapes do not belong together.
    """
    if student_logits.ndim != 2 or labels.shape != student_logits.shape[:1]:
        raise MismatchError(
            f"cross_entropy takes logits (B, C) and labels (B,), not "
            f"{tuple(student_logits.shape)} and {tuple(labels.shape)}"
        )
    total = F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="sum")
    return total / len(labels)
