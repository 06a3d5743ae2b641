"""np.load with mmap_mode, and one np.take an array into a buffer that is used again: what everything is compared with.

Of a small batch half of the time is ``np.take``'s way to the array's method, which is measured, too, as is plain indexing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from read_peers import Case, Rows, Ways

ZSTD = False


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def write_durably(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    for name, values in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())


WRITES = {"write": write, "write, fsync": write_durably}


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    mapped = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in case.arrays]
    outs = [np.empty((case.batch, *values.shape[1:]), values.dtype) for values in mapped]

    def take(rows: np.ndarray) -> Rows:
        # "raise" copies by way of another buffer; rows are in range
        return [
            np.take(values, rows, axis=0, out=out[: len(rows)], mode="clip")
            for values, out in zip(mapped, outs, strict=True)
        ]

    def method(rows: np.ndarray) -> Rows:
        return [
            values.take(rows, axis=0, out=out[: len(rows)], mode="clip")
            for values, out in zip(mapped, outs, strict=True)
        ]

    def index(rows: np.ndarray) -> Rows:
        return [values[rows] for values in mapped]

    yield Ways({"take": take, "method take": method, "index": index})
