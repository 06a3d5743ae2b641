"""Attention transfer where it matters to the teacher's answer.

Of a map of attributions such as :func:`softcache.teachers.attribution.integrated_gradients` makes of a layer (Sundararajan
et al. 2017, "Axiomatic Attribution for Deep Networks"). No results are published for this loss.
"""

from __future__ import annotations

from torch import Tensor

from softcache.errors import SpecError
from softcache_train.objectives.attention import of_both
from softcache_train.objectives.mask import check_quantile, on_cells
from softcache_train.objectives.precision import exactly


def masked_attention(
    student_map: Tensor,
    teacher_map: Tensor,
    *,
    mask: Tensor | None = None,
    p: float = 2.0,
    quantile: float | None = None,
) -> Tensor:
    """1/B · Σᵢ ‖Mᵢ ⊙ (Q_s − Q_t)‖², a scalar, with Q as of :func:`~softcache_train.objectives.attention`; with M = 1 it is
    H·W times that.

    M is ``mask``, at least 0; or, with ``quantile`` q, ``mask`` is the attributions and M is 1 where they are at least their
    q-quantile in the image, 0 elsewhere: with 0.5 half of the cells count, those that speak for the label most.

    ``student_map`` float (B, C, h, w); ``teacher_map`` float, features (B, C', H, W), or attention (B, H, W); ``mask``
    (B, h, w) or (B, 1, h, w), averaged over areas where it is finer than the teacher's map. At least float32 is
    computed in. Raises :class:`MismatchError` when shapes differ, or the mask has values below 0, and
    :class:`SpecError` without a mask or for other options.
    """
    if mask is None:
        raise SpecError(
            "masked_attention needs a mask: name the target that holds it, such as mask: layer3.attribution, quantile: 0.5"
        )
    check_quantile("masked_attention", quantile)
    with exactly(student_map):
        ours, theirs = of_both("masked_attention", student_map, teacher_map, p)
        weights = on_cells("masked_attention", mask, ours, quantile)
        return (weights * (ours - theirs)).square().sum(dim=(1, 2)).mean()
