"""What stands in the tars of a cache: names, order, types and sizes of members, all of which follow from its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from softcache import manifest as m
from softcache import shown
from softcache.block import Block
from softcache.ustar import npy_header

if TYPE_CHECKING:
    from softcache.cache import Cache

IMAGES = ("jpg", "png", "webp", "gif", "bmp", "tif", "ppm")
# bytes of a source's image, of what is told of a sample, and of any member: what a stranger's tar can make us hold
MOST_IMAGE, MOST_SAMPLE, MOST = 1 << 28, 1 << 20, 1 << 31
_PLAIN_NAME = 48

Embed = Literal["nothing", "images", "views"]


@dataclass(frozen=True)
class Member:
    """A member of a tar, before it is looked at.

    Attributes:
        name: in the tar; of an ``image`` without its extension, which is in the index.
        kind: ``receipt``, ``ids``, ``array``, ``label``, ``shown``, ``image``, ``pixels`` or ``sample``.
        head: what it begins with (of an ``.npy`` file).
        size: in bytes; None where only a bound, ``most``, is known.
        of: the name of its file in the cache (``receipt``), path of its array (``array``), or name of its rows.
        dtype, shape: of the values behind the head.
        row: inside the block; of ``image``, ``pixels`` and ``sample``.
    """

    name: str
    kind: str
    most: int
    head: bytes = b""
    size: int | None = None
    of: str = ""
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()
    row: int = -1

    def named(self, kind: int) -> str:
        """The whole name; ``kind`` is that of an image, an index into :data:`IMAGES`."""
        return f"{self.name}.{IMAGES[kind]}" if self.kind == "image" else self.name

    def values(self, data: bytes | memoryview) -> np.ndarray:
        """The values of an ``.npy`` member, read-only."""
        body = memoryview(data)[len(self.head) :]
        return np.frombuffer(body, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)


def plain_names(paths: list[str]) -> dict[str, str]:
    """What arrays are called inside a tar: without dots and slashes, short, each another."""
    found: dict[str, str] = {}
    for number, path in enumerate(paths):
        plain = path.replace("/", "-").replace(".", "_")
        taken = len(plain) > _PLAIN_NAME or plain in found.values()
        found[path] = f"array-{number:04d}" if taken else plain
    return found


class Contents:
    """What stands in the tar of each block of a cache, in order."""

    def __init__(self, cache: Cache, embed: Embed):
        self._cache, self.embed = cache, embed
        self.names = plain_names(list(cache.arrays))
        self.size: tuple[int, int] = tuple(cache.identity["teacher"]["input_spec"]["size"])
        self._invalid = np.sort(cache.grid.positions(cache.invalid))

    def receipts(self, block: Block) -> dict[str, str]:
        """Name in the tar → file of the cache."""
        parts = [p for p in self._cache.parts if p.grid.first <= block.view < p.grid.views]
        return {
            f"{block.name}.receipt{f'-{p.number}' if p.number else ''}.json": p.receipt(block) for p in parts
        }

    def rows(self, block: Block) -> np.ndarray:
        """The block's valid rows, int64."""
        first, last = np.searchsorted(self._invalid, (block.start, block.start + block.rows))
        return np.setdiff1d(np.arange(block.rows), self._invalid[first:last] - block.start)

    def shown(self, rows: int) -> dict[str, np.ndarray]:
        """Room for what embedded views are shown with, by name, zeros: see :mod:`softcache.shown`."""
        cache = self._cache
        if not (cache.mixed or cache.tiled):
            return {}
        room = shown.room(rows, cache.parameters, cache.mixed, cache.tiled)
        return {name: numbers for name, numbers in room.items() if f"view/{name}" not in cache.arrays}

    def count(self, block: Block) -> int:
        """How many members there are."""
        return len(list(self._of_block(block))) + 2 * len(self.rows(block)) * (self.embed != "nothing")

    def members(self, block: Block) -> Iterator[Member]:
        yield from self._of_block(block)
        if self.embed == "nothing":
            return
        for row in self.rows(block).tolist():
            of = f"{block.name}-r{row:08d}"
            if self.embed == "images":
                yield Member(of, "image", MOST_IMAGE, row=row)
            else:
                yield _npy(f"{of}.pixels.npy", "pixels", "pixels", "uint8", (*self.size, 3), row)
            yield Member(f"{of}.json", "sample", MOST_SAMPLE, row=row)

    def _of_block(self, block: Block) -> Iterator[Member]:
        key, n, cache = block.name, block.rows, self._cache
        for name, of in self.receipts(block).items():
            yield Member(name, "receipt", m.MAX_JSON, of=of)
        characters = cache.constants["ids/bytes"].bytes
        yield Member(f"{key}.ids.json", "ids", 6 * characters + 3 * n + 3)
        for path, array in cache.arrays.items():
            yield _npy(f"{key}.{self.names[path]}.npy", "array", path, array.dtype, (n, *array.row))
        if self.embed == "nothing":
            return
        for of in ("label", "partner_label") if cache.mixed else ("label",):
            yield _npy(f"{key}.{of}.npy", "label", of, "int64", (n,))
        for of, room in self.shown(n).items():
            yield _npy(f"{key}.shown-{of}.npy", "shown", of, room.dtype.name, room.shape)


def _npy(name: str, kind: str, of: str, dtype: str, shape: tuple[int, ...], row: int = -1) -> Member:
    head = npy_header(dtype, shape)
    size = len(head) + prod(shape) * np.dtype(dtype).itemsize
    return Member(name, kind, size, head, size, of, dtype, shape, row)
