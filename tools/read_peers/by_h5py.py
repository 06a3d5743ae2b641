"""h5py: rows in chunks, with a chunk cache that holds all of them and rising indices; maps in one piece, ``read_direct``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from read_peers import Case, Rows, Ways

ZSTD = False
_BIG = 4096


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    with h5py.File(folder / "records.h5", "w", libver="latest") as file:
        for name, values in arrays.items():
            chunks = None if values[0].nbytes >= _BIG else (1024, *values.shape[1:])
            file.create_dataset(name, data=values, chunks=chunks)


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    with h5py.File(folder / "records.h5", "r", rdcc_nbytes=256 << 20, rdcc_nslots=100_003) as file:
        arrays: list[Any] = [file[name] for name in case.arrays]
        outs = [np.empty((case.batch, *a.shape[1:]), a.dtype) for a in arrays]

        def fancy(rows: np.ndarray) -> Rows:
            order = np.argsort(rows)
            for array, out in zip(arrays, outs, strict=True):
                out[order] = array[rows[order]]
            return [out[: len(rows)] for out in outs]

        def direct(rows: np.ndarray) -> Rows:
            for array, out in zip(arrays, outs, strict=True):
                for place, row in enumerate(rows.tolist()):
                    array.read_direct(out, np.s_[row], np.s_[place])
            return [out[: len(rows)] for out in outs]

        yield Ways({"sorted indices": fancy} if case.name == "rows" else {"read_direct": direct})
