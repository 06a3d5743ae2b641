"""What the losses on a batch's rows share: their checks, and unit vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from softcache.errors import MismatchError
from softcache_train.objectives.checks import check_tensors
from softcache_train.objectives.precision import both


def rows(who: str, student: Tensor, teacher: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """A vector a sample, (B, D) and (B, D'), of what student and teacher say, (B, …), promoted and the teacher's detached.

    ``least`` is the number of rows from which on the loss ``who`` can tell two batches apart. Raises
    :class:`MismatchError` for fewer, and where the two are not of the same samples.
    """
    check_tensors(who, "vectors or maps, (B, …)", student, teacher, (2, 3, 4))
    if len(student) < least:
        raise MismatchError(
            f"{who} compares the samples of a batch with one another, which among {len(student)} says nothing: give every "
            f"rank at least {least} (global_batch)"
        )
    student, teacher = both(student, teacher)
    return student.flatten(1), teacher.flatten(1)


def width(who: str, whose: str, shape: Sequence[int]) -> int:
    """Of the vector that a row of ``shape`` is. Raises :class:`MismatchError` where it is several shapes."""
    if not all(isinstance(n, int) for n in shape):
        raise MismatchError(
            f"{who} compares one layer of each, and the {whose}'s are {shape}: give each a term"
        )
    return math.prod(shape)


def require_shapes(who: str, given: tuple[Tensor, Tensor], made: tuple[tuple[int, ...], ...]) -> None:
    """Raise :class:`MismatchError` unless student's and teacher's rows are of the shapes that ``who`` was made for."""
    found = tuple(tuple(x.shape[1:]) for x in given)
    if found != made:
        raise MismatchError(
            f"{who} was made for rows of {made[0]} from the student and {made[1]} from the teacher, not {found[0]} "
            f"and {found[1]}"
        )


def unit(vectors: Tensor) -> Tensor:
    """Vectors along the last axis → of length 1; of length 0 stay as they are, and their gradient is finite."""
    squares = vectors.square().sum(-1, keepdim=True)
    return vectors / torch.where(squares >= torch.finfo(squares.dtype).tiny, squares, 1).sqrt()
