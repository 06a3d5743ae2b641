"""Knowledge distillation on logits.

Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError, SpecError
from softcache_train.targets import Dense


def kd(student_logits: Tensor, target: Dense | Tensor, T: float = 4.0) -> Tensor:  # noqa: N803
    """T²/B · Σᵢ KL(softmax(z_t/T) ‖ softmax(z_s/T)), a scalar (§2).

    The factor T² keeps the size of the gradients, which scale as 1/T² (§2.1).

    ``student_logits`` float (B, C); ``target`` the teacher's logits (B, C), as ``batch["logits"]``
    or as a tensor. At least float32 is computed in. Raises :class:`MismatchError` when the shapes
    differ and :class:`SpecError` unless T > 0.
    """
    teacher_logits = target if isinstance(target, Tensor) else target.values
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise MismatchError(
            f"kd takes student and teacher logits of one shape (B, C), not "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not T > 0:
        raise SpecError(f"the temperature T must be above 0, not {T}")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(dtype) / T, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().to(dtype) / T, dim=1)
    return T**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
