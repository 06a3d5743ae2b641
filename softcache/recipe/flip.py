"""``flip``: mirrored left-right, or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size


@dataclass(frozen=True)
class Flip:
    """Mirrored left-right with probability ``p``."""

    p: float = 0.5
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if type(self.p) not in (int, float) or not 0 <= self.p <= 1:
            raise SpecError(f"flip: p must be a probability from 0 to 1, not {self.p!r}")

    def size_after(self, size: Size | None) -> Size | None:
        return size

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        return canvas.mirror() if draws.uniform() < self.p else canvas
