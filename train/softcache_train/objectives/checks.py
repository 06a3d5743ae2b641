"""What every loss asks of its options and of its tensors, in one line each."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor

from softcache.errors import MismatchError, SpecError, nearest


def check_temperature(T: float) -> None:  # noqa: N803
    """Raises :class:`SpecError` unless ``T`` is finite and above 0."""
    if not _is_number(T) or not 0 < T < math.inf:
        raise SpecError(f"the temperature T must be finite and above 0, not {T}")


def check_weights(who: str, **weights: float) -> None:
    """Raises :class:`SpecError` for a weight that is negative or not finite, and where all are 0."""
    for name, value in weights.items():
        if not _is_number(value) or not 0 <= value < math.inf:
            raise SpecError(f"{who}: the weight {name} must be finite and at least 0, not {value}")
    if not any(weights.values()):
        raise SpecError(
            f"{who}: {' and '.join(weights)} are all 0, which leaves nothing to learn: give one a weight"
        )


def check_least(who: str, least: float, *, above: bool = False, **numbers: float) -> None:
    """Raises :class:`SpecError` for a number below ``least`` (or at it, where they must be ``above``), or not finite."""
    for name, value in numbers.items():
        if not _is_number(value) or not (least < value if above else least <= value) or value == math.inf:
            raise SpecError(
                f"{who}: {name} must be finite and {'above' if above else 'at least'} {least:g}, not {value}"
            )


def check_choice(who: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises :class:`SpecError` for a word that is not ``known``."""
    if value not in known:
        raise SpecError(f"{who}: {name}={value!r}{nearest(value, known)}")


def check_tensors(who: str, what: str, student: Tensor, teacher: Tensor, ndim: tuple[int, ...]) -> None:
    """Raises :class:`MismatchError` unless both are floating tensors of an allowed number of axes, and equally many rows."""
    for whose, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            told = f"{tensor.dtype} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise MismatchError(f"{who} learns from {what}, and the {whose}'s is a {told}")
    if student.ndim not in ndim or teacher.ndim not in ndim or len(student) != len(teacher):
        raise MismatchError(f"{who} takes {what}, not {_told(student, teacher)}")


def check_alike(
    who: str, what: str, student: Tensor, teacher: Tensor, ndim: tuple[int, ...], hint: str = ""
) -> None:
    """As :func:`check_tensors`, and of one shape."""
    check_tensors(who, what, student, teacher, ndim)
    if student.shape != teacher.shape:
        raise MismatchError(f"{who} takes {what} of one shape, not {_told(student, teacher)}{hint}")


def check_features(who: str, student: Tensor, teacher: Tensor, *, vectors: bool = True) -> None:
    """As :func:`check_alike`, of maps (B, C, H, W), or ``vectors`` (B, D), that an adapter may have made alike."""
    what = "maps (B, C, H, W)" + " or vectors (B, D)" * vectors
    check_alike(who, what, student, teacher, (2, 4) if vectors else (4,), ": an adapter joins them")


def check_made_for(who: str, whose: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises :class:`MismatchError` unless the rows of ``tensor`` have as many axes as ``shape``, and as many channels."""
    if tensor.ndim != len(shape) + 1 or tensor.shape[1] != shape[0]:
        raise MismatchError(
            f"{who} was made for the {whose}'s {shape}, and is given {tuple(tensor.shape[1:])}"
        )


def check_labels(who: str, student_logits: Tensor, labels: Tensor) -> None:
    """Raises :class:`MismatchError` unless there is one label a row."""
    if labels.shape != student_logits.shape[:1]:
        raise MismatchError(
            f"{who} takes logits (B, C) and labels (B,), not {tuple(student_logits.shape)} and {tuple(labels.shape)}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _told(student: Tensor, teacher: Tensor) -> str:
    return f"the student's {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"
