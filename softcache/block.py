"""The grid of a cache: which samples stand where, and which rows make a block.

Along the sample axis samples follow one keyed permutation, so that reading front to back is already a shuffled
stream. A *sample* is an index into ``cache.ids`` (source order), a *position* its place on the sample axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from softcache.keyed import Permutation

_REMEMBERED = 1 << 24  # samples up to which the permutation is kept as an array (64 MiB)
_PIECE = 1 << 18  # made at a time


@dataclass(frozen=True, order=True)
class Block:
    """Rows ``start … start+rows-1`` (positions) of one view."""

    view: int
    index: int
    start: int
    rows: int

    @property
    def name(self) -> str:
        return f"v{self.view:04d}-b{self.index:06d}"


@dataclass(frozen=True)
class Grid:
    """``samples × views`` rows, cut along the sample axis every ``block_rows``; ``key`` keys the permutation.

    Blocks are of the views from ``first`` on.
    """

    samples: int
    views: int
    block_rows: int
    key: int
    first: int = 0

    @property
    def blocks_per_view(self) -> int:
        return -(-self.samples // self.block_rows)

    def block(self, view: int, index: int) -> Block:
        start = index * self.block_rows
        return Block(view, index, start, min(self.block_rows, self.samples - start))

    def blocks(self) -> Iterator[Block]:
        """The blocks, view by view: the canonical order."""
        for view in range(self.first, self.views):
            for index in range(self.blocks_per_view):
                yield self.block(view, index)

    @cached_property
    def permutation(self) -> Permutation:
        return Permutation(self.samples, "samples", self.key)

    @cached_property
    def _positions(self) -> np.ndarray:
        found = np.empty(self.samples, np.uint32)
        for start in range(0, self.samples, _PIECE):
            stop = min(start + _PIECE, self.samples)
            found[start:stop] = self.permutation.forward(np.arange(start, stop))
        return found

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """Where these samples stand, int64."""
        if self.samples <= _REMEMBERED:
            return self._positions[samples].astype(np.int64)
        return self.permutation.forward(samples)

    def samples_of(self, block: Block) -> np.ndarray:
        """The samples of a block, in the order of its rows, int64."""
        return self.permutation.inverse(np.arange(block.start, block.start + block.rows))
