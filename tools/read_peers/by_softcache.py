"""softcache: the caches that ``records`` built, through what ``softcache.open`` gives.

*Stored* are the fields of rows, by sample, as ``cache.reader`` gathers them; *decoded* is what ``cache.read`` makes of them:
int64 classes and float32 logits, float32 maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numcodecs import zstd as codec  # pyright: ignore[reportAttributeAccessIssue]

import softcache as sc
from read_peers import Case, Rows, Ways
from read_peers.timing import Side, two_threads
from softcache.block import Grid
from softcache.manifest import Entry
from softcache.store import Disk, Store
from softcache.zarrfile import Array

ZSTD = True
_BLOCK = 64 << 20


class _Hasty(Disk):
    """Leaves what it writes to the page cache, as np.save does."""

    def sync_file(self, fd: int, path: Path) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


def _write(arrays: Mapping[str, np.ndarray], store: Store, zstd: bool) -> None:
    """As a build commits its blocks: encode, digest, put."""
    for name, values in arrays.items():
        row = values.shape[1:]
        block = max(1, _BLOCK // values[0].nbytes)
        grid = Grid(len(values), 1, min(block, len(values)), 0)
        array = Array(
            f"targets/{name}/value",
            values.dtype.name,
            (1, len(values), *row),
            (1, grid.block_rows, *row),
            ("view", "sample", *(f"axis_{i}" for i in range(len(row)))),
            plain=not zstd,
        )
        for one in grid.blocks():
            data = array.encode(values[one.start : one.start + one.rows])
            Entry.of(data)
            store.put(array.file(0, one.index), data)


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    _write(arrays, Store(folder), zstd)


def write_hastily(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    _write(arrays, Store(folder, _Hasty()), zstd)


WRITES = {"write": write, "write, no fsync": write_hastily}


def encoder(values: np.ndarray) -> Side:
    """zstd alone on these rows, two threads."""
    rows = [np.ascontiguousarray(row).reshape(-1).view(np.uint8) for row in values]

    def work(i: int) -> int:
        for row in rows[i::2]:
            codec.compress(row, 1)
        return len(rows[i::2])

    return two_threads(work)


def _decoder(cache: sc.Cache, target: str, case: Case) -> Side:
    """zstd alone on frames that are in memory, two threads, a buffer of a batch each."""
    array = cache.arrays[f"targets/{target}/value"]
    rows = cache.reader.fields(f"targets/{target}", 0, np.arange(min(cache.samples, 256)))["value"]
    frames = [bytes(codec.compress(row.reshape(-1).view(np.uint8), 1)) for row in rows]
    outs = [np.empty((case.batch, array.row_bytes), np.uint8) for _ in range(2)]

    def work(i: int) -> int:
        for place, frame in enumerate(frames[i::2]):
            codec.decompress(frame, outs[i][place % case.batch])
        return len(frames[i::2])

    return two_threads(work)


def _stored(cache: sc.Cache, target: str, slab: bool = True) -> Callable[[np.ndarray], Rows]:
    def take(rows: np.ndarray) -> Rows:
        positions = cache.grid.positions(rows)
        return list(cache.reader.fields(f"targets/{target}", 0, positions, slab).values())

    return take


def _decoded(cache: sc.Cache, target: str) -> Callable[[np.ndarray], Rows]:
    return lambda rows: [cache.read(0, rows, target)[target]]


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    if case.name == "rows":
        one, many = sc.open(folder.parent / "rows"), sc.open(folder.parent / "rows-many")
        takes = {
            "stored, one file": _stored(one, "logits"),
            f"stored, {many.grid.blocks_per_view} files": _stored(many, "logits"),
            "stored, one file, no slab": _stored(one, "logits", slab=False),
            f"stored, {many.grid.blocks_per_view} files, no slab": _stored(many, "logits", slab=False),
            "decoded, one file": _decoded(one, "logits"),
        }

        def whole(fields: Rows) -> Rows:
            index, step, tail, value = fields
            return [index, np.concatenate([step.view(np.uint16)[:, None], tail, value], axis=1)]

        yield Ways(takes, whole=whole, inexact=frozenset({"decoded, one file"}))
        return
    cache = sc.open(folder.parent / ("small" if case.name == "small" else "maps"))
    target = {"maps": "plain", "zstd": "packed", "small": "small"}[case.name]
    disk = cache.grid.permutation.inverse(np.arange(cache.samples))
    takes = {"stored": _stored(cache, target), "decoded": _decoded(cache, target)}
    references = {"zstd alone, 2 threads": _decoder(cache, target, case)} if case.zstd else {}
    yield Ways(takes, references=references, disk=disk, inexact=frozenset({"decoded"}))
