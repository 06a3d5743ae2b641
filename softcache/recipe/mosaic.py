"""Mosaic: four views on one canvas, each in a corner of its own (YOLOv4: Bochkovskiy et al. 2020).

Partner-addressed as a mix is (:mod:`.mix`): it names the very views it was made of, so that anyone can make it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from softcache.recipe.mix import ONE, rounded
from softcache.recipe.opcodes import FACTOR

if TYPE_CHECKING:
    from softcache.recipe.view import View

TILES = 3  # beside the sample's own
MOST = 4  # times the canvas's sides: what a stored number can make a reader render
UNIT = ONE * FACTOR  # a side, in which every edge of a tile is a whole number

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the four tiles of a mosaic lie; free of resolution.

    Each has one corner at (``x``, ``y``), in 32767ths of the canvas's sides, and sides of ``scale`` / 4096 of the
    canvas's. What lies outside the canvas is cut off, and what no tile covers is of the grey ``fill``.
    """

    x: int
    y: int
    scale: int
    fill: int

    FIELDS: ClassVar[int] = 4

    def pack(self) -> tuple[int, ...]:
        """The four fields in order, each within 0…32767."""
        return self.x, self.y, self.scale, self.fill

    @classmethod
    def unpack(cls, row: Sequence[int]) -> Frame:
        """The frame of four stored numbers (a tuple, or an integer array of shape ``(4,)``)."""
        return cls(*map(int, row))

    def places(self) -> list[Box]:
        """The tiles top left, top right, bottom left and bottom right, not cut, in 1/:data:`UNIT` of the sides."""
        side = self.scale * ONE
        lefts, tops = ((at * FACTOR - side, at * FACTOR) for at in (self.x, self.y))
        return [(left, top, left + side, top + side) for top in tops for left in lefts]

    def pixels(self, size: tuple[int, int]) -> list[Box]:
        """The same on a canvas of ``size`` (h, w): every edge rounded to whole pixels, halves up."""
        sides = (size[1], size[0]) * 2
        return [
            tuple(rounded(edge * side, UNIT) for edge, side in zip(place, sides, strict=True))
            for place in self.places()
        ]  # pyright: ignore[reportReturnType]


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
        """What is stored: sample and view number of each tile, within int64; and the frame's four."""
        return tuple(n for tile in self.tiles for n in (tile.sample, tile.number)), self.frame.pack()


UNTILED = (-1,) * Mosaic.FIELDS, (0,) * Frame.FIELDS  # stored where there is no mosaic


def impossible(
    samples: np.ndarray, tiles: np.ndarray, mosaic: np.ndarray, count: int, views: int
) -> np.ndarray:
    """Which stored rows no recipe draws, bool ``(n,)``: of ``samples`` int64 ``(n,)``, out of ``count`` with ``views``.

    ``tiles`` int64 ``(n, 6)`` and ``mosaic`` int16 ``(n, 4)`` are the rows, as :meth:`Mosaic.pack` gives them.
    """
    who, number = tiles.reshape(-1, TILES, 2).transpose(2, 0, 1)
    others = (who >= 0) & (who < count) & (who != samples[:, None]) & (number >= 0) & (number < views)
    scale, fill = mosaic[:, 2], mosaic[:, 3]
    tiled = others.all(axis=1) & (mosaic >= 0).all(axis=1)
    tiled &= (scale >= 1) & (scale <= MOST * FACTOR) & (fill <= 255)
    untiled = (tiles == UNTILED[0]).all(axis=1) & (mosaic == UNTILED[1]).all(axis=1)
    return ~(tiled | untiled)
