"""What rows of a cache are decoded with beside their own fields: what the views of an image share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from softcache.bases import Bases, constants
from softcache.codecs import Fields
from softcache.errors import DamageError
from softcache.parts import Part
from softcache.zarrfile import Array, map_plain

if TYPE_CHECKING:
    from softcache.cache import Cache


class Beside:
    """Of one cache. Files are mapped when they are first asked for; of a cache that is being built, a block's at a time."""

    def __init__(self, cache: Cache):
        self._cache = cache
        self._mapped: dict[str, Fields] = {}

    def __call__(self, name: str, positions: np.ndarray) -> Fields:
        """By field, the rows of the samples at these positions; nothing, of most targets."""
        if not self._cache.targets[name].shared:
            return {}
        found = self._mapped.get(name)
        if found is None:
            part = next(part for part in self._cache.parts if name in part.targets)
            arrays = constants(part)[name]
            if not self._written(arrays):
                try:
                    return self._unfinished(part, name, positions)
                except DamageError:
                    if not self._written(arrays):  # the build may have ended this moment
                        raise
            found = self._mapped[name] = {
                field: self._map(array).reshape(array.shape) for field, array in arrays.items()
            }
        return {field: rows[positions] for field, rows in found.items()}

    def _written(self, arrays: dict[str, Array]) -> bool:
        store = self._cache.store
        return self._cache.complete or all(store.exists(array.file()) for array in arrays.values())

    def _map(self, array: Array) -> np.ndarray:
        cache = self._cache
        if cache.complete:
            named = cache.constants.get(array.path)
            if named is None or named.array(array.path) != array:
                raise DamageError(
                    f"{cache.path}: the manifest names no constant {array.path!r} of {array.dtype} {array.shape}, which "
                    "rows are decoded with"
                )
        return map_plain(cache.store.path(array.file()), array)

    def _unfinished(self, part: Part, name: str, positions: np.ndarray) -> Fields:
        bases, grid = Bases(self._cache.store, part), part.grid
        out = {f.name: np.empty((len(positions), *f.shape), f.dtype) for f in part.targets[name].shared}
        blocks, rows = np.divmod(positions, grid.block_rows)
        for index in np.unique(blocks).tolist():
            here = blocks == index
            for field, values in bases.of(grid.block(0, index))[name].items():
                out[field][here] = values[rows[here]]
        return out
