"""Clocks: sides of a comparison in turn, a control that says whether the machine was quiet, and files put out of memory."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from read_peers import Case, Rows

Side = Callable[[float], float]  # seconds → rows a second


def interleaved(sides: dict[str, Side], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Each side once a round, every other round in reverse, after a round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides)[:: (-1) ** i]:
            rate = sides[name](seconds)
            if i:
                found[name].append(rate)
    return found


def taking(take: Callable[[np.ndarray], Rows], batches: list[np.ndarray]) -> Side:
    """The same batches, again and again."""
    endless = itertools.cycle(batches)

    def side(seconds: float) -> float:
        rows, start = 0, time.perf_counter()
        while True:
            batch = next(endless)
            take(batch)
            rows += len(batch)
            if (passed := time.perf_counter() - start) >= seconds:
                return rows / passed

    return side


def streaming(epoch: Callable[[], Iterator[Rows]]) -> Side:
    """Epoch after epoch; until an epoch's first batch is there, time is not counted."""

    def batches() -> Iterator[tuple[int, bool]]:
        while True:
            yield from ((len(batch[0]), i == 0) for i, batch in enumerate(epoch()))

    endless = batches()

    def side(seconds: float) -> float:
        rows, passed, start = 0, 0.0, time.perf_counter()
        while not rows or passed < seconds:
            count, first = next(endless)
            now = time.perf_counter()
            if not first:
                rows, passed = rows + count, passed + now - start
            start = now
        return rows / passed

    return side


def two_threads(work: Callable[[int], int]) -> Side:
    """``work(i)`` does some rows and says how many; two threads call it, each with its own ``i``, for so many seconds."""

    def one(i: int, until: float) -> int:
        rows = work(i)
        while time.perf_counter() < until:
            rows += work(i)
        return rows

    def side(seconds: float) -> float:
        with ThreadPoolExecutor(2) as pool:
            start = time.perf_counter()
            done = [pool.submit(one, i, start + seconds) for i in range(2)]
            rows = sum(part.result() for part in done)
            return rows / (time.perf_counter() - start)

    return side


def batches(
    order: str, rows: int, case: Case, disk: np.ndarray | None = None, seed: int = 0
) -> list[np.ndarray]:
    """An epoch's row numbers, batch by batch (whole ones only): ``sequential`` as on the disk; ``shuffled`` among all;
    ``blocks``: blocks of the disk's order in any order, and the rows of four at a time shuffled."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(rows) if disk is None else disk
    if order == "shuffled":
        numbers = rng.permutation(rows)
    elif order == "blocks":
        cut = [numbers[i : i + case.block] for i in range(0, rows, case.block)]
        shuffled = [cut[i] for i in rng.permutation(len(cut))]
        windows = [np.concatenate(shuffled[i : i + 4]) for i in range(0, len(cut), 4)]
        numbers = np.concatenate([rng.permutation(window) for window in windows])
    return [numbers[i : i + case.batch] for i in range(0, rows - case.batch + 1, case.batch)]


def control(seconds: float) -> float:
    """How many times as much zlib two threads do as one: nearly 2 where nothing else runs on two cores."""
    data = np.random.default_rng(0).integers(0, 64, 1 << 16, np.uint8).tobytes()

    def work(_: int) -> int:
        zlib.compress(data, 6)
        return 1

    def one(seconds: float) -> float:
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            count += work(0)
        return count / passed

    seconds = max(seconds, 0.1)
    pairs = [(two_threads(work)(seconds), one(seconds)) for _ in range(3)]
    return statistics.median(two / alone for two, alone in pairs)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def put_out(paths: Iterable[Path]) -> float:
    """Put files out of the page cache (``posix_fadvise``); returns the share that is in memory all the same."""
    there = pages = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), size) as mapped:
                room = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
                start = ctypes.c_char.from_buffer(mapped)
                libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), room)
                del start
        there, pages = there + sum(page & 1 for page in bytes(room)), pages + len(room)
    return there / max(pages, 1)
