"""Relational knowledge distillation: distances and angles between the samples of a batch.

Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv:1904.05068, §3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from softcache_train.objectives.checks import check_weights
from softcache_train.objectives.precision import exactly
from softcache_train.objectives.rows import rows, unit

CELLS = 1 << 22  # numbers that one intermediate result of the angles may have


def rkd(
    student_embedding: Tensor, teacher_embedding: Tensor, *, distance: float = 25.0, angle: float = 50.0
) -> Tensor:
    """distance · L_D + angle · L_A, a scalar, with Huber's loss h (δ = 1) and rows x of student and teacher.

    L_D = 1/B² · Σᵢⱼ h(d_s(i, j) − d_t(i, j)), where d(i, j) = ‖xᵢ − xⱼ‖ / μ, and μ is the mean of ‖xᵢ − xⱼ‖ over i ≠ j.
    L_A = 1/B³ · Σᵢⱼₖ h(cos_s(i, j, k) − cos_t(i, j, k)), of the angle at xᵢ: ⟨eⱼᵢ, eₖᵢ⟩ with eⱼᵢ = (xⱼ − xᵢ) / ‖xⱼ − xᵢ‖.

    ``student_embedding`` float (B, …) and ``teacher_embedding`` (B, …), any widths. The paper's sums go over different
    samples; the means here, for which the default weights were chosen (its authors' code; Tian et al. 2020,
    arXiv:1910.10699), have B² and B³ terms, of which the others are zero. Samples with the same features have distance and
    angle 0, so features that are all the same give a finite loss and no gradient. The angles take O(B³) work, and are made
    some vertices at a time, so that they take no O(B³) memory. The gradient has none itself.

    Raises :class:`MismatchError` for fewer than 3 rows, since 2 are always in the same relation, or rows of other samples,
    and :class:`SpecError` for weights that are negative or both 0.
    """
    check_weights("rkd", distance=distance, angle=angle)
    student, teacher = rows("rkd", student_embedding, teacher_embedding, least=3)
    with exactly(student):
        loss = student.new_zeros(())
        if distance:
            loss = loss + distance * F.smooth_l1_loss(_distances(student), _distances(teacher))
        if angle:
            loss = loss + angle * _Angles.apply(student, teacher)
        return loss


def _distances(x: Tensor) -> Tensor:
    """(B, B), in their mean over pairs of different samples."""
    # by differences: from products, those of close rows far from 0 would be noise
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = d.sum() / (len(x) * (len(x) - 1))
    return d / torch.where(mean > 0, mean, 1)


class _Angles(torch.autograd.Function):
    """Of (B, D) and (B, D'): the loss and, of as many vertices as there is room for at once, its gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        many, wide = len(student), max(*student.shape, teacher.shape[1])
        loss, slope = student.new_zeros(()), torch.zeros_like(student)
        for vertices in torch.arange(many, device=student.device).split(max(1, CELLS // (many * wide))):
            with torch.enable_grad():
                x = student.detach().requires_grad_()
                part = _angles_at(x, teacher, vertices)
            loss += part.detach() / many**3
            slope += torch.autograd.grad(part, x)[0] / many**3
        ctx.save_for_backward(slope)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return slope * ctx.saved_tensors[0], None


def _angles_at(student: Tensor, teacher: Tensor, vertices: Tensor) -> Tensor:
    cosines = []
    for x in (student, teacher):
        towards = unit(x[None] - x[vertices, None])  # (vertices, B, D)
        cosines.append(towards @ towards.transpose(1, 2))
    return F.smooth_l1_loss(*cosines, reduction="sum")
