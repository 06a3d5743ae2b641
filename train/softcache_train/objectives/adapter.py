"""What lies between a student's layer and a teacher's: channels made alike, then places."""

from __future__ import annotations

from torch import Tensor, nn

from softcache.errors import MismatchError
from softcache_train.objectives.checks import check_choice, check_made_for
from softcache_train.objectives.precision import exactly, promoted
from softcache_train.objectives.resample import resample

KINDS = ("auto", "none", "1x1", "3x3")
Shape = tuple[int, ...]


class Adapter(nn.Module):
    """The student's maps (B, C, h, w), or vectors (B, D), as the teacher's (B, C', H, W), or (B, D').

    A convolution to the teacher's channels, ``1x1`` (of a vector a linear map) or ``3x3``, with a bias, or with
    ``batch_norm`` behind it; ``none`` where the channels are alike; ``auto`` is ``none`` there and else ``1x1``. Then it is
    the student's map that is resampled, to the teacher's size (:func:`~softcache_train.objectives.resample.resample`): what
    was cached stays as it is. The vector of a map is its mean over the places.

    Shapes are of one row. Raises :class:`MismatchError` for shapes that no adapter joins, and :class:`SpecError` for
    another ``kind``.
    """

    def __init__(
        self, student_shape: Shape, teacher_shape: Shape, *, kind: str = "auto", batch_norm: bool = False
    ):
        super().__init__()
        check_choice("adapter", "adapter", kind, KINDS)
        student_shape, teacher_shape = tuple(student_shape), tuple(teacher_shape)
        check_joined(student_shape, teacher_shape)
        channels, wanted = student_shape[0], teacher_shape[0]
        if kind == "none" and channels != wanted:
            raise MismatchError(
                f"the student's {student_shape} and the teacher's {teacher_shape} differ in channels: take adapter: 1x1"
            )
        self.student_shape, self.size = student_shape, teacher_shape[1:]
        self.join = nn.Sequential()
        if kind in ("1x1", "3x3") or (kind == "auto" and channels != wanted):
            size = 3 if kind == "3x3" else 1
            self.join.append(nn.Conv2d(channels, wanted, size, padding=size // 2, bias=not batch_norm))
        if batch_norm:
            self.join.append(nn.BatchNorm2d(wanted))

    def forward(self, student: Tensor) -> Tensor:
        """At least float32, whatever autocast says. Raises :class:`MismatchError` for other channels."""
        check_made_for("this adapter", "student", student, self.student_shape)
        with exactly(student):
            joined = self.join(as_maps(promoted(student)))
            return resample(joined, self.size) if self.size else resample(joined, (1, 1)).flatten(1)


def check_joined(student_shape: Shape, teacher_shape: Shape) -> None:
    """Raises :class:`MismatchError` unless both are maps (C, h, w) or vectors (D,), and a map is learned from a map."""
    told = f"the student's {student_shape} and the teacher's {teacher_shape}"
    if len(student_shape) not in (1, 3) or len(teacher_shape) not in (1, 3):
        raise MismatchError(f"an adapter joins maps (C, h, w) and vectors (D,), not {told}")
    if len(teacher_shape) == 3 and len(student_shape) == 1:
        raise MismatchError(
            f"no map is made of a vector: {told}; name a layer of the student that gives maps"
        )


def as_maps(x: Tensor) -> Tensor:
    """(B, C, h, w), a vector being a map of one place."""
    return x if x.ndim == 4 else x[:, :, None, None]
