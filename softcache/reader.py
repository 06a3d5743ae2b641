"""Stored fields of rows, gathered from the files of a cache as fast as memory allows.

Why our own: shuffled rows cost zarr-python about 100 µs each (docs/benchmarks.md). Here small fields of a target are
interleaved once a view into one record a row, so that a shuffled batch is one ``np.take``; big fields are decoded by
threads, or copied where they are plain, row by row, into a buffer that is used again.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from softcache.block import Block, Grid
from softcache.codecs import Fields
from softcache.errors import StoreError
from softcache.store import Store
from softcache.zarrfile import BIG_ROW, Array, Plain, Sharded

SLAB_BYTES = 1 << 30  # of all records in memory; those that find no room are gathered file by file
_STALE = 64  # reads after which a view's records make room for others
_OPEN_FILES = 4096  # at most; and no more than a quarter of what the process may open
_KEPT_FILES = 64  # are kept open, however large their indices
_THREADS = 2
_THREADED_BYTES = 1 << 17  # below this, handing rows to threads costs more than decoding them


class _Group:
    """The arrays below one path: a target's fields."""

    def __init__(self, arrays: dict[str, Array]):
        self.big = {f: a for f, a in arrays.items() if a.big}
        self.wide = {f: a for f, a in arrays.items() if not a.big and a.row_bytes >= BIG_ROW}
        self.small = {f: a for f, a in arrays.items() if a.row_bytes < BIG_ROW}
        self.record = np.dtype([(f, a.dtype, a.row) for f, a in self.small.items()])


class Shards(Protocol):
    """Where the rows of an array in one block lie."""

    def open(self, array: Array, block: Block) -> Any:
        """They: with the methods of :class:`~softcache.zarrfile.Plain`, or of :class:`~softcache.zarrfile.Sharded` where
        rows are big."""
        ...


class Files:
    """In a file of their own, as in the folder of a cache."""

    def __init__(self, store: Store):
        self._store = store

    def open(self, array: Array, block: Block) -> Any:
        path = self._store.path(array.file(block.view, block.index))
        return Sharded(path, array) if array.big else Plain(path, array)


class Reader:
    """Reads rows of the arrays of one cache. Safe to use from threads, and after a fork.

    ``shards`` says where they lie. ``before_open`` is called with a block before a file of it is first touched; it raises
    where the file must not be.
    """

    def __init__(self, shards: Shards, grid: Grid, arrays: list[Array], before_open: Callable[[Block], Any]):
        self.shards, self._grid, self._before_open = shards, grid, before_open
        groups: dict[str, dict[str, Array]] = {}
        for array in arrays:
            group, _, field = array.path.rpartition("/")
            groups.setdefault(group, {})[field] = array
        self._groups = {path: _Group(fields) for path, fields in groups.items()}
        self._files: dict[tuple[str, int, int], Any] = {}
        self._slabs: dict[tuple[str, int], tuple[np.ndarray, int]] = {}  # and at which read they were used
        self._reads = 0
        self._local = threading.local()
        self._pools: tuple[int, ThreadPoolExecutor] | None = None

    def fields(self, path: str, view: int, positions: np.ndarray, slab: bool = True) -> Fields:
        """The fields below ``path`` (``targets/logits``, ``view``) at some positions of a view.

        With ``slab`` the whole view's small fields are kept in memory, up to :data:`SLAB_BYTES` of all views. Big fields lie
        in a buffer that the next call of this thread uses again: decode them before that.
        """
        group = self._groups[path]
        found: Fields = {f: self._big(a, view, positions) for f, a in group.big.items()}
        found |= {f: self._wide(a, view, positions) for f, a in group.wide.items()}
        if group.small:
            whole = self._slab(path, view) if slab else None
            rows = self._scattered(path, view, positions) if whole is None else whole.take(positions)
            found |= {f: rows[f] for f in group.small}
        return found

    def _slab(self, path: str, view: int) -> np.ndarray | None:
        """The records of a whole view, which stay in memory; None as long as what is there leaves no room for them."""
        self._reads += 1
        held, _ = self._slabs.get((path, view), (None, 0))
        if held is None:
            if not self._make_room(self._grid.samples * self._groups[path].record.itemsize):
                return None
            held = self._whole(path, view)
        self._slabs[path, view] = held, self._reads
        return held

    def _make_room(self, size: int) -> bool:
        """Let go of what was not read for a while, if that is enough; else two that are read in turns would come again
        and again."""
        over = size - SLAB_BYTES + sum(held.nbytes for held, _ in list(self._slabs.values()))
        stale = []
        for key, (held, read) in sorted(self._slabs.items(), key=lambda one: one[1][1]):
            if over > 0 and self._reads - read > _STALE:
                stale.append(key)
                over -= held.nbytes
        for key in stale if over <= 0 else ():
            self._slabs.pop(key, None)
        return over <= 0

    def _whole(self, path: str, view: int) -> np.ndarray:
        """The records of a view, block after block."""
        group, grid = self._groups[path], self._grid
        for array in group.small.values():  # both ends must be there before there is room for all between
            for index in (0, grid.blocks_per_view - 1):
                self._open(array, grid.block(view, index))
        out = np.empty(grid.samples, group.record)
        for index in range(grid.blocks_per_view):
            block = grid.block(view, index)
            for field, array in group.small.items():
                rows = self._open(array, block).all()
                out[field][block.start : block.start + block.rows] = rows[: block.rows]
        return out

    def _scattered(self, path: str, view: int, positions: np.ndarray) -> np.ndarray:
        """Records gathered file by file."""
        group = self._groups[path]
        out = np.empty(len(positions), group.record)
        for index, here, rows in self._by_block(positions):
            for field, array in group.small.items():
                out[field][here] = self._file(array, view, index).rows()[rows]
        return out

    def _by_block(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(block index, places in ``positions``, rows inside the block) for each block touched."""
        blocks, rows = np.divmod(positions, self._grid.block_rows)
        order = np.argsort(blocks, kind="stable")
        cuts = np.flatnonzero(np.diff(blocks[order])) + 1
        for here in np.split(order, cuts):
            if here.size:
                yield int(blocks[here[0]]), here, rows[here]

    def _big(self, array: Array, view: int, positions: np.ndarray) -> np.ndarray:
        found = []  # the files first: what they should hold may be more than there is memory for
        for index, here, rows in self._by_block(positions):
            shard = self._file(array, view, index)
            found += [(shard, int(r), h) for h, r in zip(here, rows, strict=True)]
        out = self._buffer(array, len(positions))
        jobs = [(shard, row, out[h]) for shard, row, h in found]
        if out.nbytes < _THREADED_BYTES:
            _decode(jobs)
        else:
            parts = [jobs[i::_THREADS] for i in range(_THREADS)]
            for done in [self._pool.submit(_decode, part) for part in parts]:
                done.result()
        return out

    def _wide(self, array: Array, view: int, positions: np.ndarray) -> np.ndarray:
        blocks, rows = (part.tolist() for part in np.divmod(positions, self._grid.block_rows))
        files = {index: self._file(array, view, index).rows() for index in dict.fromkeys(blocks)}
        out = self._buffer(array, len(positions))
        for place, index, row in zip(range(len(out)), blocks, rows, strict=True):
            out[place] = files[index][row]
        return out

    def _buffer(self, array: Array, rows: int) -> np.ndarray:
        buffers = self._local.__dict__.setdefault("buffers", {})
        out = buffers.get(array.path)
        if out is None or len(out) < rows:
            try:
                out = buffers[array.path] = np.empty((rows, *array.row), array.dtype)
            except MemoryError:
                raise StoreError(
                    f"{rows:,} rows of {array.path} take {rows * array.row_bytes:,} bytes of memory, more than there is: "
                    "read fewer at a time"
                ) from None
        return out[:rows]

    def _file(self, array: Array, view: int, index: int) -> Any:
        key = (array.path, view, index)
        found = self._files.get(key)
        if found is None:
            found = self._open(array, self._grid.block(view, index))
            if len(self._files) >= self._most:
                for old in list(self._files)[: len(self._files) // 2]:  # no lock: a fork might find it held
                    self._files.pop(old, None)
            self._files[key] = found
        return found

    def _open(self, array: Array, block: Block) -> Any:
        self._before_open(block)
        return self.shards.open(array, block)

    @property
    def _most(self) -> int:
        """How many files are kept open. Plain ones are mapped, which is the system's memory; of others there is an index."""
        index = max((a.fixed_bytes() for g in self._groups.values() for a in g.big.values()), default=1)
        return min(_open_files(), max(_KEPT_FILES, SLAB_BYTES // index))

    def forget(self, key: tuple[str, int, int]) -> None:
        """Let go of the file of (array, view, block), if it is open: it is about to be deleted."""
        self._files.pop(key, None)

    @property
    def _pool(self) -> ThreadPoolExecutor:
        # Threads do not survive a fork: a pool belongs to the process that made it. Two made at once do no harm.
        if self._pools is None or self._pools[0] != os.getpid():
            self._pools = os.getpid(), ThreadPoolExecutor(_THREADS)
        return self._pools[1]


def _open_files() -> int:
    return max(4, min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


def _decode(jobs: list[tuple[Sharded, int, np.ndarray]]) -> None:
    for shard, row, out in jobs:
        shard.read(row, out)
