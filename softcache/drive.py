"""How fast the disk at the output takes bytes when it has to go on doing so: past its cache, and file by file."""

from __future__ import annotations

import errno
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from softcache.errors import StoreError
from softcache.store import Disk

MOST_BYTES, MOST_SECONDS = 4 << 30, 10.0
_PIECE = 8 << 20  # written between two fsyncs
_LAST = 4  # pieces that are compared with as many others
_SHARE = 0.25
_DROP, _AGREE = (
    0.6,
    0.25,
)  # slower than the fastest by so much: its cache is full; and pieces that differ by less agree
_SYNCS = 8  # small writes whose fsync is timed
_SMALL = 4096
_ROOM = 4  # takes at most one of so many bytes that are free
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Drive:
    """What was measured.

    Attributes:
        bytes_per_second: of all where everything was written, else of the last pieces, or the last quarter where that is
            slower; each piece with its fsync.
        first_bytes_per_second: of the first pieces, which a drive's cache may have taken.
        sync_seconds: a small write and its fsync, the median: of which every file costs two.
        written, seconds: in all. settled: was a drop seen, or everything written that there is to write? Else the drive may
            become slower yet.
    """

    bytes_per_second: float
    first_bytes_per_second: float
    sync_seconds: float
    written: int
    seconds: float
    settled: bool

    def writing(self, size: float, files: float) -> float:
        """Seconds that it takes for so many bytes in so many files."""
        return size / self.bytes_per_second + 2 * files * self.sync_seconds


def sustained(
    folder: Path,
    wanted: int,
    disk: Disk | None = None,
    most_bytes: int = MOST_BYTES,
    most_seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Drive:
    """Write to a file in ``folder`` until the rate has settled, or a bound is reached.

    The file has no name, so that nothing is left of it, whatever happens. It grows to ``wanted``
    bytes (what shall be written there anyway) at most, and to a quarter of what is free.

    Raises :class:`StoreError` where nothing can be written.
    """
    disk = disk or Disk()
    data = np.random.default_rng(0).bytes(_PIECE)  # which no drive can compress
    try:
        with TemporaryFile(dir=folder, buffering=0) as file:
            fd = file.fileno()
            space = os.fstatvfs(fd)
            most = min(wanted, most_bytes, space.f_bavail * space.f_frsize // _ROOM)
            return _measure(disk, fd, folder, data, most, wanted, most_seconds, clock)
    except OSError as e:
        raise StoreError(f"cannot write to {folder}: {e.strerror or e}") from e


def _measure(
    disk: Disk,
    fd: int,
    folder: Path,
    data: bytes,
    most: int,
    wanted: int,
    most_seconds: float,
    clock: Callable[[], float],
) -> Drive:
    def write(part: bytes | memoryview) -> float:
        start = clock()
        disk.write(fd, folder, part)
        disk.sync_file(fd, folder)
        return max(clock() - start, 1e-9)

    begun = clock()
    sync = statistics.median(write(data[:_SMALL]) for _ in range(_SYNCS))
    sizes: list[int] = []
    spent: list[float] = []
    settled = False
    while sum(sizes) < most and clock() - begun < most_seconds and not settled:
        part = memoryview(data)[: max(min(_PIECE, most - sum(sizes)), 1)]
        try:
            spent.append(write(part))
        except OSError as e:
            if e.errno in _FULL and sizes:
                break  # what was measured until then is known
            raise
        sizes.append(len(part))
        settled = _settled([size / took for size, took in zip(sizes, spent, strict=True)])
    if not sizes:  # nothing to speak of is written
        sizes, spent = [_SMALL], [sync]
    whole = sum(sizes) >= wanted
    ends = (len(sizes),) if whole else (2 * _LAST, max(2 * _LAST, round(len(sizes) * _SHARE)))
    return Drive(
        bytes_per_second=min(sum(sizes[-last:]) / sum(spent[-last:]) for last in ends),
        first_bytes_per_second=sum(sizes[:_LAST]) / sum(spent[:_LAST]),
        sync_seconds=sync,
        written=sum(sizes),
        seconds=clock() - begun,
        settled=settled or whole,
    )


def _settled(rates: list[float]) -> bool:
    """Did it become slower, and does it go on like that?"""
    last = rates[-2 * _LAST :]
    if len(rates) < 3 * _LAST or max(last) > _DROP * max(rates[: -2 * _LAST]):
        return False
    first, second = statistics.mean(last[:_LAST]), statistics.mean(last[_LAST:])
    return abs(first - second) <= _AGREE * max(first, second)
