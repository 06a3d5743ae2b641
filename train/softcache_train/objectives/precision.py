"""In what the losses compute: at least float32, under autocast too, and no gradient into the teacher."""

from __future__ import annotations

import torch
from torch import Tensor


def promoted(student: Tensor) -> Tensor:
    """The student's tensor as float32, or as float64 where it is."""
    return student.to(torch.promote_types(student.dtype, torch.float32))


def both(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in what :func:`promoted` gives, the teacher's detached."""
    student = promoted(student)
    return student, teacher.detach().to(student.dtype)


def exactly(tensor: Tensor) -> torch.autocast:
    """Autocast off, where ``tensor`` is."""
    return torch.autocast(tensor.device.type, enabled=False)
