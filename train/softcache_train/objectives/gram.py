"""Which channels of a map fire together, wherever they do.

Gatys, Ecker, Bethge 2016, "Image Style Transfer Using Convolutional Neural Networks", eqs. 3 and 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError
from softcache_train.objectives.checks import check_tensors
from softcache_train.objectives.precision import both, exactly


def gram(student_map: Tensor, teacher: Tensor) -> Tensor:
    """1/(B·C²) · Σ (G_s − G_t)², a scalar, with G = F Fᵀ / (H·W) of a sample's map F as (C, H·W).

    ``student_map`` float (B, C, H, W); ``teacher`` its map (B, C, H', W'), or the matrices G (B, C, C) of it. No sample is
    compared with another, so a batch of one will do. Raises :class:`MismatchError` for other shapes, as for other numbers
    of channels.
    """
    check_tensors(
        "gram", "maps (B, C, H, W), or the teacher's matrices (B, C, C)", student_map, teacher, (3, 4)
    )
    if student_map.ndim != 4:
        raise MismatchError(
            f"gram takes a map of the student's, (B, C, H, W), not {tuple(student_map.shape)}"
        )
    with exactly(student_map):
        student_map, teacher = both(student_map, teacher)
        theirs = products(teacher, teacher) if teacher.ndim == 4 else teacher
        return difference("gram", products(student_map, student_map), theirs)


def products(first: Tensor, second: Tensor) -> Tensor:
    """Of maps (B, C, H, W) and (B, C', H, W): the mean over places of products of their channels, (B, C, C')."""
    return torch.einsum("bchw,bdhw->bcd", first, second) / (first.shape[2] * first.shape[3])


def difference(who: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The mean square difference of matrices (B, C, C'). Raises :class:`MismatchError`, in the name of the loss ``who``."""
    if student.shape != teacher.shape:
        raise MismatchError(
            f"{who} compares matrices of channels of one shape (B, C, C'), and the student's are "
            f"{tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: choose layers with as many channels"
        )
    return F.mse_loss(student, teacher)
