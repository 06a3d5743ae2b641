"""Mosaic: four views on one canvas, each in a corner of its own (YOLOv4: Bochkovskiy et al. 2020).

Partner-addressed as a mix is (:mod:`.mix`): it names the very views it was made of, so that anyone can make it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from softcache.recipe.mix import ONE, rounded
from softcache.recipe.opcodes import FACTOR

if TYPE_CHECKING:
    from softcache.recipe.view import View

TILES = 3  # beside the sample's own
MOST = 4  # times the canvas's sides: what a stored number can make a reader render

Box = tuple[int, int, int, int]  # left, top, right, bottom
Place = tuple[Fraction, Fraction, Fraction, Fraction]  # likewise, as shares of the canvas's sides


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the four tiles of a mosaic lie; free of resolution.

    Each has one corner at (``x``, ``y``), in 32767ths of the canvas's sides, and is as large as fits ``scale`` / 4096 of
    the canvas, which is ``width`` × ``height``: with the proportions of its view's rectangle, or where both are 0 with
    the canvas's. What lies outside the canvas is cut off, and what no tile covers is of the grey ``fill``.
    """

    x: int
    y: int
    scale: int
    fill: int
    width: int = 0
    height: int = 0

    FIELDS: ClassVar[int] = 6

    def pack(self) -> tuple[int, ...]:
        """The six fields in order, each within 0…32767."""
        return self.x, self.y, self.scale, self.fill, self.width, self.height

    @classmethod
    def unpack(cls, row: Sequence[int]) -> Frame:
        """The frame of six stored numbers (a tuple, or an integer array of shape ``(6,)``)."""
        return cls(*map(int, row))

    def places(self, shown: Sequence[View]) -> list[Place]:
        """Where the four views ``shown`` lie, top left, top right, bottom left and bottom right: exactly, and not cut."""
        x, y, found = Fraction(self.x, ONE), Fraction(self.y, ONE), []
        for i, view in enumerate(shown):
            width, height = self._sides(view)
            left, top = (x, x - width)[i % 2 == 0], (y, y - height)[i < 2]
            found.append((left, top, left + width, top + height))
        return found

    def pixels(self, shown: Sequence[View], size: tuple[int, int]) -> list[Box]:
        """The same on a canvas of ``size`` (h, w): every edge rounded to whole pixels, halves up."""
        sides = (size[1], size[0]) * 2
        return [
            tuple(
                rounded(edge.numerator * side, edge.denominator)
                for edge, side in zip(place, sides, strict=True)
            )
            for place in self.places(shown)
        ]  # pyright: ignore[reportReturnType]

    def _sides(self, view: View) -> tuple[Fraction, Fraction]:
        """Width and height of a tile, as shares of the canvas's."""
        scale = Fraction(self.scale, FACTOR)
        if not self.width:
            return scale, scale
        wider = Fraction(view.width * self.height, view.height * self.width)  # than the canvas, so many times
        return scale * min(wider, 1), scale / max(wider, 1)


@dataclass(frozen=True, slots=True)
class Tile:
    """View number ``number`` of ``sample``: ``view``, which is no mosaic itself and not mixed."""

    sample: int
    number: int
    view: View


@dataclass(frozen=True, slots=True)
class Mosaic:
    """What a view is shown with: itself at the top left, ``tiles`` at the top right, bottom left and bottom right."""

    tiles: tuple[Tile, ...]
    frame: Frame

    FIELDS: ClassVar[int] = 2 * TILES

    def pack(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is stored: sample and view number of each tile, within int64; and the frame's six."""
        return tuple(n for tile in self.tiles for n in (tile.sample, tile.number)), self.frame.pack()


UNTILED = (-1,) * Mosaic.FIELDS, (0,) * Frame.FIELDS  # stored where there is no mosaic


def impossible(
    samples: np.ndarray, tiles: np.ndarray, mosaic: np.ndarray, count: int, views: int
) -> np.ndarray:
    """Which stored rows no recipe draws, bool ``(n,)``: of ``samples`` int64 ``(n,)``, out of ``count`` with ``views``.

    ``tiles`` int64 ``(n, 6)`` and ``mosaic`` int16 ``(n, 6)`` are the rows, as :meth:`Mosaic.pack` gives them.
    """
    who, number = tiles.reshape(-1, TILES, 2).transpose(2, 0, 1)
    others = (who >= 0) & (who < count) & (who != samples[:, None]) & (number >= 0) & (number < views)
    scale, fill = mosaic[:, 2], mosaic[:, 3]
    tiled = others.all(axis=1) & (mosaic >= 0).all(axis=1)
    tiled &= (scale >= 1) & (scale <= MOST * FACTOR) & (fill <= 255)
    tiled &= (mosaic[:, 4] > 0) == (mosaic[:, 5] > 0)
    untiled = (tiles == UNTILED[0]).all(axis=1) & (mosaic == UNTILED[1]).all(axis=1)
    return ~(tiled | untiled)
