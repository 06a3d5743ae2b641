"""The bases of images, of targets whose views share something: where they lie, in a cache and while it is being built.

In a cache they are constants, ``anchors/NUMBER/FIELD`` ``(samples, …)``, in the order of positions. While their part is
being built, each block's lie in a hidden file of their own, which is there before any receipt of its views: so views that
come later are encoded against the same base, whoever computes them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from softcache import spec
from softcache.arrays import constant
from softcache.block import Block
from softcache.codecs import Fields
from softcache.parts import Part
from softcache.store import ANCHORS, Store
from softcache.zarrfile import Array, map_plain

if TYPE_CHECKING:
    from softcache.cache import Cache

_HELD = 4  # blocks whose bases are kept mapped


def constants(part: Part) -> dict[str, dict[str, Array]]:
    """The constants that hold a part's bases: target → field → array. None of a part that takes them from an earlier one."""
    return {
        name: {
            f.name: constant(
                part.constant(f"anchors/{number}/{f.name}"), (part.grid.samples, *f.shape), f.dtype
            )
            for f in target.shared
        }
        for number, (name, target) in enumerate(part.targets.items())
        if target.shared and not part.grid.first
    }


def digest(bases: Fields) -> str:
    """sha256 of some bases, field after field by name: a receipt says what its views were encoded against."""
    return spec.digest(b"".join(bases[field].tobytes() for field in sorted(bases)))


class Bases:
    """Those that a part's views are encoded against.

    Attributes:
        views: how many first views they are made of, and so are computed together; 0 where there is nothing to make.
    """

    def __init__(self, store: Store, part: Part, cache: Cache | None = None):
        """``cache``: holds them, where none are to be made."""
        self._store, self._part, self._cache = store, part, cache
        self.names = tuple(name for name, target in part.targets.items() if target.shared)
        self.made = constants(part)
        first = [target.anchored.views for name in self.made if (target := part.targets[name]).anchored]
        self.views = max(first, default=0)
        self._held: dict[int, dict[str, Fields]] = {}
        self._digests: dict[int, dict[str, str]] = {}

    def there(self, index: int) -> bool:
        """Are the bases of the blocks of this index made?"""
        return not self.views or self._cache is not None or self._store.exists(self._files.file(index))

    def where(self, index: int) -> Path:
        """The hidden file of the bases of the blocks of this index."""
        return self._store.path(self._files.file(index))

    def put(self, index: int, bases: Mapping[str, Fields]) -> None:
        """Keep the bases of a block's samples, durably."""
        rows = np.zeros(len(next(iter(next(iter(bases.values())).values()))), self._record)
        for name, fields in bases.items():
            for field, values in fields.items():
                rows[name][field] = values
        data = self._files.encode(rows.view(np.uint8).reshape(len(rows), -1))
        self._store.put(self._files.file(index), data)

    def of(self, block: Block) -> dict[str, Fields]:
        """The bases of a block's samples, by target."""
        held = self._held.get(block.index)
        if held is None:
            held = self._held[block.index] = self._read(block)
            for old in list(self._held)[:-_HELD]:
                del self._held[old]
        return held

    def _read(self, block: Block) -> dict[str, Fields]:
        name = self._files.file(block.index) if self.made else ""
        if self._cache is None or (name and self._store.exists(name)):
            found = map_plain(self.where(block.index), self._files)[: block.rows]
            rows = found.reshape(-1).view(self._record)
            return {name: {f: rows[name][f] for f in arrays} for name, arrays in self.made.items()}
        positions = np.arange(block.start, block.start + block.rows)
        return {name: self._cache.beside(name, positions) for name in self.names}

    def digests(self, block: Block) -> dict[str, str]:
        """:func:`digest` of each target's, of a block's samples."""
        if block.index not in self._digests:
            found = self.of(block) if self.names else {}
            self._digests[block.index] = {name: digest(bases) for name, bases in found.items()}
        return self._digests[block.index]

    def pieces(self, name: str, field: str) -> Iterator[np.ndarray]:
        """A field of all samples, block after block."""
        for index in range(self._part.grid.blocks_per_view):
            yield self.of(self._part.grid.block(0, index))[name][field]

    def drop(self) -> None:
        """Remove the hidden files, once the cache holds what is in them."""
        shutil.rmtree(self._store.path(ANCHORS), ignore_errors=True)

    @cached_property
    def _record(self) -> np.dtype:
        return np.dtype(
            [
                (name, [(f, a.dtype, a.shape[1:]) for f, a in fields.items()])
                for name, fields in self.made.items()
            ]
        )

    @cached_property
    def _files(self) -> Array:
        """One a block; named after the part's identity, so that those of a build that was given up are never taken."""
        grid, size = self._part.grid, self._record.itemsize
        shape = grid.blocks_per_view * grid.block_rows, size
        folder = f"{ANCHORS}/{self._part.identity.digest[:32]}"
        return Array(folder, "uint8", shape, (grid.block_rows, size), ("sample", "byte"), lead=1)
