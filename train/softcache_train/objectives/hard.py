"""The teacher's decision as a label.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention" (DeiT), eq. 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError
from softcache_train.objectives.logits import Target, scaled, understood
from softcache_train.objectives.precision import exactly, promoted
from softcache_train.targets import Anchored, Dense, Mixed, OfLogits, Sampled, Sparse


def hard(student_logits: Tensor, target: Target) -> Tensor:
    """−1/B · Σᵢ log softmax(z_s,i)[argmax z_t,i], a scalar.

    DeiT takes half of it, of the head behind the distillation token, and half of the labels' cross entropy, of the head
    behind the class token.

    ``student_logits`` float (B, C); ``target`` as for :func:`~softcache_train.objectives.kd`: whole logits (the lower class
    where two are equal), what ``topk``, ``packed`` or ``anchored`` kept, or ``argmax``. At least float32 is
    computed in. Raises :class:`MismatchError` when the shapes differ, or of what ``sample`` drew, which may miss the class.
    """
    known = understood(target, student_logits, "hard")
    with exactly(student_logits):
        return F.cross_entropy(promoted(student_logits), _decision(known))


def _decision(target: OfLogits) -> Tensor:
    if isinstance(target, Dense):
        return target.values.argmax(dim=1)
    if isinstance(target, Anchored | Mixed):
        return scaled(target, 1, torch.float64).argmax(dim=1)
    if isinstance(target, Sparse):
        return target.index[:, 0]
    if isinstance(target, Sampled):
        raise MismatchError(
            "hard learns from the teacher's class, and sample kept draws: cache it with argmax, or the logits with full(u8)"
        )
    return target.values
