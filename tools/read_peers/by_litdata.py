"""litdata: ``optimize``d chunks of 64 MB; its own shuffled stream through its loader, and single items by their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import litdata
import numpy as np

from read_peers import Case, Rows, Ways

ZSTD = True
SLOW = 20_000


@cache
def _mapped(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _record(i: int, names: tuple[str, ...], folder: str) -> dict[str, np.ndarray]:
    return {name: np.array(_mapped(f"{folder}/{name}.npy")[i]) for name in names}


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    with TemporaryDirectory() as laid:  # its workers are processes, and are given numbers
        for name, values in arrays.items():
            np.save(Path(laid) / f"{name}.npy", values)
        litdata.optimize(
            fn=partial(_record, names=tuple(arrays), folder=laid),
            inputs=list(range(len(next(iter(arrays.values()))))),
            output_dir=str(folder),
            num_workers=1,
            chunk_bytes="64MB",
            compression="zstd" if zstd else None,
            mode="overwrite",
            verbose=False,
        )


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    def arrays(record: dict[str, Any]) -> list[np.ndarray]:
        return [np.asarray(record[name]) for name in case.arrays]

    def epoch() -> Iterator[Rows]:
        dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False)
        loader = litdata.StreamingDataLoader(dataset, batch_size=case.batch, num_workers=0)
        return map(arrays, loader)

    dataset = litdata.StreamingDataset(str(folder))

    def items(rows: np.ndarray) -> Rows:
        found = [arrays(dataset[row]) for row in rows.tolist()]
        return [np.stack(values) for values in zip(*found, strict=True)]

    yield Ways({"items": items}, {"own shuffle": epoch})
