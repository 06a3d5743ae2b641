"""Features matched by squares, everywhere or under a mask.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3. With a mask it weighs cells as the focal term of Yang et al.
2022, "Focal and Global Knowledge Distillation for Detectors" (FGD), and the target-aware features of Chang et al. 2023,
"DETRDistill", do; or leaves those alone that were cut out.
"""

from __future__ import annotations

from torch import Tensor, nn

from softcache_train.objectives.adapter import Adapter, Shape
from softcache_train.objectives.checks import check_choice, check_features
from softcache_train.objectives.mask import check_quantile, on_cells
from softcache_train.objectives.precision import both, exactly

OVER = ("cells", "mask", "rows")


def hint(
    student_map: Tensor,
    teacher_map: Tensor,
    *,
    mask: Tensor | None = None,
    over: str = "cells",
    quantile: float | None = None,
) -> Tensor:
    """1/B · Σᵢ 1/Nᵢ · Σ_chw Mᵢ[h, w] (F_s − F_t)², a scalar; M = 1 without a mask.

    ``over`` says what N is: ``cells`` C·H·W, so that without a mask this is the mean squared error (RepDistiller's,
    weight 100); ``mask`` C · Σ_hw M, the mean over what the mask covers, however little that is (an image whose mask is
    empty adds nothing); ``rows`` 1, as in FGD, and twice FitNets' eq. 3. The mask is a factor of the squares: so it is
    FGD's M S_t, whose root is taken there, and of DETRDistill's M ⊙ F it is M².

    ``student_map`` and ``teacher_map`` float (B, C, H, W), or (B, D) vectors; ``mask`` (B, h, w) or (B, 1, h, w), at
    least 0, averaged over areas where it is finer than the maps; or attributions, of which ``quantile`` makes a mask (see
    :func:`~softcache_train.objectives.mask.on_cells`). At least float32 is computed in. Raises :class:`MismatchError` when
    shapes differ, or the mask has values below 0, and :class:`SpecError` for other options.
    """
    check_choice("hint", "over", over, OVER)
    check_quantile("hint", quantile)
    check_features("hint", student_map, teacher_map)
    with exactly(student_map):
        student, teacher = both(student_map, teacher_map)
        squares = (student - teacher).square().mean(dim=1)
        if mask is None:
            return squares.mean() if over != "rows" else squares.sum() * student.shape[1] / len(student)
        weights = on_cells("hint", mask, student, quantile)
        found = (weights * squares).sum(dim=(1, 2))
        if over == "rows":
            return found.mean() * student.shape[1]
        if over == "cells":
            return found.mean() / squares[0].numel()
        covered = weights.sum(dim=(1, 2))
        return (found / covered.where(covered > 0, 1)).mean()


class Hint(nn.Module):
    """:func:`hint` behind a regressor of the student's features (FitNets, section 2.1): an
    :class:`~softcache_train.objectives.adapter.Adapter`.

    Args:
        student_shape, teacher_shape: of one row, (C, h, w) or (D,).
        adapter: ``1x1``, ``3x3``, ``auto`` (``1x1`` where the channels differ) or ``none``.
        batch_norm: behind the convolution.
        over, quantile: see :func:`hint`.
    """

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        adapter: str = "1x1",
        batch_norm: bool = False,
        over: str = "cells",
        quantile: float | None = None,
    ):
        super().__init__()
        check_choice("hint", "over", over, OVER)
        check_quantile("hint", quantile)
        self.adapter = Adapter(student_shape, teacher_shape, kind=adapter, batch_norm=batch_norm)
        self.over, self.quantile = over, quantile

    def forward(self, student_map: Tensor, teacher_map: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return hint(self.adapter(student_map), teacher_map, mask=mask, over=self.over, quantile=self.quantile)
