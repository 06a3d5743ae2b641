"""zarr-python: sharded arrays; shuffled rows by orthogonal indexing, big ones also one by one, which is faster there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from read_peers import Case, Rows, Ways

ZSTD = True
_BIG = 4096  # bytes of a row that is a chunk by itself


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    group = zarr.open_group(folder, mode="w")
    for name, values in arrays.items():
        big = values[0].nbytes >= _BIG
        chunk, shard = (1, 256) if big else (1024, 65536)
        made = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(chunk, *values.shape[1:]),
            shards=(shard, *values.shape[1:]),
            compressors=ZstdCodec(level=1) if zstd else None,
        )
        for start in range(0, len(values), shard):  # whole shards, as is advised
            made[start : start + shard] = values[start : start + shard]


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    group = zarr.open_group(folder, mode="r")
    arrays: list[Any] = [group[name] for name in case.arrays]
    outs = [np.empty((case.batch, *a.shape[1:]), a.dtype) for a in arrays]

    def oindex(rows: np.ndarray) -> Rows:
        return [array.oindex[rows] for array in arrays]

    def one_by_one(rows: np.ndarray) -> Rows:
        for array, out in zip(arrays, outs, strict=True):
            for place, row in enumerate(rows.tolist()):
                out[place] = array[row]
        return [out[: len(rows)] for out in outs]

    yield Ways({"oindex": oindex} if case.name == "rows" else {"oindex": oindex, "row by row": one_by_one})
