"""``vflip``: mirrored top to bottom, or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.options import probability
from softcache.recipe.words import often


@dataclass(frozen=True)
class VFlip:
    """Mirrored top to bottom with probability ``p``."""

    p: float = 0.5
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        probability("vflip", self.p)

    def words(self) -> str:
        return f"{often(self.p)} it is mirrored top to bottom."

    def size_after(self, size: Size | None) -> Size | None:
        return size

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        return canvas.upend() if draws.uniform() < self.p else canvas
