"""How an epoch is shuffled: globally where what it reads fits in memory, else block by block.

Rows lie in the order of a keyed permutation (docs/format.md), so every block is already a random sample of the dataset.
An epoch that goes through them block-wise takes the blocks in an order of its own and shuffles the rows of a few of them
with one another: whoever reads it opens a few files at a time, and reads each once. How well that mixes is measured by
``tools/shuffle_quality.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from softcache import reader
from softcache.cache import Cache
from softcache.errors import SpecError, nearest
from softcache.keyed import Key, Permutation
from softcache.several import Joined

SHUFFLES = ("auto", "global", "blocks")
TOGETHER = 16  # blocks whose rows are shuffled with one another


@dataclass(frozen=True)
class Blocks:
    """A shuffle of ``0 … count-1`` that leaves near what is near: a pure function, with no array of them.

    The numbers are cut into blocks of ``rows``, the last one perhaps shorter. Blocks come in a keyed order, and the rows
    of every ``together`` of that order are shuffled with one another.
    """

    rows: int
    together: int = TOGETHER

    def inverse(self, count: int, places: np.ndarray, *keys: Key) -> np.ndarray:
        """int64: which numbers come at these places (int64, ``0 … count-1``), by the keys."""
        blocks = -(-count // self.rows)
        order = Permutation(blocks, "blocks", *keys)
        missing = blocks * self.rows - count  # rows that the last block is short of
        short = int(order.forward(np.array(blocks - 1)))  # where it comes

        def start(place: np.ndarray) -> np.ndarray:
            """The first row of the block that comes there; of the one after the last, all rows."""
            return place * self.rows - missing * (place > short)

        width = self.together * self.rows
        after = int(start(np.array((short // self.together + 1) * self.together)))
        windows = (places + missing * (places >= after)) // width
        shuffled = np.empty_like(places)
        for window in np.unique(windows).tolist():
            here = windows == window
            first, last = start(np.array([window * self.together, (window + 1) * self.together])).tolist()
            within = Permutation(min(last, count) - first, "window", *keys, window)
            shuffled[here] = first + within.inverse(places[here] - first)
        block = (shuffled + missing * (shuffled >= int(start(np.array(short + 1))))) // self.rows
        return order.inverse(block) * self.rows + shuffled - start(block)


def choose(cache: Cache, count: int, targets: Iterable[str], views: int, wanted: str) -> Blocks | None:
    """How epochs of ``count`` samples in ``views`` views each, reading these targets, are shuffled; None for globally.

    ``auto`` is a function of the cache and of these alone, so that it is the same on every machine.
    Raises :class:`SpecError` for a word that is none of :data:`SHUFFLES`.
    """
    if wanted not in SHUFFLES:
        raise SpecError(f"shuffle={wanted!r}{nearest(str(wanted), SHUFFLES)}: one of {', '.join(SHUFFLES)}")
    row = sum(cache.targets[name].row_bytes for name in targets)
    row += sum(array.row_bytes for path, array in cache.arrays.items() if path.startswith("view/"))
    if wanted == "global" or (wanted == "auto" and row * count * views <= reader.SLAB_BYTES):
        return None
    grid = cache.members[0].grid if isinstance(cache, Joined) else cache.grid
    return Blocks(max(1, min(grid.block_rows, reader.SLAB_BYTES // (TOGETHER * max(row, 1)))))
