"""Which samples are trained on, and how they lie on the disk, without an array of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from softcache.block import Grid
from softcache.cache import Cache
from softcache.several import Combined, Joined


class Samples(Protocol):
    """Indices into ``cache.ids``, asked for some at a time; an int64 array is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, numbers: np.ndarray, /) -> np.ndarray: ...


class Every:
    """``0 … count-1`` but for a few, rising, as an int64 array of them would be; it takes the room of the few.

    ``without``: int64, sorted, each once.
    """

    def __init__(self, count: int, without: np.ndarray):
        self.count, self.without = count, without
        self._passed = without - np.arange(len(without))  # how many that stay lie before each

    def __len__(self) -> int:
        return self.count - len(self.without)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return numbers + np.searchsorted(self._passed, numbers, side="right")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or np.int64, copy=False)


class AsTheyLie:
    """Those samples of a grid that stay, in the order of their positions."""

    def __init__(self, grid: Grid, samples: Every):
        self._permutation = grid.permutation
        self._positions = Every(samples.count, np.sort(grid.positions(samples.without)))

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self._permutation.inverse(self._positions[numbers])


def trainable(cache: Cache, targets: str | Iterable[str] | None = None) -> Samples:
    """The samples whose images could be read, and whose targets (all that were pulled, by default) are here."""
    if cache.pulled is None and not isinstance(cache, Combined):
        return Every(cache.samples, cache.invalid)
    return np.setdiff1d(cache.pulled_samples(targets), cache.invalid)


def as_stored(cache: Cache, samples: Samples) -> Samples:
    """The same samples in the order in which the files of ``cache`` hold them."""
    if isinstance(samples, Every) and not isinstance(cache, Combined):
        return AsTheyLie(cache.grid, samples)
    some = np.asarray(samples)
    return some[np.argsort(_places(cache, some), kind="stable")]


def _places(cache: Cache, samples: np.ndarray) -> np.ndarray:
    """int64: where each stands, of several caches' samples one cache after the other."""
    if not isinstance(cache, Joined):
        return cache.grid.positions(samples)
    whose, places = np.searchsorted(cache.starts, samples, "right") - 1, np.empty(len(samples), np.int64)
    for number, one in enumerate(cache.members):
        here = whose == number
        places[here] = cache.starts[number] + one.grid.positions(samples[here] - cache.starts[number])
    return places
