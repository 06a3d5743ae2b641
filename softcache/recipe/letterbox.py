"""``letterbox``: the whole image inside a given size, its proportions kept, the rest filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.options import height_width, level, yes_or_no
from softcache.recipe.words import pixels

ALIGN = ("center", "top_left")


@dataclass(frozen=True)
class Letterbox:
    """As large as fits ``size``, whole pixels of it, with ``fill`` around it: Ultralytics' LetterBox, or with
    ``align=top_left`` YOLOX's, which cuts the content's size where the other rounds it.

    Without ``upscale`` a small image keeps its size.
    """

    size: int | Size
    fill: int = 114
    align: str = "center"
    upscale: bool = True
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        height_width("letterbox", self.size)
        level("letterbox", "fill", self.fill)
        yes_or_no("letterbox", "upscale", self.upscale)
        if self.align not in ALIGN:
            raise SpecError(f"letterbox: align is {' or '.join(ALIGN)}, not {self.align!r}")

    def words(self) -> str:
        place = "in the middle" if self.align == "center" else "at the top left"
        small = "" if self.upscale else ", a small one at its own size"
        return f"It is fitted whole into {pixels(self.size)}, {place}{small}; what is left over is grey {self.fill}."

    def size_after(self, size: Size | None) -> Size | None:
        return height_width("letterbox", self.size)

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        height, width = height_width("letterbox", self.size)
        scale = min(height / canvas.height, width / canvas.width)
        if not self.upscale:
            scale = min(scale, 1.0)
        centred = self.align == "center"
        whole = round if centred else int
        high, wide = max(1, whole(canvas.height * scale)), max(1, whole(canvas.width * scale))
        # Ultralytics' rounding: of an odd number of pixels one more is below, and to the right
        top, left = ((height - high) // 2, (width - wide) // 2) if centred else (0, 0)
        return canvas.resize(high, wide).crop(-top, -left, height, width).filled(self.fill)
