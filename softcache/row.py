"""One row of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.recipe import View

if TYPE_CHECKING:
    from softcache.cache import Cache


class Row(Mapping[str, Any]):
    """The targets of one (sample, view), decoded when asked for."""

    def __init__(self, cache: Cache, sample: int, view: int):
        self._cache, self.sample, self.view_number = cache, sample, view

    @property
    def view(self) -> View:
        """The realised view."""
        self._cache.require_replayable("a view")
        return self._cache.read_views(self.view_number, np.array([self.sample]))[0]

    def __getitem__(self, name: str) -> Any:
        return self._cache._read(name, self.view_number, np.array([self.sample]), slab=False)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cache.targets)

    def __len__(self) -> int:
        return len(self._cache.targets)
