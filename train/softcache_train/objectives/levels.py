"""Another attention at each level of the network, in the manner of HMAT.

Gou et al. 2023, "Hierarchical Multi-attention Transfer for Knowledge Distillation", ACM TOMM 20(2): attention by
position of low levels, by channel of high ones, by activation of middle and high ones. Its exact equations were not
found: those here are ours, so figures of the paper are not to be expected.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError
from softcache_train.objectives.attention import attention, unit
from softcache_train.objectives.checks import check_choice, check_tensors
from softcache_train.objectives.precision import both, exactly
from softcache_train.objectives.resample import resample

LEVELS = ("low", "middle", "high")


def levels(student_map: Tensor, teacher_map: Tensor, *, level: str) -> Tensor:
    """HMAT-style attention of one level, a scalar: ``low`` P, ``middle`` A, ``high`` A + K. A term of the loss for each
    level.

    P, by position: mean over pairs of places (cos(F_s,i, F_s,j) − cos(F_t,i, F_t,j))², how alike the places of an image are,
    whatever the number of channels. A, by activation: :func:`~softcache_train.objectives.attention`, p = 2. K, by channel:
    mean_c (k_s − k_t)² with k = mean_hw F² over its L2 norm, which asks for as many channels.

    ``student_map`` float (B, C, h, w), ``teacher_map`` float (B, C', H, W); the student's map is resampled to the
    teacher's size. At least float32 is computed in. Raises :class:`MismatchError` when shapes differ, and
    :class:`SpecError` for another ``level``.
    """
    check_choice("levels", "level", level, LEVELS)
    check_tensors("levels", "maps (B, C, H, W)", student_map, teacher_map, (4,))
    with exactly(student_map):
        if level == "low":
            return by_position(*both(student_map, teacher_map))
        found = attention(student_map, teacher_map)
        return found + by_channel(*both(student_map, teacher_map)) if level == "high" else found


def by_position(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (cos_s − cos_t)² over rows and pairs of places.

    With unit columns U and V, ‖UᵀU − VᵀV‖² = ‖UUᵀ‖² − 2‖UVᵀ‖² + ‖VVᵀ‖²: no matrix of places by places is ever made.
    """
    u, v = (F.normalize(x.flatten(2), dim=1) for x in (resample(student, teacher.shape[2:]), teacher))
    uu, uv, vv = (a @ b.transpose(1, 2) for a, b in ((u, u), (u, v), (v, v)))
    squares = uu.square().sum() - 2 * uv.square().sum() + vv.square().sum()
    return squares.clamp_min(0) / (len(u) * u.shape[2] ** 2)


def by_channel(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (k_s − k_t)² over rows and channels."""
    if student.shape[1] != teacher.shape[1]:
        raise MismatchError(
            f"levels: attention by channel asks for as many channels, not the student's {tuple(student.shape[1:])} and the "
            f"teacher's {tuple(teacher.shape[1:])}: take level: middle"
        )
    ours, theirs = (unit(x.square().mean(dim=(2, 3))) for x in (student, teacher))
    return (ours - theirs).square().mean()
