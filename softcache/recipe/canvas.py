"""Canvas: what the ops of a recipe pass on from left to right.

A canvas has a size in virtual pixels, which the ops see, and knows which rectangle of the source
image it shows. Resizing changes its size only; no pixel is touched before ``render``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from softcache.recipe.opcodes import Op
from softcache.recipe.view import View

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True, slots=True)
class Canvas:
    """``height`` × ``width`` virtual pixels over a rectangle given in source pixels.

    ``fill`` is what is shown outside the image; None is black. After ``flip`` it is mirrored top to bottom (``vflip``), and
    at last taken out of what there is then by the six arguments of AFFINE (``turn``), after which it can only be resized.
    """

    height: int
    width: int
    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False
    vflip: bool = False
    fill: int | None = None
    turn: tuple[int, ...] = ()
    ops: tuple[int, ...] = ()  # opcodes and arguments, see View.ops
    boxes: np.ndarray | None = field(default=None, compare=False)  # xyxy (n, 4), in source pixels

    @classmethod
    def whole(cls, height: int, width: int, boxes: np.ndarray | None = None) -> Canvas:
        """The whole of an image of that size."""
        return cls(height, width, 0.0, 0.0, float(width), float(height), boxes=boxes)

    def crop(self, y: int, x: int, height: int, width: int) -> Canvas:
        """The part at ``(y, x)``; it may reach outside. Exact while nothing has been resized."""
        return self.window(y, x, height, width).resize(height, width)

    def window(self, y: float, x: float, height: float, width: float) -> Canvas:
        """The part at ``(y, x)``, over as many virtual pixels as before."""
        if self.flip:  # the canvas is seen mirrored: its left is the right of the source
            x = self.width - x - width
        if self.vflip:
            y = self.height - y - height
        wide, high = self.right - self.left, self.bottom - self.top
        return replace(
            self,
            left=self.left + x * wide / self.width,
            top=self.top + y * high / self.height,
            right=self.left + (x + width) * wide / self.width,
            bottom=self.top + (y + height) * high / self.height,
        )

    def resize(self, height: int, width: int) -> Canvas:
        """The same rectangle over another number of virtual pixels."""
        return replace(self, height=height, width=width)

    def mirror(self) -> Canvas:
        """The canvas seen left-right mirrored."""
        return replace(self, flip=not self.flip)

    def upend(self) -> Canvas:
        """The canvas mirrored top to bottom."""
        return replace(self, vflip=not self.vflip)

    def turned(self, turn: tuple[int, ...]) -> Canvas:
        """The canvas after AFFINE with these arguments."""
        return replace(self, turn=turn)

    def filled(self, fill: int) -> Canvas:
        """The canvas with that grey outside the image."""
        return replace(self, fill=fill)

    def seen(self, boxes: np.ndarray) -> np.ndarray:
        """What of boxes ``(n, 4)`` in source pixels is on the canvas, float64 ``(m, 4)`` in virtual pixels.

        Those without an area there are left out.
        """
        low, high = np.array([self.left, self.top]), np.array([self.right, self.bottom])
        sides = np.array([self.width, self.height], np.float64)
        corners = (boxes.reshape(-1, 2, 2) - low) / (high - low)
        for axis in np.flatnonzero([self.flip, self.vflip]):
            corners[..., axis] = 1 - corners[:, ::-1, axis]
        inside = (corners.clip(0, 1) * sides).reshape(-1, 4)
        return inside[(inside[:, 2:] > inside[:, :2]).all(axis=1)]  # no NaN is larger than another

    def then(self, ops: tuple[int, ...]) -> Canvas:
        """The canvas with more to be done on its pixels."""
        return replace(self, ops=self.ops + ops)

    def view(self, image_height: int, image_width: int, parameters: int = 0) -> View:
        """The view with its rectangle rounded to whole source pixels, at least one each way.

        Its ops are padded to at least ``parameters`` numbers.
        """
        x, width = _round(self.left, self.right)
        y, height = _round(self.top, self.bottom)
        ops: tuple[int, ...] = () if self.fill is None else (int(Op.FILL), self.fill)
        ops += (int(Op.VFLIP),) if self.vflip else ()
        ops += (int(Op.AFFINE), *self.turn) if self.turn else ()
        ops += self.ops
        ops += (0,) * (parameters - len(ops))
        return View(x, y, width, height, image_width, image_height, self.flip, ops)


def _round(start: float, stop: float) -> tuple[int, int]:
    first, last = math.floor(start + 0.5), math.floor(stop + 0.5)
    return (first, last - first) if last > first else (math.floor(start), 1)
