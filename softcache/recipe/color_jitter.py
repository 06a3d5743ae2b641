"""``color_jitter``: brightness, contrast, saturation and hue, changed at random and in random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Size
from softcache.recipe.opcodes import FACTOR, Op
from softcache.recipe.options import number
from softcache.recipe.pixelop import PixelOp

_MOST = 6  # its factor fits an int16


@dataclass(frozen=True)
class ColorJitter(PixelOp):
    """Factors from max(0, 1 - x) to 1 + x, and a hue turned by up to ``hue`` (0.5 is half the circle) each way, in
    one of all orders: torchvision's ColorJitter."""

    brightness: float = 0
    contrast: float = 0
    saturation: float = 0
    hue: float = 0
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            number("color_jitter", name, getattr(self, name), _MOST)
        number("color_jitter", "hue", self.hue, 0.5)
        if not self._changes():
            raise SpecError("color_jitter changes nothing: say, for example, color_jitter(brightness=0.4)")

    def words(self) -> str:
        changes = [f"{op.name.lower()} by up to {most:g}" for op, most in self._changes()]
        return f"Its colours change at random, in random order: {', '.join(changes)}."

    @property
    def parameters(self) -> int:
        return 2 * len(self._changes())

    def draw(self, size: Size, draws: Draws) -> tuple[int, ...]:
        left, drawn = self._changes(), []
        while left:
            op, most = left.pop(draws.integer(len(left)))
            if op == Op.HUE:
                drawn += [op, int(draws.uniform(-most, most) * 255)]
            else:
                drawn += [op, round(draws.uniform(max(0, 1 - most), 1 + most) * FACTOR)]
        return tuple(drawn)

    def _changes(self) -> list[tuple[Op, float]]:
        ops = (Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE)
        options = (self.brightness, self.contrast, self.saturation, self.hue)
        return [(op, most) for op, most in zip(ops, options, strict=True) if most]
