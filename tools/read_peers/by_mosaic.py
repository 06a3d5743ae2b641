"""MosaicML streaming: MDS shards of 64 MiB; its own shuffled stream through its loader, and items by their numbers.

Shards under zstd are unpacked to the disk when they are first used: from then on they are read as the others are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import streaming
from streaming.base.util import clean_stale_shared_memory

from read_peers import Case, Rows, Ways

ZSTD = True
SLOW = 20_000


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    columns = {
        name: f"ndarray:{values.dtype.name}:{','.join(map(str, values.shape[1:]))}"
        for name, values in arrays.items()
    }
    with streaming.MDSWriter(
        out=str(folder), columns=columns, compression="zstd:1" if zstd else None, size_limit=1 << 26
    ) as sink:
        for i in range(len(next(iter(arrays.values())))):
            sink.write({name: values[i] for name, values in arrays.items()})


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=case.batch)

    def arrays(record: dict[str, Any]) -> list[np.ndarray]:
        return [np.asarray(record[name]) for name in case.arrays]

    def epoch() -> Iterator[Rows]:
        loader = streaming.StreamingDataLoader(dataset, batch_size=case.batch, num_workers=0)
        return map(arrays, loader)

    def items(rows: np.ndarray) -> Rows:
        found = [arrays(record) for record in dataset[rows]]
        return [np.stack(values) for values in zip(*found, strict=True)]

    yield Ways({"items": items}, {"own shuffle": epoch})
