"""``identity``: the whole image, as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size


@dataclass(frozen=True)
class Identity:
    """Changes nothing: the recipe of who wants the whole image."""

    version: ClassVar[int] = 1

    def words(self) -> str:
        return "The whole image is shown as it is."

    def size_after(self, size: Size | None) -> Size | None:
        return size

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        return canvas
