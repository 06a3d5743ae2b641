"""Features matched up to the scale and the offset of each channel.

Cao et al. 2022, "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
arXiv:2207.02039, eq. 4.
"""

from __future__ import annotations

from torch import Tensor, nn

from softcache.errors import MismatchError
from softcache_train.objectives.adapter import Adapter, Shape
from softcache_train.objectives.checks import check_features
from softcache_train.objectives.correlation import standardised
from softcache_train.objectives.precision import both, exactly


def pearson(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """½ · mean (F̂_s − F̂_t)², a scalar, F̂ having mean 0 and variance 1 in each channel over the batch and all places:
    1 − ρ of Pearson, averaged over the channels.

    What is constant in a channel becomes 0. Both are values, not codes: what a codec scaled is decoded before it comes here.

    ``student_map`` and ``teacher_map`` float (B, C, H, W), or (B, D) vectors. At least float32 is computed in. Raises
    :class:`MismatchError` when shapes differ, or nothing varies because there is one value a channel.
    """
    check_features("pearson", student_map, teacher_map)
    if student_map[:, 0].numel() < 2:
        raise MismatchError(
            f"pearson compares what varies in a channel, and of {tuple(student_map.shape)} nothing does: raise global_batch"
        )
    with exactly(student_map):
        ours, theirs = (standardised(x.transpose(0, 1).flatten(1), 1) for x in both(student_map, teacher_map))
        return (ours - theirs).square().sum(dim=1).mean() / 2


class Pearson(nn.Module):
    """:func:`pearson` behind an :class:`~softcache_train.objectives.adapter.Adapter`, which learns only where the channels
    differ (``auto``), or as ``adapter`` says. Shapes are of one row."""

    def __init__(
        self, student_shape: Shape, teacher_shape: Shape, *, adapter: str = "auto", batch_norm: bool = False
    ):
        super().__init__()
        self.adapter = Adapter(student_shape, teacher_shape, kind=adapter, batch_norm=batch_norm)

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        return pearson(self.adapter(student_map), teacher_map)
