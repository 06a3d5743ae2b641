"""Where in the image each channel looks.

Shu et al. 2021, "Channel-wise Knowledge Distillation for Dense Prediction" (CWD), arXiv:2011.13256, eq. 5 and 6.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import MismatchError
from softcache_train.objectives.adapter import Adapter, Shape
from softcache_train.objectives.checks import check_features, check_temperature
from softcache_train.objectives.precision import both, exactly


def channelwise(student_map: Tensor, teacher_map: Tensor, *, T: float = 1.0) -> Tensor:  # noqa: N803
    """T²/(B·C) · Σᵢ Σ_c KL(φ_t ‖ φ_s), a scalar, with φ = softmax over the places of a channel of F/T.

    A channel may be shifted by any number, in the student or the teacher. As T → ∞ it comes to half of the variance of
    F_s − F_t over the places, averaged over rows and channels.

    ``student_map`` and ``teacher_map`` float (B, C, H, W) with more than one place. ``T`` 1 is the default of the common
    implementations. At least float32 is computed in. Raises :class:`MismatchError` when shapes differ, and
    :class:`SpecError` unless T is finite and above 0.
    """
    check_temperature(T)
    check_features("channelwise", student_map, teacher_map, vectors=False)
    if student_map[0, 0].numel() < 2:
        raise MismatchError(
            f"channelwise compares the places of a map, and {tuple(student_map.shape)} has one: name an earlier layer"
        )
    with exactly(student_map):
        ours, theirs = (F.log_softmax(x.flatten(2) / T, dim=2) for x in both(student_map, teacher_map))
        return T**2 * (theirs.exp() * (theirs - ours)).sum(dim=2).mean()


class Channelwise(nn.Module):
    """:func:`channelwise` behind an :class:`~softcache_train.objectives.adapter.Adapter`, which learns only where the
    channels differ (``auto``), or as ``adapter`` says. Shapes are of one row."""

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        T: float = 1.0,  # noqa: N803
        adapter: str = "auto",
        batch_norm: bool = False,
    ):
        super().__init__()
        check_temperature(T)
        self.T = T
        self.adapter = Adapter(student_shape, teacher_shape, kind=adapter, batch_norm=batch_norm)

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        return channelwise(self.adapter(student_map), teacher_map, T=self.T)
