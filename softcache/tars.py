"""A cache whose blocks lie in tars: what stands where, read at random or from front to back.

An export is a cache without its shards and receipts, with one tar a block instead and, beside it, an index: digest and
size of the tar, and place, size and digest of every member. ``tars.bin`` holds the digests of tars and indexes, and
``tars.json`` that of ``tars.bin``. Names, order and sizes of members follow from the cache's manifest, so nothing of a tar
is believed: its headers are compared with those that belong there (:mod:`softcache.ustar`), its members with their
digests.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from softcache import manifest as m
from softcache import spec
from softcache.block import Block, Grid
from softcache.errors import DamageError, MismatchError, SoftcacheError
from softcache.members import IMAGES, MOST, Contents, Embed, Member
from softcache.store import Store
from softcache.ustar import BLOCK, END, header, padding
from softcache.zarrfile import Array, map_file, require_whole

if TYPE_CHECKING:
    from softcache.cache import Cache

NAME, TABLE, FOLDER = "tars.json", "tars.bin", "tars"
VERSION = (1, 0)
PLACE = np.dtype([("offset", "<u8"), ("bytes", "<u8"), ("sha256", "V32"), ("kind", "u1")])
HEAD = np.dtype([("tar", m.ENTRY), ("of", "V32")])
PAIR = np.dtype([("tar", m.ENTRY), ("index", m.ENTRY)])
_PIECE = 1 << 20
HINT = "take it from where the export came from again, or export again"


class Manifest(m._Signed):
    """``tars.json``: which cache this is an export of, what is embedded, and the table of its tars."""

    format: Literal["softcache-tars"]
    version: tuple[int, int]
    cache: m.Sha
    embed: Embed
    table: m.Entry


def file(block: Block) -> str:
    """The tar of a block; its index is called ``.index``."""
    return f"{FOLDER}/{block.name}.tar"


def index_file(block: Block) -> str:
    return f"{FOLDER}/{block.name}.index"


def names(grid: Grid) -> set[str]:
    """Every file that an export has beside those of its cache."""
    blocks = list(grid.blocks())
    return {NAME, TABLE, *map(file, blocks), *map(index_file, blocks)}


class Tars:
    """The tars of an export, of which its cache reads its rows. Safe to use from threads, and after a fork.

    Raises :class:`DamageError` for an export that is not what was written, :class:`MismatchError` for a newer one.
    """

    def __init__(self, store: Store, cache: Cache):
        self._store, self._cache = store, cache
        where = str(store.path(NAME))
        raw = store.get(NAME, m.MAX_JSON)
        self.manifest = manifest = m.read(Manifest, raw, where, HINT)
        if not manifest.stands_for(raw):
            raise DamageError(f"{where} was edited: its digest does not match its content; {HINT}")
        if manifest.version > VERSION:
            raise MismatchError(
                f"{where} has version {manifest.version}; this softcache reads {VERSION}: upgrade it"
            )
        if manifest.cache != cache.digest:
            raise DamageError(
                f"{where} is of the cache {manifest.cache}, and beside it is {cache.digest}; {HINT}"
            )
        self.contents = Contents(cache, manifest.embed)
        self._numbers = {path: i for i, path in enumerate(cache.arrays)}
        self._held: tuple[Block, np.ndarray] | None = None

    @property
    def digest(self) -> str:
        """The export's name: the sha256 of ``tars.json`` without it."""
        return self.manifest.digest

    @cached_property
    def table(self) -> np.ndarray:
        """Digest and size of every tar and every index, :data:`PAIR`, blocks in canonical order."""
        blocks = self._cache.views * self._cache.grid.blocks_per_view
        data = self._store.get(TABLE, min(blocks * PAIR.itemsize, m.MAX_TABLE))
        if len(data) != blocks * PAIR.itemsize or spec.digest(data) != self.manifest.table.sha256:
            raise DamageError(f"{self._store.path(TABLE)} is not the table that {NAME} names; {HINT}")
        return np.frombuffer(data, PAIR)

    def entry(self, block: Block) -> Any:
        """The row of :attr:`table` of a block."""
        return self.table[block.view * self._cache.grid.blocks_per_view + block.index]

    def members(self, block: Block) -> list[tuple[Member, Any]]:
        """The members of a block's tar, each with its place (:data:`PLACE`). :class:`DamageError` for a wrong index."""
        where, places = self._store.path(index_file(block)), self._places(block)
        expected, found, at = self.contents.members(block), [], 0
        for member, place in zip(expected, places, strict=False):
            size = int(place["bytes"])
            if int(place["offset"]) != at + BLOCK or place["kind"] >= len(IMAGES) or _misfits(member, size):
                raise DamageError(
                    f"{where}: its entry of {member.name} is not what the manifest implies; {HINT}"
                )
            at += BLOCK + size + padding(size)
            found.append((member, place))
        more = len(found) < len(places) or next(expected, None) is not None
        if more or at + len(END) != int(self.entry(block)["tar"]["bytes"]):
            raise DamageError(f"{where} does not name the members that the manifest implies; {HINT}")
        return found

    def _places(self, block: Block) -> np.ndarray:
        """An index, which is the one that the table names; that of the block that was asked for last is kept."""
        held = self._held
        if held is not None and held[0] == block:
            return held[1]
        entry, name = self.entry(block), index_file(block)
        most = HEAD.itemsize + PLACE.itemsize * self.contents.count(block)
        data, where = self._store.get(name, most), self._store.path(name)
        if bytes(entry["index"]["sha256"]) != hashlib.sha256(data).digest():
            raise DamageError(f"{where} is not the index that {TABLE} names; {HINT}")
        if len(data) < HEAD.itemsize or (len(data) - HEAD.itemsize) % PLACE.itemsize:
            raise DamageError(f"{where} is no index of a tar; {HINT}")
        head, places = np.frombuffer(data, HEAD, 1)[0], np.frombuffer(data, PLACE, offset=HEAD.itemsize)
        if head["tar"] != entry["tar"]:
            raise DamageError(f"{where} is the index of another tar; {HINT}")
        self._held = block, places
        return places

    def open(self, array: Array, block: Block) -> Any:
        """The rows of one array in one block, mapped: see :class:`softcache.reader.Shards`. Their digest is checked now,
        once."""
        path, places = self._store.path(file(block)), self._places(block)
        number = len(self.contents.receipts(block)) + 1 + self._numbers[array.path]
        member = next(islice(self.contents.members(block), number, None))
        data = map_file(path)
        if number >= len(places) or len(data) != int(self.entry(block)["tar"]["bytes"]):
            raise DamageError(f"{path} was cut, or something was added; {HINT}")
        start, size = int(places[number]["offset"]), int(places[number]["bytes"])
        if not BLOCK <= start <= len(data) - size or _misfits(member, size):
            raise DamageError(f"{path}: {member.name} is not where it can be; {HINT}")
        content = data[start : start + size]
        _check_header(path, member, places[number], bytes(data[start - BLOCK : start]))
        _check_content(path, member, places[number], content)
        return _Rows(path, data, member.values(content))

    def walk(
        self, block: Block, tar: IO[bytes], wanted: Callable[[Member], bool] = lambda member: True
    ) -> Iterator[tuple[Member, bytes]]:
        """The wanted members of a block, read from front to back from its tar, each once it is known to be whole.

        What is not wanted is passed over unread where ``tar`` can seek, and not checked.
        """
        where, passed = f"{self._cache.path}/{file(block)}", 0
        for member, place in self.members(block):
            size = int(place["bytes"])
            if not wanted(member):
                passed += BLOCK + size + padding(size)
                continue
            _pass_over(tar, passed, where)
            passed = 0
            found = _exactly(tar, BLOCK, where)
            _check_header(where, member, place, found)
            content = _exactly(tar, size, where)
            _check_content(where, member, place, content)
            if _exactly(tar, padding(size), where).strip(b"\0"):
                raise DamageError(f"{where}: something stands behind {member.named(place['kind'])}; {HINT}")
            yield member, content
        if not passed and (_exactly(tar, len(END), where) != END or tar.read(1)):
            raise DamageError(f"{where} does not end where it should; {HINT}")

    def problems(self, whole: Mapping[str, m.Entry] | None) -> Iterator[tuple[str, str]]:
        """(file, what is wrong with it) of the tables, tars and indexes.

        With ``whole``, digest and size of every shard and receipt of the cache by name, every byte is read and compared
        with what the cache's own manifest says; without, sizes are.
        """
        try:
            _ = self.table
        except DamageError as e:
            yield TABLE, str(e)
            return
        for block in self._cache.grid.blocks():
            size, should = self._store.size(file(block)), int(self.entry(block)["tar"]["bytes"])
            if size != should:
                yield file(block), ("is missing" if size is None else f"has {size:,} bytes, not {should:,}")
                continue
            try:
                self.members(block)
            except DamageError as e:
                yield index_file(block), str(e)
                continue
            try:
                if whole is not None:
                    self._read_all(block, whole)
            except SoftcacheError as e:
                yield file(block), str(e)

    def _read_all(self, block: Block, whole: Mapping[str, m.Entry]) -> None:
        name = file(block)
        with self._store.stream(name) as tar:
            for member, content in self.walk(block, tar):
                if member.kind in ("array", "receipt"):
                    with contextlib.suppress(
                        MismatchError
                    ):  # whole as the export knows it, which is all to be known
                        self.as_cached(block, member, content, whole)
        if self._store.digest(name) != bytes(self.entry(block)["tar"]["sha256"]).hex():
            raise DamageError(f"{self._store.path(name)} is not the tar that {TABLE} names; {HINT}")

    def as_cached(
        self, block: Block, member: Member, content: bytes, whole: Mapping[str, m.Entry]
    ) -> tuple[str, bytes]:
        """Name and bytes of the cache's own file that an array or a receipt is, as the cache's manifest knows it.

        ``whole`` as for :meth:`problems`. Raises :class:`DamageError` where it is not, and :class:`MismatchError`
        where that may be because rows are compressed otherwise by this zstd.
        """
        name, data = member.of, content
        if member.kind == "array":
            array = self._cache.arrays[member.of]
            name, data = array.file(block.view, block.index), array.encode(member.values(content))
        if spec.digest(data) == whole[name].sha256:
            return name, data
        where = f"{self._cache.path}/{file(block)}: {member.name}"
        import numcodecs

        ours, theirs = numcodecs.__version__, self._cache.identity["libraries"].get("numcodecs")
        if member.kind == "array" and self._cache.arrays[member.of].big and ours != theirs:
            raise MismatchError(
                f"{where} is compressed otherwise by numcodecs {ours} than by {theirs}, which wrote the cache: install "
                "that one; softcache.open reads the export as it is"
            )
        raise DamageError(f"{where} is not what the cache's own manifest says of {name}; {HINT}")


class _Rows:
    """Rows of a mapped member, read as those of a shard are."""

    def __init__(self, path: Path, data: memoryview, rows: np.ndarray):
        self._path, self._data, self._rows = path, data, rows

    def read(self, row: int, out: np.ndarray) -> None:
        out[...] = self.rows()[row]

    def rows(self) -> np.ndarray:
        require_whole(self._data, self._path)
        return self._rows

    def all(self) -> np.ndarray:
        return self.rows().copy()


def _misfits(member: Member, size: int) -> bool:
    return size > min(member.most, MOST) or member.size not in (None, size)


def _check_header(path: Path | str, member: Member, place: Any, found: bytes) -> None:
    name = member.named(place["kind"])
    if found != header(name, int(place["bytes"])):
        raise DamageError(
            f"{path}: at byte {int(place['offset']) - BLOCK:,} there is not the plain file {name} that belongs there; {HINT}"
        )


def _check_content(path: Path | str, member: Member, place: Any, content: bytes | memoryview) -> None:
    if hashlib.sha256(content).digest() != bytes(place["sha256"]):
        raise DamageError(
            f"{path}: {member.named(place['kind'])} is not what was written (sha256 differs); {HINT}"
        )
    if bytes(content[: len(member.head)]) != member.head:
        raise DamageError(
            f"{path}: {member.named(place['kind'])} does not begin as {member.dtype} {member.shape}; {HINT}"
        )


def _exactly(tar: IO[bytes], size: int, where: str) -> bytes:
    parts, left = [], size
    while left:
        part = tar.read(min(left, _PIECE) if size > _PIECE else left)
        if not part:
            raise DamageError(f"{where} is cut; {HINT}")
        parts.append(bytes(part))
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _pass_over(tar: IO[bytes], size: int, where: str) -> None:
    if (
        size > _PIECE and tar.seekable()
    ):  # a short way is sooner read, where each seek is a request to a server
        tar.seek(size, 1)
        return
    while size:
        part = tar.read(min(size, _PIECE))
        if not part:
            raise DamageError(f"{where} is cut; {HINT}")
        size -= len(part)
