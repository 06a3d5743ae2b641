"""Views as they are stored where each has to be whole by itself: the views that it is shown with stand beside it.

``NAME`` is as below ``view/``; ``partner_NAME`` is of the partner's view, ``tile0_NAME`` of a tile's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from softcache.arrays import view_rows
from softcache.recipe import View
from softcache.recipe.mix import Blend, Mix
from softcache.recipe.mosaic import TILES, Frame, Mosaic, Tile


def room(rows: int, parameters: int, mixed: bool, tiled: bool) -> dict[str, np.ndarray]:
    """Room for so many views with those that they are shown with, by name, zeros."""
    found = view_rows(rows, parameters, mixed, tiled)
    parts = {f"tile{j}_": view_rows(rows, parameters, False, False) for j in range(TILES * tiled)}
    if mixed:
        parts["partner_"] = room(rows, parameters, False, tiled)
    return found | {of + name: numbers for of, part in parts.items() for name, numbers in part.items()}


def keep(kept: dict[str, np.ndarray], row: int, view: View, of: str = "") -> None:
    """Put a view into a row of :func:`room`; ``of`` is what stands before the names."""
    for name, numbers in view.fields().items():
        if of + name in kept:
            kept[of + name][row] = numbers
    for j, tile in enumerate(view.mosaic.tiles if view.mosaic else ()):
        keep(kept, row, tile.view, f"{of}tile{j}_")
    if view.mix:
        keep(kept, row, view.mix.view, f"{of}partner_")


def view_of(kept: Mapping[str, np.ndarray], i: int, of: str = "") -> View:
    """The inverse of :func:`keep`."""

    def row(name: str) -> list[int]:
        return kept[of + name][i].tolist() if of + name in kept else []

    view = View.unpack(row("geometry"), row("ops"))
    tiles, partner = row("tiles"), row("partner")
    if tiles and tiles[0] >= 0:
        whose = zip(tiles[::2], tiles[1::2], strict=True)
        others = [
            Tile(who, number, view_of(kept, i, f"{of}tile{j}_")) for j, (who, number) in enumerate(whose)
        ]
        view = replace(view, mosaic=Mosaic(tuple(others), Frame.unpack(row("mosaic"))))
    if partner and partner[0] >= 0:
        theirs = view_of(kept, i, f"{of}partner_")
        view = replace(view, mix=Mix(partner[0], partner[1], theirs, Blend.unpack(row("mix"))))
    return view
