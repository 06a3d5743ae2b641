"""``grayscale``: without colour, or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.keyed import Draws
from softcache.recipe.canvas import Size
from softcache.recipe.opcodes import Op
from softcache.recipe.options import probability
from softcache.recipe.pixelop import PixelOp
from softcache.recipe.words import often


@dataclass(frozen=True)
class Grayscale(PixelOp):
    """Without colour with probability ``p``."""

    p: float = 0.1
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        probability("grayscale", self.p)

    def words(self) -> str:
        return f"{often(self.p)} its colour is taken away."

    @property
    def parameters(self) -> int:
        return 1

    def draw(self, size: Size, draws: Draws) -> tuple[int, ...]:
        return (Op.GRAYSCALE,) if draws.uniform() < self.p else ()
