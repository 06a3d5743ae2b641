"""Logits matched by squares.

Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?", eq. 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softcache_train.objectives.logits import Target, whole
from softcache_train.objectives.precision import both, exactly


def logits_mse(student_logits: Tensor, target: Target) -> Tensor:
    """1/(B·C) · Σ ((z_s − z̄_s) − (z_t − z̄_t))², a scalar, with z̄ the mean of a row.

    Both are centred, because softmax is blind to a shift that is common to a row; so is a cache that keeps logits up to
    one. Twice what ``kd`` comes to as T → ∞ (Hinton et al. 2015, section 2.1).

    ``student_logits`` float (B, C); ``target`` as for :func:`~softcache_train.objectives.kd`, with every logit. At least
    float32 is computed in. Raises :class:`MismatchError` when the shapes differ, or logits were left out of the cache.
    """
    teacher_logits = whole(target, student_logits, "logits_mse")
    with exactly(student_logits):
        student, teacher = (z - z.mean(dim=1, keepdim=True) for z in both(student_logits, teacher_logits))
        return F.mse_loss(student, teacher)
