"""The Zarr arrays of a cache, and room for what is stored of its views."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from softcache.block import Grid
from softcache.errors import DamageError
from softcache.recipe.mix import Blend, Mix
from softcache.recipe.mosaic import Frame, Mosaic
from softcache.recipe.view import View
from softcache.targets import Target
from softcache.zarrfile import Array

_MOST_VALUES = 1 << 28  # of a row: what a manifest can make a reader allocate


def view_rows(rows: int, parameters: int, mixed: bool, tiled: bool) -> dict[str, np.ndarray]:
    """Room for what is stored of so many views, by the names of :meth:`~softcache.recipe.View.fields`, zeros."""
    room = {
        "geometry": np.zeros((rows, View.FIELDS), np.int16),
        "ops": np.zeros((rows, parameters), np.int16),
        "partner": np.zeros((rows, Mix.FIELDS * mixed), np.int64),
        "mix": np.zeros((rows, Blend.FIELDS * mixed), np.int16),
        "tiles": np.zeros((rows, Mosaic.FIELDS * tiled), np.int64),
        "mosaic": np.zeros((rows, Frame.FIELDS * tiled), np.int16),
    }
    return {name: numbers for name, numbers in room.items() if numbers.shape[1]}


def keep_view(views: dict[str, np.ndarray], row: int, view: View) -> None:
    """Put a view into a row of :func:`view_rows`."""
    fields = view.fields()
    for name, numbers in views.items():
        numbers[row] = fields[name]


def block_arrays(
    grid: Grid, targets: Mapping[str, Target], views: Mapping[str, np.ndarray] | None = None
) -> list[Array]:
    """The arrays cut into blocks, in canonical (path) order: one a field, and with ``views`` (of :func:`view_rows`, of
    any number of rows) those of the views with their ops, mixes and mosaics."""
    found = [
        _block_array(f"view/{name}", rows.dtype.name, rows.shape[1:], ("parameter",), grid)
        for name, rows in (views or {}).items()
    ]
    for target in targets.values():
        for field in target.fields:
            axes = tuple(f"axis_{i}" for i in range(len(field.shape)))
            path = f"targets/{target.name}/{field.name}"
            found.append(_block_array(path, field.dtype, field.shape, axes, grid, field.plain))
    return sorted(found, key=lambda a: a.path)


def _block_array(
    path: str, dtype: str, row: tuple[int, ...], axes: tuple[str, ...], grid: Grid, plain: bool = False
) -> Array:
    shape = (grid.views, grid.samples, *row)
    if prod(row) > _MOST_VALUES:
        raise DamageError(f"{path} has rows of {prod(row):,} values; a row holds up to {_MOST_VALUES:,}")
    return Array(path, dtype, shape, (1, grid.block_rows, *row), ("view", "sample", *axes), plain=plain)


def constant(path: str, shape: tuple[int, ...], dtype: str) -> Array:
    """The array of a constant: one plain file."""
    return Array(path, dtype, shape, shape, tuple(f"axis_{i}" for i in range(len(shape))), lead=1)
