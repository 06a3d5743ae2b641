"""WebDataset, grouped: many records an entry of the tar, as its author advises for small ones; shuffled by shards, and
then among the records of a few entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from read_peers import Case, Rows, Ways

wds: Any = import_module("webdataset")  # whose names pyright does not find

ZSTD = False
_TAR = 64 << 20


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    each = 1024 if sum(values[0].nbytes for values in arrays.values()) < 4096 else 16
    with wds.ShardWriter(str(folder / "%06d.tar"), maxsize=_TAR, verbose=0) as sink:
        for i in range(0, len(next(iter(arrays.values()))), each):
            record = {f"{name}.npy": values[i : i + each] for name, values in arrays.items()}
            sink.write({"__key__": f"{i:012d}", **record})


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    rng = np.random.default_rng(0)

    def batches(entries: Iterator[dict[str, Any]]) -> Iterator[Rows]:
        held: list[list[np.ndarray]] = []

        def shuffled() -> Iterator[Rows]:
            order = rng.permutation(sum(len(one[0]) for one in held))
            whole = [np.concatenate(parts) for parts in zip(*held, strict=True)]
            for start in range(0, len(order), case.batch):
                yield [values[order[start : start + case.batch]] for values in whole]

        for entry in entries:
            held.append([entry[f"{name}.npy"] for name in case.arrays])
            if len(held) == 4:
                yield from shuffled()
                held.clear()
        if held:
            yield from shuffled()

    def epoch() -> Iterator[Rows]:
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).decode().compose(batches)
        return iter(dataset)

    yield Ways(streams={"grouped, own shuffle": epoch})
