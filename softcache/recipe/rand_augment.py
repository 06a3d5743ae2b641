"""``rand_augment``: a few ops drawn from fourteen, all of one magnitude (Cubuk et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Size
from softcache.recipe.opcodes import DEGREE, FACTOR, Op, fraction
from softcache.recipe.options import whole
from softcache.recipe.pixelop import PixelOp

_LARGEST = 30

# Each op's argument of (sign, share), share = magnitude / 30, with torchvision's ranges; None where it takes none.
_SPACE: tuple[tuple[Op, Callable[[int, float], int] | None], ...] = (
    (Op.NOTHING, None),
    (Op.SHEAR_X, lambda sign, share: sign * fraction(0.3 * share, 1)),
    (Op.SHEAR_Y, lambda sign, share: sign * fraction(0.3 * share, 1)),
    (Op.TRANSLATE_X, lambda sign, share: sign * fraction(150 * share, 331)),
    (Op.TRANSLATE_Y, lambda sign, share: sign * fraction(150 * share, 331)),
    (Op.ROTATE, lambda sign, share: sign * round(30 * share * DEGREE)),
    (Op.BRIGHTNESS, lambda sign, share: round((1 + sign * 0.9 * share) * FACTOR)),
    (Op.SATURATION, lambda sign, share: round((1 + sign * 0.9 * share) * FACTOR)),
    (Op.CONTRAST, lambda sign, share: round((1 + sign * 0.9 * share) * FACTOR)),
    (Op.SHARPNESS, lambda sign, share: round((1 + sign * 0.9 * share) * FACTOR)),
    (Op.POSTERIZE, lambda sign, share: 8 - round(4 * share)),
    (Op.SOLARIZE, lambda sign, share: math.ceil(255 - 255 * share)),
    (Op.AUTOCONTRAST, None),
    (Op.EQUALIZE, None),
)


@dataclass(frozen=True)
class RandAugment(PixelOp):
    """``n`` times one of torchvision's fourteen ops, at ``magnitude`` of 0 … 30, with either sign."""

    n: int = 2
    magnitude: int = 9
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        whole("rand_augment", "n", self.n, 1)
        if whole("rand_augment", "magnitude", self.magnitude, 0) > _LARGEST:
            raise SpecError(f"rand_augment: magnitude is at most {_LARGEST}, not {self.magnitude}")

    def words(self) -> str:
        return f"RandAugment: {self.n:,} ops drawn from fourteen change it, at magnitude {self.magnitude} of {_LARGEST}."

    @property
    def parameters(self) -> int:
        return 2 * self.n

    def draw(self, size: Size, draws: Draws) -> tuple[int, ...]:
        return tuple(number for _ in range(self.n) for number in self._step(draws))

    def _step(self, draws: Draws) -> tuple[int, int]:
        op, argument = _SPACE[draws.integer(len(_SPACE))]
        sign = 1 - 2 * draws.integer(2)
        return op, 0 if argument is None else argument(sign, self.magnitude / _LARGEST)
