"""Mix: a view's pixels and those of another sample's view become one picture (mixup, cutmix).

Partner-addressed: a mix names the very view it was made with, so that anyone can make it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from softcache.recipe.view import View

ONE = 32767  # λ and the box are whole numbers of this many parts
HALF = ONE // 2


@dataclass(frozen=True, slots=True)
class Blend:
    """How much of a picture is its own, and where; free of resolution.

    ``lam`` / 32767 is λ, the share of the picture's own label: its weight in every pixel for mixup, and the share of
    the area outside the box for cutmix. The box is in 32767ths of the sides; without one (zeros) it is mixup.
    """

    lam: int
    x: int = 0
    y: int = 0
    width: int = 0
    height: int = 0

    FIELDS: ClassVar[int] = 5

    def pack(self) -> tuple[int, ...]:
        """The five fields in order, each within 0…32767."""
        return self.lam, self.x, self.y, self.width, self.height

    @classmethod
    def unpack(cls, row: Sequence[int]) -> Blend:
        """The blend of five stored numbers (a tuple, or an integer array of shape ``(5,)``)."""
        return cls(*map(int, row))

    @property
    def share(self) -> float:
        """λ, 0…1."""
        return self.lam / ONE

    def __call__(self, own: np.ndarray, other: np.ndarray) -> np.ndarray:
        """``own`` mixed with ``other``: two uint8 pictures ``(h, w, 3)`` of one size to a new one. Integer arithmetic.

        Mixup: ``(lam·own + (32767 − lam)·other + 16383) // 32767``. Cutmix: the box from ``other``, its edges rounded
        to whole pixels (halves up).
        """
        if not self.width:
            total = own.astype(np.int32) * self.lam + other.astype(np.int32) * (ONE - self.lam)
            return ((total + HALF) // ONE).astype(np.uint8)
        mixed, box = own.copy(), self.box(own.shape[:2])
        mixed[box] = other[box]
        return mixed

    def box(self, size: tuple[int, ...]) -> tuple[slice, slice]:
        """Rows and columns of the box in a picture of ``size``, (height, width)."""
        return _pixels(self.y, self.height, size[0]), _pixels(self.x, self.width, size[1])


def _pixels(start: int, length: int, side: int) -> slice:
    return slice(rounded(start * side, ONE), rounded((start + length) * side, ONE))


def rounded(numerator: int, denominator: int) -> int:
    """The nearest whole number, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


@dataclass(frozen=True, slots=True)
class Mix:
    """What a view is mixed with: view number ``number`` of the sample ``partner``, which is ``view``: with its
    mosaic, if it has one, and not mixed."""

    partner: int
    number: int
    view: View
    blend: Blend

    FIELDS: ClassVar[int] = 2

    def pack(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is stored: the partner and its view number, within int64; and the blend's five."""
        return (self.partner, self.number), self.blend.pack()


UNMIXED = (-1, -1), Blend(ONE).pack()  # stored where there is no mix


def impossible(
    samples: np.ndarray, partner: np.ndarray, mix: np.ndarray, count: int, views: int
) -> np.ndarray:
    """Which stored rows no recipe draws, bool ``(n,)``: of ``samples`` int64 ``(n,)``, out of ``count`` with ``views``.

    ``partner`` int64 ``(n, 2)`` and ``mix`` int16 ``(n, 5)`` are the rows, as :meth:`Mix.pack` gives them.
    """
    (who, number), (_, x, y, width, height) = partner.T, mix.astype(np.int32).T
    mixed = (who >= 0) & (who < count) & (who != samples) & (number >= 0) & (number < views)
    mixed &= (mix >= 0).all(axis=1) & (x + width <= ONE) & (y + height <= ONE) & ((width > 0) == (height > 0))
    unmixed = (partner == UNMIXED[0]).all(axis=1) & (mix == UNMIXED[1]).all(axis=1)
    return ~(mixed | unmixed)
