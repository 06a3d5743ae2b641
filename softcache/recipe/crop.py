"""Ops that take a part of the canvas: ``crop``, ``center_crop``, ``random_resized_crop``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.options import height_width, interval, whole
from softcache.recipe.words import pixels, span


@dataclass(frozen=True)
class Crop:
    """A part of ``size`` at a random place, the canvas padded by ``pad`` pixels all round: black, or the recipe's fill."""

    size: int | Size
    pad: int = 0
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        height_width("crop", self.size)
        whole("crop", "pad", self.pad, 0)

    def words(self) -> str:
        padded = f", after {self.pad:,} pixels of padding were put around it" if self.pad else ""
        return f"A part of {pixels(self.size)} is cut out at a random place{padded}."

    def size_after(self, size: Size | None) -> Size | None:
        return height_width("crop", self.size)

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        height, width = height_width("crop", self.size)
        free_y = canvas.height + 2 * self.pad - height
        free_x = canvas.width + 2 * self.pad - width
        if free_y < 0 or free_x < 0:
            raise SpecError(
                f"a crop of {width}x{height} is larger than its canvas of "
                f"{canvas.width}x{canvas.height} with pad={self.pad}; "
                "crop less, pad more, or resize before it"
            )
        y = draws.integer(free_y + 1) - self.pad
        x = draws.integer(free_x + 1) - self.pad
        return canvas.crop(y, x, height, width)


@dataclass(frozen=True)
class CenterCrop:
    """The middle part of ``size``, black where the canvas is smaller, as torchvision places it."""

    size: int | Size
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        height_width("center_crop", self.size)

    def words(self) -> str:
        return f"The middle {pixels(self.size)} are cut out."

    def size_after(self, size: Size | None) -> Size | None:
        return height_width("center_crop", self.size)

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        height, width = height_width("center_crop", self.size)
        y, x = _middle(canvas.height, height), _middle(canvas.width, width)
        return canvas.crop(y, x, height, width)


def _middle(available: int, wanted: int) -> int:
    if wanted > available:  # the odd pixel of padding goes to the far side
        return -((wanted - available) // 2)
    return round((available - wanted) / 2)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part, its share of the area in ``scale`` and width/height in ``ratio``, resized.

    Ten attempts, then the largest middle part within ``ratio``: torchvision's algorithm.
    """

    size: int | Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        height_width("random_resized_crop", self.size)
        interval("random_resized_crop", "ratio", self.ratio)
        if interval("random_resized_crop", "scale", self.scale)[1] > 1:
            raise SpecError(f"random_resized_crop: scale is a share of the area, at most 1, not {self.scale}")

    def words(self) -> str:
        return (
            f"A random part, {span(*self.scale)} of the area and {span(*self.ratio)} times as wide as high, is resized to "
            f"{pixels(self.size)}."
        )

    def size_after(self, size: Size | None) -> Size | None:
        return height_width("random_resized_crop", self.size)

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        return self._part(canvas, draws).resize(*height_width("random_resized_crop", self.size))

    def _part(self, canvas: Canvas, draws: Draws) -> Canvas:
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = canvas.width * canvas.height * draws.uniform(*self.scale)
            ratio = math.exp(draws.uniform(*log_ratio))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= canvas.width and 0 < height <= canvas.height:
                y = draws.integer(canvas.height - height + 1)
                x = draws.integer(canvas.width - width + 1)
                return canvas.crop(y, x, height, width)
        return self._fallback(canvas)

    def _fallback(self, canvas: Canvas) -> Canvas:
        width, height = canvas.width, canvas.height
        if width / height < self.ratio[0]:
            height = max(1, min(height, round(width / self.ratio[0])))
        elif width / height > self.ratio[1]:
            width = max(1, min(width, round(height * self.ratio[1])))
        y, x = (canvas.height - height) // 2, (canvas.width - width) // 2
        return canvas.crop(y, x, height, width)
