"""The views of a cache put together again from their rows: each with the views it is shown with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from softcache.codecs import Fields
from softcache.errors import DamageError
from softcache.recipe import View
from softcache.recipe import mix as mixes
from softcache.recipe import mosaic as mosaics
from softcache.recipe.mix import Blend, Mix
from softcache.recipe.mosaic import TILES, Frame, Mosaic, Tile

if TYPE_CHECKING:
    from softcache.cache import Cache


def read(cache: Cache, number: int, samples: np.ndarray, slab: bool) -> list[View]:
    """Views ``number`` of some valid samples, whole. :class:`DamageError` for what no recipe draws.

    ``slab`` as in :meth:`softcache.cache.Cache.read`.
    """
    rows, views = _tiled(cache, number, samples, slab)
    if not cache.mixed:
        return views
    (who, numbers), blends = rows["partner"].T, rows["mix"]
    wrong = mixes.impossible(samples, rows["partner"], blends, cache.samples, cache.views)
    _refuse(cache, number, samples, rows, wrong, "mixed with", ("partner", "mix"))
    mixed = np.flatnonzero(who >= 0)
    wrong[mixed] = _invalid(cache, numbers[mixed], who[mixed])
    _refuse(cache, number, samples, rows, wrong, "mixed with", ("partner", "mix"))
    theirs = _gather(numbers[mixed], who[mixed], lambda k, others: _tiled(cache, k, others, slab)[1])
    for i, of_partner in zip(mixed.tolist(), theirs, strict=True):
        mix = Mix(int(who[i]), int(numbers[i]), of_partner, Blend.unpack(blends[i].tolist()))
        views[i] = replace(views[i], mix=mix)
    return views


def _tiled(cache: Cache, number: int, samples: np.ndarray, slab: bool) -> tuple[Fields, list[View]]:
    """What is stored of some views, and the views without their mix."""
    rows, views = _alone(cache, number, samples, slab)
    if not cache.tiled:
        return rows, views
    tiles, frames = rows["tiles"], rows["mosaic"]
    wrong = mosaics.impossible(samples, tiles, frames, cache.samples, cache.views)
    _refuse(cache, number, samples, rows, wrong, "a mosaic of", ("tiles", "mosaic"))
    tiled = np.flatnonzero(tiles[:, 0] >= 0)
    who, numbers = tiles[tiled].reshape(-1, 2).T
    wrong[tiled] = _invalid(cache, numbers, who).reshape(-1, TILES).any(axis=1)
    _refuse(cache, number, samples, rows, wrong, "a mosaic of", ("tiles", "mosaic"))
    parts = _gather(numbers, who, lambda k, others: _alone(cache, k, others, slab)[1])
    others = list(map(Tile, who.tolist(), numbers.tolist(), parts))
    for n, i in enumerate(tiled.tolist()):
        three = tuple(others[n * TILES : (n + 1) * TILES])
        views[i] = replace(views[i], mosaic=Mosaic(three, Frame.unpack(frames[i].tolist())))
    return rows, views


def _alone(cache: Cache, number: int, samples: np.ndarray, slab: bool) -> tuple[Fields, list[View]]:
    """What is stored of some views, and the views without mosaic and mix."""
    slab = slab and cache.whole_view("view", number)
    rows = cache.reader.fields("view", number, cache.grid.positions(samples), slab)
    geometry, ops = rows["geometry"], rows.get("ops", np.zeros((len(samples), 0), np.int16))
    return rows, list(map(View.unpack, geometry.tolist(), ops.tolist()))


def _invalid(cache: Cache, numbers: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Which of these samples, each in its own view number, have no pixels: bool, as they are."""
    found = np.zeros(len(samples), bool)
    for number in np.unique(numbers).tolist():
        here = np.flatnonzero(numbers == number)
        found[here] = np.isin(samples[here], cache.invalid_among(number, samples[here]))
    return found


def _gather(
    numbers: np.ndarray, samples: np.ndarray, read: Callable[[int, np.ndarray], list[View]]
) -> list[View]:
    """The views of these samples, each of its own number, ``read`` together where that is the same."""
    found: dict[int, View] = {}
    for number in np.unique(numbers).tolist():
        here = np.flatnonzero(numbers == number)
        found |= zip(here.tolist(), read(number, samples[here]), strict=True)
    return [found[i] for i in range(len(samples))]


def _refuse(
    cache: Cache,
    number: int,
    samples: np.ndarray,
    rows: Fields,
    wrong: np.ndarray,
    what: str,
    names: tuple[str, str],
) -> None:
    if wrong.any():
        i = int(wrong.argmax())
        told = ", ".join(f"{name} {rows[name][i].tolist()}" for name in names)
        raise DamageError(
            f"view {number} of {cache.ids[samples[i]]!r} in {cache.path} is {what} what cannot be ({told}): verify it with "
            "--read-data, or rebuild the cache"
        )
