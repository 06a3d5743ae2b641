"""Rows ↔ files of a Zarr v3 group, with the codecs of the Zarr v3 specification only.

Small rows, and those that are to stay plain: one plain chunk a file (``bytes``, ``crc32c``). Big rows:
``sharding_indexed``, one row an inner chunk (``bytes``, ``zstd`` level 1, ``crc32c``). zarr-python reads both; we write
and read them ourselves (why: docs/design.md). Everything raises :class:`DamageError` on bytes that are not what they
should be.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from softcache.errors import DamageError, SoftcacheError, StoreError
from softcache.spec import canonical_json

BIG_ROW = 4096  # bytes of a row from which it becomes a compressed inner chunk of its own
ZSTD_LEVEL = 1
_CRC = 4
_INDEX = 16  # bytes of a row's entry in the index of a sharded file
_PIECE = 1 << 20
_THREADS = 2  # that compress
_THREADED_BYTES = 1 << 20  # rows of fewer are compressed where they are
_ABSENT = np.uint64(2**64 - 1)
_DTYPES = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float32"}


@dataclass(frozen=True)
class Array:
    """One Zarr array. ``chunk`` is the shape of one file; the axis in front of ``row`` is cut into files.

    Attributes:
        path: inside the group, POSIX.
        dtype: numpy name, little-endian on disk.
        shape: whole array.
        chunk: one file, e.g. ``(1, block_rows, *row)``.
        axes: names of the dimensions.
        lead: how many leading axes number rows (2 for (view, sample), 1 for constants).
        plain: is it stored as it is, however large its rows?
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    axes: tuple[str, ...]
    lead: int = 2
    plain: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise DamageError(f"array {self.path!r} has the unknown number type {self.dtype!r}")

    @cached_property
    def row(self) -> tuple[int, ...]:
        return self.shape[self.lead :]

    @cached_property
    def rows(self) -> int:
        """Rows of one file."""
        return prod(self.chunk[: self.lead])

    @cached_property
    def row_bytes(self) -> int:
        return prod(self.row) * np.dtype(self.dtype).itemsize

    @cached_property
    def big(self) -> bool:
        """Is every row compressed by itself?"""
        return self.lead == 2 and self.row_bytes >= BIG_ROW and not self.plain

    def file(self, *cell: int) -> str:
        """The name of the file at this cell of the chunk grid; trailing axes are not cut."""
        full = cell + (0,) * (len(self.shape) - len(cell))
        return f"{self.path}/c." + ".".join(map(str, full))

    def metadata(self) -> bytes:
        """``zarr.json``."""
        endian = {"name": "bytes", "configuration": {"endian": "little"}}
        if np.dtype(self.dtype).itemsize == 1:
            endian = {"name": "bytes"}
        crc = {"name": "crc32c"}
        codecs: list[dict[str, Any]] = [endian, crc]
        if self.big:
            zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, crc]
            sharding = {
                "chunk_shape": [1] * self.lead + list(self.row),
                "codecs": [endian, zstd, crc],
                "index_codecs": index,
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        return canonical_json(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": self.shape,
                "data_type": self.dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": 0.0 if self.dtype.startswith("float") else 0,
                "codecs": codecs,
                "dimension_names": self.axes,
                "attributes": {},
            }
        )

    def encode(self, rows: np.ndarray) -> bytes:
        """The bytes of one file from its rows ``(n, *row)``; fewer than a full file (the last) are padded."""
        data = np.ascontiguousarray(rows, dtype=np.dtype(self.dtype).newbyteorder("<"))
        if data.shape[1:] != self.row or len(data) > self.rows:
            raise ValueError(f"{self.path}: rows {data.shape} do not fit files of {self.chunk}")
        return self._sharded(data) if self.big else self._plain(data)

    def pieces(self, parts: Iterable[np.ndarray]) -> Iterator[bytes]:
        """As :meth:`encode`, of a plain file whose rows, all of them, come in parts."""
        crc = 0
        for part in parts:
            data = np.ascontiguousarray(part, dtype=np.dtype(self.dtype).newbyteorder("<")).tobytes()
            crc = google_crc32c.extend(crc, data)
            yield data
        yield struct.pack("<I", crc)

    def _plain(self, data: np.ndarray) -> bytes:
        body = data.reshape(-1).view(np.uint8).data, bytes((self.rows - len(data)) * self.row_bytes)
        return b"".join([*body, _crc(*body)])

    def _sharded(self, data: np.ndarray) -> bytes:
        index = np.full((self.rows, 2), _ABSENT, "<u8")
        rows = data.reshape(len(data), -1).view(np.uint8)
        if data.nbytes < _THREADED_BYTES:
            frames = _frames(rows)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                frames = [f for half in pool.map(_frames, np.array_split(rows, _THREADS)) for f in half]
        ends = np.cumsum([len(frame) for frame in frames], dtype="<u8")
        index[: len(frames), 1] = np.diff(ends, prepend=np.uint64(0))
        index[: len(frames), 0] = ends - index[: len(frames), 1]
        table = index.tobytes()
        return b"".join([*frames, table, _crc(table)])

    def plain_bytes(self) -> int:
        """The size of every plain file."""
        return self.rows * self.row_bytes + _CRC

    def fixed_bytes(self) -> int:
        """The part of a file's size that its rows do not change: all of a plain one, the index of a sharded one."""
        return self.rows * _INDEX + _CRC if self.big else self.plain_bytes()


def group_metadata() -> bytes:
    """``zarr.json`` of a group."""
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {}})


def groups(arrays: list[Array]) -> list[str]:
    """The paths of the groups above the arrays, the root (``""``) first."""
    found = {""}
    for array in arrays:
        parts = array.path.split("/")[:-1]
        found |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    return sorted(found)


def _frames(rows: np.ndarray) -> list[bytes]:
    """Of rows of bytes ``(n, m)``: each as a zstd frame, with its checksum."""
    from numcodecs import zstd  # pyright: ignore[reportAttributeAccessIssue]

    packed = (bytes(zstd.compress(row, ZSTD_LEVEL)) for row in rows)
    return [frame + _crc(frame) for frame in packed]


def _crc(*parts: bytes | memoryview) -> bytes:
    value = 0
    for data in parts:
        for start in range(0, len(data), _PIECE):  # the library wants bytes: copy a piece, not the file
            value = google_crc32c.extend(value, bytes(data[start : start + _PIECE]))
    return struct.pack("<I", value)


MEND = "fetch it (softcache repair … --from REMOTE), or run the same build-cache again"


class OpenFile:
    """A file that threads read at any place, whatever becomes of its name; its size is that of when it was opened.

    Nothing is mapped: of a file that is cut meanwhile, or a disk that fails, a mapping tells by ending the process.
    :class:`DamageError` where there is no file, or nothing in it.
    """

    def __init__(self, path: Path):
        self.path, self._fd = path, -1
        self._fd, self.size = _opened(path)

    def __del__(
        self, close: Callable[[int], None] = os.close
    ) -> None:  # modules are empty when the process ends
        if self._fd >= 0:
            close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes. :class:`DamageError` where they are not there any more."""
        parts, left = [], size
        while left:
            try:
                part = os.pread(self._fd, left, offset + size - left)
            except OSError as e:
                raise DamageError(f"{self.path} cannot be read: {e.strerror}; {MEND}") from e
            if not part:
                raise shorter(self.path)
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def crc(self, size: int) -> bytes:
        """The checksum of the first ``size`` bytes."""
        value = 0
        for start in range(0, size, _PIECE):
            value = google_crc32c.extend(value, self.read(start, min(_PIECE, size - start)))
        return struct.pack("<I", value)

    def map(self) -> mmap.mmap:
        """All of it, mapped read-only."""
        try:
            return mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        except OSError as e:
            raise _unopened(self.path, e) from e


def _opened(path: Path) -> tuple[int, int]:
    """Descriptor and size of a file that has something in it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not hold us up
    except FileNotFoundError:
        raise DamageError(f"{path} is missing: {MEND}") from None
    except OSError as e:
        raise _unopened(path, e) from e
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise DamageError(f"{path} is no file")
        if not status.st_size:
            raise DamageError(f"{path} is empty: {MEND}")
        return fd, status.st_size
    except DamageError:
        os.close(fd)
        raise


def map_file(path: Path) -> memoryview:
    """A whole file, mapped read-only. :class:`DamageError` where there is no file, or nothing in it."""
    return memoryview(OpenFile(path).map())


def require_whole(data: memoryview, path: Path) -> None:
    """:class:`DamageError` where a mapped file is shorter than it was: reading on would end the process."""
    mapped = data.obj
    assert isinstance(mapped, mmap.mmap)
    if mapped.size() < len(mapped):
        raise shorter(path)


def shorter(path: Path) -> DamageError:
    return DamageError(f"{path} became shorter while it was in use: {MEND}")


def _unopened(path: Path, e: OSError) -> SoftcacheError:
    if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return StoreError(f"{path} cannot be opened: {e.strerror}; raise the limit (ulimit -n) and run again")
    return DamageError(f"{path} cannot be opened: {e.strerror}")


def _mismatch(path: Path, what: str) -> DamageError:
    return DamageError(
        f"{path}: the checksum of {what} does not match; fetch the file (softcache repair … --from REMOTE), or "
        "delete it and run the same build-cache again"
    )


def _content_size(frame: memoryview) -> int | None:
    """What a zstd frame says it holds (RFC 8878, 3.1.1.1), None where it does not say."""
    header = bytes(frame[:18])  # the longest there is
    if len(header) < 5 or header[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flag, single = header[4] >> 6, header[4] >> 5 & 1
    if not (flag or single):
        return None
    start = 5 + (not single) + (0, 1, 2, 4)[header[4] & 3]
    size = int.from_bytes(header[start : start + (1 << flag)], "little")
    return size + 256 if flag == 1 else size


def map_plain(path: Path, array: Array) -> np.ndarray:
    """A plain file, mapped: ``(rows, *row)``, read-only. Its length and checksum are checked now, once."""
    data = _plain(path, array).map()
    return _rows(memoryview(data), array)


def _plain(path: Path, array: Array) -> OpenFile:
    """A plain file that has the length and the checksum it should have."""
    file = OpenFile(path)
    if file.size != array.plain_bytes():
        raise DamageError(f"{path} has {file.size:,} bytes and should have {array.plain_bytes():,}: {MEND}")
    body = file.size - _CRC
    if file.crc(body) != file.read(body, _CRC):
        raise _mismatch(path, "the file")
    return file


def _rows(data: bytes | memoryview, array: Array) -> np.ndarray:
    dtype = np.dtype(array.dtype).newbyteorder("<")
    return np.frombuffer(data, dtype, array.rows * prod(array.row)).reshape(array.rows, *array.row)


class Plain:
    """A plain file, its length and checksum checked now, once."""

    def __init__(self, path: Path, array: Array):
        self.path, self.array = path, array
        self._file = _plain(path, array)
        self._mapped: tuple[memoryview, np.ndarray] | None = None

    def all(self) -> np.ndarray:
        """Every row, ``(rows, *row)``, read into memory."""
        return _rows(self._file.read(0, self._file.size - _CRC), self.array)

    def rows(self) -> np.ndarray:
        """Every row, mapped, to be copied at once: :class:`DamageError` where the file is shorter by now."""
        if self._mapped is None:
            data = memoryview(self._file.map())
            self._mapped = data, _rows(data, self.array)
        require_whole(self._mapped[0], self.path)
        return self._mapped[1]


class Sharded:
    """A ``sharding_indexed`` file, open, its index checked once; rows are decoded one by one."""

    def __init__(self, path: Path, array: Array):
        from numcodecs import zstd  # pyright: ignore[reportAttributeAccessIssue]

        self.path, self.array, self._decompress = path, array, zstd.decompress
        self._file = OpenFile(path)
        size = array.rows * _INDEX
        self._end = self._file.size - size - _CRC
        if self._end < 0:
            raise DamageError(
                f"{path} has {self._file.size:,} bytes, less than its index of {size + _CRC:,}: {MEND}"
            )
        index = self._file.read(self._end, size + _CRC)
        if _crc(index[:size]) != index[size:]:
            raise _mismatch(path, "the index")
        self._index = np.frombuffer(index, "<u8", 2 * array.rows).reshape(array.rows, 2)

    def read(self, row: int, out: np.ndarray) -> None:
        """Decode one row into ``out``: C-contiguous, the array's dtype and row shape. Safe in threads."""
        offset, size = self._index[row].tolist()
        if offset + size > self._end or size <= _CRC:
            raise DamageError(f"{self.path}: row {row} is missing or lies outside the file")
        stored = self._file.read(offset, size)
        body = memoryview(stored)[:-_CRC]
        if _crc(body) != stored[-_CRC:]:
            raise _mismatch(self.path, f"row {row}")
        # Shorter content would leave the rest of out as it was.
        if _content_size(body) != self.array.row_bytes:
            raise DamageError(f"{self.path}: row {row} does not hold {self.array.row_bytes:,} bytes")
        try:
            # The destination's size is the row's: longer content fails instead of growing.
            self._decompress(body, out.reshape(-1).view(np.uint8))
        except (RuntimeError, ValueError) as e:
            raise DamageError(f"{self.path}: row {row} does not decompress: {e}") from e
