"""Relations between classes and within them.

Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (DIST), arXiv:2205.10536, eq. 8 to 10.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError
from softcache_train.objectives.checks import check_temperature, check_weights
from softcache_train.objectives.correlation import standardised
from softcache_train.objectives.logits import Target, scaled, understood, whole
from softcache_train.objectives.precision import exactly, promoted
from softcache_train.targets import Dense, Mixed


def dist(
    student_logits: Tensor,
    target: Target,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    T: float = 1.0,  # noqa: N803
) -> Tensor:
    """T² · (beta · meanᵢ (1 − ρ(Y_s[i, :], Y_t[i, :])) + gamma · meanⱼ (1 − ρ(Y_s[:, j], Y_t[:, j]))), a scalar.

    Y = softmax(z/T) of the batch, (B, C); ρ is Pearson's correlation: between the classes of a row, and within a class over
    the rows. Blind to how much larger the student's numbers are, and to what is added to them. Of what is constant ρ is 0.
    Defaults and T² are those of the authors' code.

    ``student_logits`` float (B, C) with B ≥ 2; ``target`` as for :func:`~softcache_train.objectives.kd`, with every logit.
    At least float32 is computed in. Raises :class:`MismatchError` when the shapes differ, the batch is of one row, or
    logits were left out of the cache, and :class:`SpecError` for other options.
    """
    check_weights("dist", beta=beta, gamma=gamma)
    check_temperature(T)
    if len(student_logits) < 2:
        raise MismatchError("dist compares the rows of a batch, and this batch has one: raise global_batch")
    known = understood(target, student_logits, "dist")
    if not isinstance(known, Mixed):
        known = Dense(whole(known, student_logits, "dist"))
    with exactly(student_logits):
        z = promoted(student_logits)
        student, teacher = F.softmax(z / T, dim=1), F.softmax(scaled(known, T, z.dtype), dim=1)
        inter, intra = (
            1 - (standardised(student, dim) * standardised(teacher, dim)).sum(dim=dim).mean()
            for dim in (1, 0)
        )
        return T**2 * (beta * inter + gamma * intra)
