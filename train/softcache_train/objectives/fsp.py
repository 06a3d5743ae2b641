"""The flow of the solution procedure: how a network gets from one map to a later one.

Yim, Joo, Bae, Kim 2017, "A Gift from Knowledge Distillation", eqs. 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from softcache.errors import MismatchError
from softcache_train.objectives.gram import difference, products
from softcache_train.objectives.maps import alike
from softcache_train.objectives.precision import exactly, promoted


def fsp(student_maps: Sequence[Tensor], teacher: Sequence[Tensor] | Tensor) -> Tensor:
    """1/(B·C·C') · Σ (G_s − G_t)², a scalar, with G = F F'ᵀ / (H·W) of a sample's earlier map F as (C, H·W) and its later
    F' as (C', H·W).

    ``student_maps`` two maps, float (B, C, H, W) and (B, C', H', W'); ``teacher`` its two maps of as many channels, or the
    matrices G (B, C, C') of them. The larger of two maps is averaged to the size of the smaller, as in Tian et al. 2020
    (arXiv:1910.10699), whose weight is 50. No sample is compared with another. Raises :class:`MismatchError` for other
    shapes.
    """
    maps, theirs = ([x] if isinstance(x, Tensor) else list(x) for x in (student_maps, teacher))
    shapes = [tuple(x.shape) for x in maps], [tuple(x.shape) for x in theirs]
    ours, given = ([len(shape) for shape in one] for one in shapes)
    samples = {shape[:1] for shape in (*shapes[0], *shapes[1])}
    if ours != [4, 4] or given not in ([4, 4], [3]) or len(samples) > 1:
        raise MismatchError(
            "fsp takes two maps of the student's (B, C, H, W), and the teacher's two or their matrices (B, C, C'), of the "
            f"same samples, not {shapes[0]} and {shapes[1]}"
        )
    with exactly(maps[0]):
        student = products(*alike(*map(promoted, maps)))
        theirs = [x.detach().to(student.dtype) for x in theirs]
        return difference("fsp", student, products(*alike(*theirs)) if len(theirs) == 2 else theirs[0])
