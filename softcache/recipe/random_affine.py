"""``random_affine``: moved, zoomed, turned and sheared at random, over a canvas of the same size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.opcodes import fraction
from softcache.recipe.options import number
from softcache.recipe.words import span


@dataclass(frozen=True)
class RandomAffine:
    """Ultralytics' RandomPerspective without perspective, about the middle: turned by up to ``degrees`` each way, zoomed
    by 1 - ``scale`` to 1 + ``scale``, sheared by up to ``shear`` degrees along both sides, and moved by up to ``translate``
    of the sides.

    Without ``degrees`` and ``shear`` it is another rectangle of the image. With them it is the rectangle around what will
    be seen, out of which the op AFFINE takes it.
    """

    degrees: float = 0
    translate: float = 0.1
    scale: float = 0.5
    shear: float = 0
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        number("random_affine", "degrees", self.degrees, 180)
        number("random_affine", "translate", self.translate, 1)
        number("random_affine", "scale", self.scale, 0.9)
        # at 45 both ways a view would be a line
        number("random_affine", "shear", self.shear, 40)

    def words(self) -> str:
        return (
            f"About its middle it is turned by up to {self.degrees:g}°, sheared by up to {self.shear:g}° and zoomed by "
            f"{span(1 - self.scale, 1 + self.scale)}, and moved by up to {self.translate:g} of its sides."
        )

    @property
    def turns(self) -> bool:
        """Is it more than another rectangle?"""
        return bool(self.degrees or self.shear)

    def size_after(self, size: Size | None) -> Size | None:
        return size

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        angle = math.radians(draws.uniform(-self.degrees, self.degrees))
        gain = draws.uniform(1 - self.scale, 1 + self.scale)
        across, down = (math.tan(math.radians(draws.uniform(-self.shear, self.shear))) for _ in range(2))
        cos, sin = math.cos(angle), math.sin(angle)
        # content goes to [[a, b], [c, d]] times its place from the middle, the shear times the turn
        a, b, c, d = cos - across * sin, sin + across * cos, down * cos - sin, cos + down * sin
        det = gain * (1 - across * down)
        middle = [
            side * draws.uniform(0.5 - self.translate, 0.5 + self.translate)
            for side in (canvas.width, canvas.height)
        ]
        x, width, *to_x = _along(canvas, (d / det, -b / det), middle, canvas.width / 2)
        y, height, *to_y = _along(canvas, (-c / det, a / det), middle, canvas.height / 2)
        window = canvas.window(y, x, height, width)
        return window.turned(tuple(fraction(share, 1) for share in to_x + to_y)) if self.turns else window


def _along(canvas: Canvas, row: tuple[float, float], middle: list[float], center: float) -> tuple[float, ...]:
    """Where what is seen begins along one axis, how long it is, and how it is taken out of that, as shares.

    A place comes from ``row`` times its place from ``middle``, counted from ``center``.
    """
    first = center - row[0] * middle[0] - row[1] * middle[1]
    reach = row[0] * canvas.width, row[1] * canvas.height
    start = first + min(reach[0], 0) + min(reach[1], 0)
    length = abs(reach[0]) + abs(reach[1])
    return start, length, reach[0] / length, reach[1] / length, (first - start) / length
