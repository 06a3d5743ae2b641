"""``solarize``: bright pixels inverted, or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Size
from softcache.recipe.opcodes import Op
from softcache.recipe.options import probability, whole
from softcache.recipe.pixelop import PixelOp
from softcache.recipe.words import often


@dataclass(frozen=True)
class Solarize(PixelOp):
    """With probability ``p`` values from ``threshold`` (0 … 256) up are inverted."""

    p: float = 0.2
    threshold: int = 128
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        probability("solarize", self.p)
        if whole("solarize", "threshold", self.threshold, 0) > 256:
            raise SpecError(f"solarize: threshold is at most 256, not {self.threshold}")

    def words(self) -> str:
        return f"{often(self.p)} values from {self.threshold} up are inverted."

    @property
    def parameters(self) -> int:
        return 2

    def draw(self, size: Size, draws: Draws) -> tuple[int, ...]:
        return (Op.SOLARIZE, self.threshold) if draws.uniform() < self.p else ()
