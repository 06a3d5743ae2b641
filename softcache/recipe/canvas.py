"""Canvas: what the ops of a recipe pass on from left to right.

A canvas has a size in virtual pixels, which the ops see, and knows which rectangle of the source
image it shows. Resizing changes its size only; no pixel is touched before ``render``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from softcache.recipe.view import View

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True, slots=True)
class Canvas:
    """``height`` × ``width`` virtual pixels over a rectangle given in source pixels."""

    height: int
    width: int
    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False
    ops: tuple[int, ...] = ()  # opcodes and arguments, see View.ops

    @classmethod
    def whole(cls, height: int, width: int) -> Canvas:
        """The whole of an image of that size."""
        return cls(height, width, 0.0, 0.0, float(width), float(height))

    def crop(self, y: int, x: int, height: int, width: int) -> Canvas:
        """The part at ``(y, x)``; it may reach outside. Exact while nothing has been resized."""
        if self.flip:  # the canvas is seen mirrored: its left is the right of the source
            x = self.width - x - width
        wide, high = self.right - self.left, self.bottom - self.top
        return Canvas(
            height,
            width,
            self.left + x * wide / self.width,
            self.top + y * high / self.height,
            self.left + (x + width) * wide / self.width,
            self.top + (y + height) * high / self.height,
            self.flip,
        )

    def resize(self, height: int, width: int) -> Canvas:
        """The same rectangle over another number of virtual pixels."""
        return replace(self, height=height, width=width)

    def mirror(self) -> Canvas:
        """The canvas seen left-right mirrored."""
        return replace(self, flip=not self.flip)

    def then(self, ops: tuple[int, ...]) -> Canvas:
        """The canvas with more to be done on its pixels."""
        return replace(self, ops=self.ops + ops)

    def view(self, image_height: int, image_width: int) -> View:
        """The view with its rectangle rounded to whole source pixels, at least one each way."""
        x, width = _round(self.left, self.right)
        y, height = _round(self.top, self.bottom)
        return View(x, y, width, height, image_width, image_height, self.flip, self.ops)


def _round(start: float, stop: float) -> tuple[int, int]:
    first, last = math.floor(start + 0.5), math.floor(stop + 0.5)
    return (first, last - first) if last > first else (math.floor(start), 1)
