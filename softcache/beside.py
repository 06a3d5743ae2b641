"""What rows of a cache are decoded with beside their own fields: what the views of an image share, or the last layer of the
teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from softcache.bases import Bases, constants
from softcache.codecs import Fields
from softcache.codecs.head import CONSTANTS, WEIGHT
from softcache.errors import DamageError
from softcache.parts import Part
from softcache.zarrfile import Array, Plain

if TYPE_CHECKING:
    from softcache.cache import Cache


def lead_of(own: str) -> str:
    """What stands before a teacher's constants of its target: of ``2.logits``, of one of several, ``2/``."""
    return own.rpartition("logits")[0].replace(".", "/")


def layer_of(cache: Cache, name: str) -> dict[str, str]:
    """Where the constants of the last layer lie, of a target that needs it."""
    part = next(part for part in cache.parts if name in part.targets)
    lead = lead_of(name.removeprefix(f"{part.named}."))
    return {n: part.constant(f"constants/{lead}{n}") for n in CONSTANTS}


def classes_of(cache: Cache, name: str) -> int:
    """How many classes a target of logits has."""
    if not cache.targets[name].layered:
        return cache.targets[name].shape[0]
    return len(cache.beside(name, np.zeros(0, np.int64))[WEIGHT])


class Beside:
    """Of one cache. Files are mapped when they are first asked for; of a cache that is being built, a block's at a time."""

    def __init__(self, cache: Cache):
        self._cache = cache
        self._layers: dict[str, Fields] = {}
        self._files: dict[str, dict[str, Plain]] = {}

    def __call__(self, name: str, positions: np.ndarray) -> Fields:
        """By field, the rows of the samples at these positions, or constants; nothing, of most targets."""
        if self._cache.targets[name].layered:
            if name not in self._layers:
                self._require_layer(name)
                self._layers[name] = {  # copied: what is mapped and then cut ends the process
                    n: self._cache.constant(path).copy() for n, path in layer_of(self._cache, name).items()
                }
            return self._layers[name]
        if not self._cache.targets[name].shared:
            return {}
        found = self._files.get(name)
        if found is None:
            part = next(part for part in self._cache.parts if name in part.targets)
            arrays = constants(part)[name]
            if not self._written(arrays):
                try:
                    return self._unfinished(part, name, positions)
                except DamageError:
                    if not self._written(arrays):  # the build may have ended this moment
                        raise
            found = self._files[name] = {field: self._open(array) for field, array in arrays.items()}
        return {field: file.rows().reshape(file.array.shape)[positions] for field, file in found.items()}

    def _require_layer(self, name: str) -> None:
        for path in layer_of(self._cache, name).values() if self._cache.complete else ():
            if path not in self._cache.constants:
                raise DamageError(
                    f"{self._cache.path}: the manifest names no constant {path!r}, which {name!r} is decoded with"
                )

    def _written(self, arrays: dict[str, Array]) -> bool:
        store = self._cache.store
        return self._cache.complete or all(store.exists(array.file()) for array in arrays.values())

    def _open(self, array: Array) -> Plain:
        cache = self._cache
        if cache.complete:
            named = cache.constants.get(array.path)
            if named is None or named.array(array.path) != array:
                raise DamageError(
                    f"{cache.path}: the manifest names no constant {array.path!r} of {array.dtype} {array.shape}, which "
                    "rows are decoded with"
                )
        return Plain(cache.store.path(array.file()), array)

    def _unfinished(self, part: Part, name: str, positions: np.ndarray) -> Fields:
        bases, grid = Bases(self._cache.store, part), part.grid
        out = {f.name: np.empty((len(positions), *f.shape), f.dtype) for f in part.targets[name].shared}
        blocks, rows = np.divmod(positions, grid.block_rows)
        for index in np.unique(blocks).tolist():
            here = blocks == index
            for field, values in bases.of(grid.block(0, index))[name].items():
                out[field][here] = values[rows[here]]
        return out
