"""``mosaic``: the view becomes one of four on one canvas, the others being those of three other samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.letterbox import Letterbox
from softcache.recipe.mix import ONE
from softcache.recipe.mosaic import MOST, Frame
from softcache.recipe.opcodes import FACTOR
from softcache.recipe.options import height_width, interval, level, probability
from softcache.recipe.view import MAX_PIXELS
from softcache.recipe.words import often, pixels, span


@dataclass(frozen=True)
class Mosaicking:
    """With probability ``p`` a mosaic (Bochkovskiy et al. 2020): Ultralytics' of four images with the zoom and the shift
    that follow there, in one.

    The four tiles meet in a point whose x and y are drawn from ``center``, shares of the sides. Each is a view drawn at
    ``scale`` times the canvas, as far as it lies on that; the rest is of the grey ``fill``.

    Without ``size`` the canvas is that of the views, and tiles have its proportions. With it, an int or (h, w), the views
    are no canvas but pictures of any proportions, which they keep as tiles: as large as fits. One without a mosaic is
    letterboxed.
    """

    size: int | Size | None = None
    p: float = 1.0
    scale: tuple[float, float] = (0.5, 1.5)
    center: tuple[float, float] = (0.2, 0.8)
    fill: int = 114
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.canvas and max(self.canvas) > MAX_PIXELS:
            raise SpecError(f"mosaic: size is at most {MAX_PIXELS}, not {self.size!r}")
        probability("mosaic", self.p)
        if interval("mosaic", "scale", self.scale)[1] > MOST:
            raise SpecError(f"mosaic: scale is at most {MOST} times the canvas, not {self.scale}")
        if interval("mosaic", "center", self.center)[1] > 1:
            raise SpecError(f"mosaic: center is a share of the sides, at most 1, not {self.center}")
        level("mosaic", "fill", self.fill)

    def words(self) -> str:
        canvas = "" if self.size is None else f" of {pixels(self.size)}"
        return (
            f"{often(self.p)} it becomes one of four in a mosaic{canvas}, the others being other samples: they meet at "
            f"{span(*self.center)} of the sides, each drawn at {span(*self.scale)} times the canvas, on grey {self.fill}."
        )

    def size_after(self, size: Size | None) -> Size | None:
        return self.canvas or size

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        return canvas

    @property
    def canvas(self) -> Size | None:
        """(height, width) of the mosaics, where that is not the views' own."""
        return None if self.size is None else height_width("mosaic", self.size)

    def placed(self, canvas: Canvas, draws: Draws, alone: bool) -> Canvas:
        """What is painted: a tile, or what stands alone. Only where there is a ``size`` that is another canvas."""
        if self.size is None:
            return canvas
        return Letterbox(self.size, self.fill).apply(canvas, draws) if alone else canvas.filled(self.fill)

    def frame(self, draws: Draws) -> Frame | None:
        """Where the tiles lie; None where there is to be no mosaic."""
        if draws.uniform() >= self.p:
            return None
        x, y = (round(draws.uniform(*self.center) * ONE) for _ in range(2))
        scale = max(1, round(draws.uniform(*self.scale) * FACTOR))
        height, width = self.canvas or (0, 0)
        return Frame(x, y, scale, self.fill, width, height)
