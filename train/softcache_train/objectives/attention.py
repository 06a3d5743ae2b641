"""Attention transfer.

Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", section 3.1, eq. 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError
from softcache_train.objectives.checks import check_least, check_tensors
from softcache_train.objectives.precision import both, exactly
from softcache_train.objectives.resample import resample


def attention(student_map: Tensor, teacher_map: Tensor, *, p: float = 2.0) -> Tensor:
    """mean (Q_s − Q_t)² over rows and places, a scalar, with Q = A / ‖A‖₂ and A = mean_c |F|^p (the paper's sum over the
    channels is the same after the norm; its code takes this mean, with weight β = 1000).

    The teacher's attention is made of its features, or was when the cache was built (``strength(p)``), which is a hundred
    times smaller: the loss is the same. Where the maps are of different sizes it is the student's A that is averaged over
    areas to the teacher's size, or interpolated, after the power: mean(F)² is not mean(F²). The teacher's stays as cached.

    ``student_map`` float (B, C, h, w); ``teacher_map`` float, features (B, C', H, W), or attention (B, H, W) of the same
    ``p``, of any scale. At least float32 is computed in. Raises :class:`MismatchError` when shapes differ, and
    :class:`SpecError` for ``p`` below 1, whose slope has no bound.
    """
    with exactly(student_map):
        ours, theirs = of_both("attention", student_map, teacher_map, p)
        return (ours - theirs).square().mean()


def of_both(who: str, student_map: Tensor, teacher_map: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Q of the student and of the teacher, (B, H, W) each, at the teacher's size."""
    check_least(who, 1, p=p)
    check_tensors(
        who, "maps (B, C, H, W), or the teacher's attention (B, H, W)", student_map, teacher_map, (3, 4)
    )
    if student_map.ndim != 4:
        raise MismatchError(
            f"{who} takes the student's features (B, C, H, W), not {tuple(student_map.shape)}"
        )
    student, teacher = both(student_map, teacher_map)
    theirs = teacher if teacher.ndim == 3 else strength(teacher, p)
    size = theirs.shape[1:]
    if size.numel() < 2:
        raise MismatchError(
            f"{who} compares the places of a map, and the teacher's has one: name an earlier layer"
        )
    ours = resample(strength(student, p)[:, None], size)[:, 0]
    return unit(ours), unit(theirs)


def strength(features: Tensor, p: float) -> Tensor:
    """mean_c |F|^p, (B, H, W), of (B, C, H, W)."""
    return features.abs().pow(p).mean(dim=1)


def unit(maps: Tensor) -> Tensor:
    """Each row over its L2 norm; a row of zeros stays one."""
    return F.normalize(maps.flatten(1), dim=1).view_as(maps)
