"""Many files moved at once, by a few threads, with one live line."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from softcache.inventory import File
from softcache.meter import clock

THREADS = 8
_HELD_BYTES = 1 << 29  # of files in memory: they are verified before they are anywhere else


def each(files: Sequence[File], do: Callable[[File], None], verb: str, progress: bool) -> None:
    """``do`` every file. What fails first ends all and is raised; so does Ctrl-C."""
    line = _Line(verb, len(files), sum(f.entry.bytes for f in files), progress)

    def one(file: File) -> None:
        do(file)
        line.add(file.entry.bytes)

    largest = max((f.entry.bytes for f in files), default=1) or 1
    pool = ThreadPoolExecutor(
        max(1, min(THREADS, _HELD_BYTES // largest)), thread_name_prefix="softcache-move"
    )
    try:
        jobs = [pool.submit(one, file) for file in files]
        done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in done:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
        line.end()


class _Line:
    """Files and bytes moved, how fast, and how long it will take."""

    def __init__(self, verb: str, files: int, size: int, show: bool):
        self._verb, self._files, self._size, self._show = verb, files, size, show
        self._done = self._moved = 0
        self._begun = self._printed = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += 1
            self._moved += size
            now = time.monotonic()
            if self._show and now - self._printed > (0.5 if self._terminal else 15.0):
                self._printed = now
                print(self._text(now), end="\r" if self._terminal else "\n", file=sys.stderr, flush=True)

    def _text(self, now: float) -> str:
        rate = max(self._moved, 1) / (now - self._begun)
        return (
            f"{self._verb} {self._done:,}/{self._files:,} files · {self._moved / 1e6:,.1f}/{self._size / 1e6:,.1f} MB · "
            f"{rate / 1e6:,.1f} MB/s · {clock((self._size - self._moved) / rate)} left   "
        )

    def end(self) -> None:
        if self._show and self._terminal and self._printed > self._begun:
            print(file=sys.stderr)


def amount(files: int, size: int) -> str:
    """``3 files (1.2 MB)``."""
    return f"{files:,} file{'' if files == 1 else 's'} ({size / 1e6:,.1f} MB)"
