"""Which neurons are on.

Heo et al. 2019, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", eq. 5 and 6.
"""

from __future__ import annotations

from torch import Tensor, nn

from softcache_train.objectives.adapter import Adapter, Shape
from softcache_train.objectives.checks import check_features, check_least
from softcache_train.objectives.precision import both, exactly


def activation_boundary(student_map: Tensor, teacher_map: Tensor, *, margin: float = 1.0) -> Tensor:
    """1/B · Σ (s + m)²·[s > −m, t ≤ 0] + (s − m)²·[s ≤ m, t > 0], a scalar, over all rows and neurons, m being ``margin``.

    Of the teacher only [t > 0] counts, so its features and their signs as ``sign`` keeps them (1 and −1) give the same
    bits. Both are of a layer *before* its ReLU. The authors weigh layers by 1, ½, ¼ from the last one back, and all by
    3/1000; they learn this first, and then from logits at T = 3.

    ``student_map`` and ``teacher_map`` float (B, C, H, W), or (B, D) vectors. At least float32 is computed in. Raises
    :class:`MismatchError` when shapes differ, and :class:`SpecError` for a margin that is not above 0.
    """
    check_least("activation_boundary", 0, above=True, margin=margin)
    check_features("activation_boundary", student_map, teacher_map)
    with exactly(student_map):
        student, teacher = both(student_map, teacher_map)
        off = (student + margin).clamp_min(0)
        on = (margin - student).clamp_min(0)
        return on.where(teacher > 0, off).square().sum() / len(student)


class ActivationBoundary(nn.Module):
    """:func:`activation_boundary` behind the authors' connector, a 1×1 convolution and batch norm: an
    :class:`~softcache_train.objectives.adapter.Adapter`. Shapes are of one row, of layers before their ReLU."""

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        margin: float = 1.0,
        adapter: str = "1x1",
        batch_norm: bool = True,
    ):
        super().__init__()
        check_least("activation_boundary", 0, above=True, margin=margin)
        self.margin = margin
        self.adapter = Adapter(student_shape, teacher_shape, kind=adapter, batch_norm=batch_norm)

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        return activation_boundary(self.adapter(student_map), teacher_map, margin=self.margin)
