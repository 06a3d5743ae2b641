"""Variational information distillation.

Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", eq. 5 and section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache_train.objectives.adapter import Shape, as_maps, check_joined
from softcache_train.objectives.checks import check_least, check_made_for, check_tensors
from softcache_train.objectives.precision import both, exactly
from softcache_train.objectives.resample import resample

EPS = 1e-5


def gaussian(mean: Tensor, teacher_map: Tensor, variance: Tensor) -> Tensor:
    """½ · mean ((μ − F_t)² / σ_c² + log σ_c²), a scalar: −log q(F_t | F_s) but for a constant.

    ``mean`` (μ) and ``teacher_map`` (B, C, H, W), ``variance`` (σ²) (C,).
    """
    spread = variance[:, None, None]
    return ((mean - teacher_map).square() / spread + spread.log()).mean() / 2


class Vid(nn.Module):
    """½ · mean ((μ(F_s) − F_t)² / σ_c² + log σ_c²), a scalar; μ and σ are learned.

    μ is three 1×1 convolutions without bias and ReLUs between them, as wide as the teacher; σ_c² = softplus(a_c)
    + 1e-5 of each channel of the teacher, ``variance`` at first. The student's map is resampled to the teacher's size before
    it. The rounding of a cached map is taken for a part of σ².

    ``forward``: ``student_map`` float (B, C, h, w) and ``teacher_map`` (B, C', H, W), or vectors. At least float32 is
    computed in. Raises :class:`MismatchError` for other shapes than it was made of, and :class:`SpecError` for a
    variance that is not above 1e-5.

    Args:
        student_shape, teacher_shape: of one row, (C, h, w) or (D,).
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, variance: float = 5.0):
        super().__init__()
        check_least("vid", EPS, above=True, variance=variance)
        self.student_shape, self.teacher_shape = tuple(student_shape), tuple(teacher_shape)
        check_joined(self.student_shape, self.teacher_shape)
        ours, theirs = self.student_shape[0], self.teacher_shape[0]
        self.mean = nn.Sequential(
            nn.Conv2d(ours, theirs, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(theirs, theirs, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(theirs, theirs, 1, bias=False),
        )
        self.scale = nn.Parameter(torch.full((theirs,), _before_softplus(variance - EPS)))

    @property
    def variance(self) -> Tensor:
        """σ², (C',)."""
        return F.softplus(self.scale) + EPS

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        check_tensors("vid", "maps (B, C, H, W) or vectors (B, D)", student_map, teacher_map, (2, 4))
        check_made_for("vid", "student", student_map, self.student_shape)
        check_made_for("vid", "teacher", teacher_map, self.teacher_shape)
        with exactly(student_map):
            student, teacher = map(as_maps, both(student_map, teacher_map))
            return gaussian(self.mean(resample(student, teacher.shape[2:])), teacher, self.variance)


def _before_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))
