"""``hsv_jitter``: hue, saturation and value changed at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Size
from softcache.recipe.opcodes import FACTOR, Op
from softcache.recipe.options import number
from softcache.recipe.pixelop import PixelOp


@dataclass(frozen=True)
class HsvJitter(PixelOp):
    """Ultralytics' RandomHSV: the hue turned by up to ``h`` of the circle each way, saturation and value multiplied by
    1 - ``s`` to 1 + ``s`` and 1 - ``v`` to 1 + ``v``. (Its versions up to 8.3.78 multiplied the hue, too.)"""

    h: float = 0.015
    s: float = 0.7
    v: float = 0.4
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        number("hsv_jitter", "h", self.h, 0.5)
        number("hsv_jitter", "s", self.s, 1)
        number("hsv_jitter", "v", self.v, 1)
        if not (self.h or self.s or self.v):
            raise SpecError("hsv_jitter changes nothing: say, for example, hsv_jitter(v=0.4)")

    def words(self) -> str:
        return (
            f"Its hue is turned by up to {self.h:g} of the circle, its saturation changed by up to {self.s:g} of what it is "
            f"and its value by up to {self.v:g}."
        )

    @property
    def parameters(self) -> int:
        return 4

    def draw(self, size: Size, draws: Draws) -> tuple[int, ...]:
        turn, *factors = (draws.uniform(-most, most) for most in (self.h, self.s, self.v))
        return (Op.HSV, round(turn * 256), *(round((1 + change) * FACTOR) for change in factors))
