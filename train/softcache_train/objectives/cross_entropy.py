"""Cross entropy with hard labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError


def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor | None = None,
    lam: Tensor | None = None,
) -> Tensor:
    """−1/B · Σᵢ λᵢ log softmax(zᵢ)[yᵢ] + (1 − λᵢ) log softmax(zᵢ)[ỹᵢ], a scalar; λ = 1 by default.

    ``student_logits`` float (B, C); ``labels`` (y) and ``partner_labels`` (ỹ) int64 (B,), −1 where
    unknown; ``lam`` (λ) float (B,): see :class:`softcache_train.loader.Batch`. A row with an unknown
    label adds nothing and still counts in B, so that the mean over ranks is the mean over the global
    batch. At least float32 is computed in. Raises :class:`MismatchError` when the shapes do not belong
    together.

    Mixed labels: Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix".
    """
    if student_logits.ndim != 2 or labels.shape != student_logits.shape[:1]:
        raise MismatchError(
            f"cross_entropy takes logits (B, C) and labels (B,), not "
            f"{tuple(student_logits.shape)} and {tuple(labels.shape)}"
        )
    z = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    if partner_labels is None or lam is None:
        return F.cross_entropy(z, labels, ignore_index=-1, reduction="sum") / len(labels)
    if partner_labels.shape != labels.shape or lam.shape != labels.shape:
        raise MismatchError(
            f"cross_entropy takes partner_labels and lam (B,), not "
            f"{tuple(partner_labels.shape)} and {tuple(lam.shape)}, with labels {tuple(labels.shape)}"
        )
    own, partners = (
        F.cross_entropy(z, y, ignore_index=-1, reduction="none") for y in (labels, partner_labels)
    )
    known = (labels >= 0) & (partner_labels >= 0)
    return (known * (lam * own + (1 - lam) * partners)).sum() / len(labels)
