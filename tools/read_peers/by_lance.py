"""Lance: a table of fixed-size lists, ``take``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from read_peers import Case, Rows, Ways

ZSTD = False


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    columns, shapes = {}, {}
    for name, values in arrays.items():
        flat = pa.array(values.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
        shapes[name] = np.array(values.shape[1:])
    lance.write_dataset(pa.table(columns), str(folder / "records.lance"))
    np.savez(folder / "shapes.npz", allow_pickle=False, **shapes)


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    dataset, names = lance.dataset(str(folder / "records.lance")), list(case.arrays)
    with np.load(folder / "shapes.npz") as known:
        shapes = {name: tuple(known[name].tolist()) for name in names}

    def take(rows: np.ndarray) -> Rows:
        table = dataset.take(rows, columns=names)
        return [
            table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, *shapes[name])
            for name in names
        ]

    yield Ways({"take": take})
