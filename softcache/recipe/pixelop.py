"""What pixel ops share: they draw numbers for :attr:`View.ops`, and leave the geometry as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size


class PixelOp(ABC):
    """An op on pixels. What it does to them is in :mod:`.replay`; here it is drawn."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """How many numbers :meth:`draw` gives at most."""

    @abstractmethod
    def draw(self, size: Size, draws: Draws) -> tuple[int, ...]:
        """Opcodes and arguments for a canvas of that size; none where the op is not to be done this time."""

    def size_after(self, size: Size | None) -> Size | None:
        return size

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        drawn = tuple(map(int, self.draw((canvas.height, canvas.width), draws)))
        return canvas.then(drawn + (0,) * (self.parameters - len(drawn)))
