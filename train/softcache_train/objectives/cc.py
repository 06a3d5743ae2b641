"""Correlation congruence: a kernel between the samples of a batch.

Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", arXiv:1904.01802, §3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import SpecError
from softcache_train.objectives.checks import check_least
from softcache_train.objectives.precision import exactly
from softcache_train.objectives.rows import rows, unit


def cc(student_embedding: Tensor, teacher_embedding: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """1/B² · Σᵢⱼ (K(sᵢ, sⱼ) − K(tᵢ, tⱼ))², a scalar, with the Gaussian kernel exp(−γ‖x − y‖²) of unit vectors, expanded:
    K(x, y) = e^(−2γ) Σ_{p ≤ order} (2γ)^p / p! · ⟨x, y⟩^p.

    ``student_embedding`` float (B, …) and ``teacher_embedding`` (B, …), any widths. The paper weighs it with 100 or
    so. Features of length 0 stay 0.

    Raises :class:`MismatchError` for a batch of one, where K is the same whatever the features, or rows of other samples,
    and :class:`SpecError` unless ``gamma`` is finite and above 0 and ``order`` a whole number from 1 on.
    """
    check_least("cc", 0, above=True, gamma=gamma)
    check_least("cc", 1, order=order)
    if order != int(order):
        raise SpecError(f"cc: order counts terms of a series, and is a whole number, not {order}")
    student, teacher = rows("cc", student_embedding, teacher_embedding, least=2)
    with exactly(student):
        return F.mse_loss(_kernel(student, gamma, order), _kernel(teacher, gamma, order))


def _kernel(x: Tensor, gamma: float, order: int) -> Tensor:
    cosines = unit(x) @ unit(x).T
    kernel = torch.ones_like(cosines)
    for p in range(1, int(order) + 1):
        kernel = kernel + (2 * gamma) ** p / math.factorial(p) * cosines**p
    return math.exp(-2 * gamma) * kernel
