"""``resize``: another number of pixels for the same part of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.options import height_width
from softcache.recipe.words import pixels


@dataclass(frozen=True)
class Resize:
    """An int is the length of the shorter side, the proportions kept; (h, w) is exact."""

    size: int | Size
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        height_width("resize", self.size)

    def words(self) -> str:
        if isinstance(self.size, tuple):
            return f"It is resized to {pixels(self.size)}."
        return f"It is resized, its proportions kept, so that the shorter side has {self.size:,} pixels."

    def size_after(self, size: Size | None) -> Size | None:
        if isinstance(self.size, tuple):
            return self.size
        return None if size is None else self._resized(size)

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        return canvas.resize(*self._resized((canvas.height, canvas.width)))

    def _resized(self, size: Size) -> Size:
        if isinstance(self.size, tuple):
            return self.size
        height, width = size
        if height <= width:
            return self.size, self.size * width // height
        return self.size * height // width, self.size
