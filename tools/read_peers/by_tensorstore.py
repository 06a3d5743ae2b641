"""tensorstore: Zarr v3, sharded; the reads of a batch are issued together (``Batch``), with and without a ``cache_pool``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from read_peers import Case, Rows, Ways

ZSTD = True
_BIG = 4096
_POOL = 2 << 30


def _spec(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / name}/"}}


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    for name, values in arrays.items():
        chunk, shard = (1, 256) if values[0].nbytes >= _BIG else (1024, 65536)
        row = list(values.shape[1:])
        inner: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if zstd:
            inner.append({"name": "zstd", "configuration": {"level": 1}})
        sharding = {
            "chunk_shape": [chunk, *row],
            "codecs": inner,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }
        metadata = {
            "shape": list(values.shape),
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *row]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        made = ts.open(
            _spec(folder, name) | {"metadata": metadata}, create=True, delete_existing=True
        ).result()
        made.write(values).result()


def _take(folder: Path, case: Case, pool: int) -> Any:
    context = ts.Context({"cache_pool": {"total_bytes_limit": pool}})
    stores = [
        ts.open(_spec(folder, name), read=True, context=context, recheck_cached_data=False).result()
        for name in case.arrays
    ]

    def take(rows: np.ndarray) -> Rows:
        with ts.Batch() as batch:
            asked = [store[rows].read(batch=batch) for store in stores]
        return [one.result() for one in asked]

    return take


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    yield Ways({"read": _take(folder, case, 0), "read, cache_pool": _take(folder, case, _POOL)})
