"""Cross-head distillation: the student's features, seen through the teacher's own last layer.

Wang et al. 2024, "CrossKD: Cross-Head Knowledge Distillation for Object Detection", arXiv:2306.11369, §3. Of classifiers
the head is the last layer, as in Yang et al. 2021, "Knowledge Distillation via Softmax Regression Representation Learning".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import MismatchError
from softcache_train.objectives.adapter import Adapter, Shape
from softcache_train.objectives.checks import check_temperature
from softcache_train.objectives.kd import kd
from softcache_train.objectives.logits import Target
from softcache_train.objectives.precision import exactly


class CrossHead(nn.Module):
    """T²/B · Σᵢ KL(softmax(z_t/T) ‖ softmax(ẑ/T)), a scalar, with ẑ = W·a(f_s) + b: the student's features f_s, behind an
    :class:`~softcache_train.objectives.adapter.Adapter` a, go through the teacher's last layer, which stays as it is.

    The gradient flows into f_s and a. So the student's own last layer learns from its labels alone, and never has to agree
    with two teachers. W and b are no weights of anything here: they move with the module, are not optimised and not
    kept.

    ``forward``: ``student_features`` float (B, D) or maps (B, C', h, w), of which the adapter takes the mean over places;
    ``target`` as for :func:`~softcache_train.objectives.kd`. At least float32 is computed in. Raises :class:`MismatchError`
    for other shapes, and :class:`SpecError` unless T is finite and above 0.

    Args:
        student_shape: of one row, (D,) or (C', h, w). teacher_shape: (d,), of what goes into the teacher's last layer.
        head: W float32 (C, d) and b float32 (C,).
        adapter: ``auto`` (a linear map where the widths differ), ``1x1``, ``3x3`` or ``none``.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        head: tuple[Tensor, Tensor],
        T: float = 4.0,  # noqa: N803 - the field's name
        adapter: str = "auto",
    ):
        super().__init__()
        check_temperature(T)
        weight, bias = head
        if tuple(weight.shape[1:]) != tuple(teacher_shape) or bias.shape != weight.shape[:1]:
            raise MismatchError(
                f"cross_head: a last layer of {tuple(weight.shape)} and {tuple(bias.shape)} takes no {tuple(teacher_shape)}"
            )
        self.adapter, self.T = Adapter(student_shape, teacher_shape, kind=adapter), T
        for name, part in (("weight", weight), ("bias", bias)):
            self.register_buffer(name, part.detach(), persistent=False)

    def forward(self, student_features: Tensor, target: Target) -> Tensor:
        with exactly(student_features):
            features = self.adapter(student_features)
            crossed = F.linear(features, self.weight.to(features.dtype), self.bias.to(features.dtype))
            return kd(crossed, target, self.T)
