"""``zoom_out``: the canvas somewhere on a larger one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.options import level, probability
from softcache.recipe.words import often, span


@dataclass(frozen=True)
class ZoomOut:
    """With probability ``p`` both sides grow by a factor of 1 to ``max``, ``fill`` around what there was: the expansion of
    SSD (Liu et al. 2016) and RT-DETR, torchvision's RandomZoomOut."""

    p: float = 0.5
    max: float = 4.0
    fill: int = 114
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        probability("zoom_out", self.p)
        if type(self.max) not in (int, float) or not 1 <= self.max < math.inf:
            raise SpecError(f"zoom_out: max must be a number of at least 1, not {self.max!r}")
        level("zoom_out", "fill", self.fill)

    def words(self) -> str:
        return (
            f"{often(self.p)} it is put at a random place of a canvas of grey {self.fill} whose sides are "
            f"{span(1, self.max)} times as long."
        )

    def size_after(self, size: Size | None) -> Size | None:
        return None if self.p else size

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        canvas = canvas.filled(self.fill)
        if draws.uniform() >= self.p:
            return canvas
        factor = draws.uniform(1, self.max)
        height, width = int(canvas.height * factor), int(canvas.width * factor)
        y = draws.integer(height - canvas.height + 1)
        x = draws.integer(width - canvas.width + 1)
        return canvas.crop(-y, -x, height, width)
