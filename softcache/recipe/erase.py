"""Ops that hide a part: ``erase`` (Zhong et al. 2020) and ``cutout`` (DeVries & Taylor 2017). Both leave grey, 128."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Size
from softcache.recipe.opcodes import Op, fraction
from softcache.recipe.options import height_width, interval, probability
from softcache.recipe.pixelop import PixelOp
from softcache.recipe.words import often, pixels, span


@dataclass(frozen=True)
class Erase(PixelOp):
    """With probability ``p`` a box, its share of the area in ``scale`` and height/width in ``ratio``.

    Ten attempts to place it inside, then none: torchvision's RandomErasing.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        probability("erase", self.p)
        interval("erase", "ratio", self.ratio)
        if interval("erase", "scale", self.scale)[1] > 1:
            raise SpecError(f"erase: scale is a share of the area, at most 1, not {self.scale}")

    def words(self) -> str:
        return (
            f"{often(self.p)} a random box, {span(*self.scale)} of the area and {span(*self.ratio)} times as high as "
            "wide, is painted grey."
        )

    @property
    def parameters(self) -> int:
        return 5

    def draw(self, size: Size, draws: Draws) -> tuple[int, ...]:
        if draws.uniform() >= self.p:
            return ()
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = size[0] * size[1] * draws.uniform(*self.scale)
            ratio = math.exp(draws.uniform(*log_ratio))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < size[0] and width < size[1]:
                y, x = draws.integer(size[0] - height + 1), draws.integer(size[1] - width + 1)
                return _box(size, y, x, y + height, x + width)
        return ()


@dataclass(frozen=True)
class Cutout(PixelOp):
    """A box of ``size``, its middle anywhere; what lies outside is cut off."""

    size: int | Size
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        height_width("cutout", self.size)

    def words(self) -> str:
        return f"A box of {pixels(self.size)} with its middle at a random place is painted grey."

    @property
    def parameters(self) -> int:
        return 5

    def draw(self, size: Size, draws: Draws) -> tuple[int, ...]:
        height, width = height_width("cutout", self.size)
        y, x = draws.integer(size[0]) - height // 2, draws.integer(size[1]) - width // 2
        return _box(size, max(y, 0), max(x, 0), min(y + height, size[0]), min(x + width, size[1]))


def _box(size: Size, top: int, left: int, bottom: int, right: int) -> tuple[int, ...]:
    high, wide = size
    return Op.ERASE, fraction(left, wide), fraction(top, high), fraction(right, wide), fraction(bottom, high)
