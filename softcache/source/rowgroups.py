"""One binary column of Parquet files, read a row group at a time and kept within a budget of memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

from softcache.source.layout import Lock

BUDGET = 2 << 30  # bytes of row groups kept; the latest is kept whatever its size


class RowGroups:
    """``column`` (dotted for a field of a struct) of ``files``, whose ``metadata`` has been read.

    Safe to share between threads. A file is opened for each row group, so that no handle is there to
    break in a forked process.
    """

    def __init__(self, files: tuple[Path, ...], metadata: tuple[Any, ...], column: str) -> None:
        self._files = tuple(zip(files, metadata, strict=True))
        self._column = column
        self._groups = [(f, g) for f, m in enumerate(metadata) for g in range(m.num_row_groups)]
        sizes = [metadata[f].row_group(g).num_rows for f, g in self._groups]
        self._starts = [0, *accumulate(sizes)][:-1]
        self._lock = Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def value(self, row: int) -> bytes | None:
        """The bytes at ``row``, counted through all files; None for a null."""
        group = bisect_right(self._starts, row) - 1
        with self._lock:  # held while reading, too: other threads wait for that same group, mostly
            column = self._group(group)
        return column[row - self._starts[group]].as_py()

    def place(self, row: int) -> str:
        """``file.parquet, row 17`` of that file."""
        file = self._groups[bisect_right(self._starts, row) - 1][0]
        before = sum(metadata.num_rows for _, metadata in self._files[:file])
        return f"{self._files[file][0]}, row {row - before}"

    def _group(self, group: int) -> Any:
        if group in self._kept:
            self._kept.move_to_end(group)
        else:
            self._kept[group] = self._read(group)
            while len(self._kept) > 1 and sum(c.nbytes for c in self._kept.values()) > BUDGET:
                self._kept.popitem(last=False)
        return self._kept[group]

    def _read(self, group: int) -> Any:
        from pyarrow.parquet import ParquetFile

        number, within = self._groups[group]
        path, metadata = self._files[number]
        with ParquetFile(path, metadata=metadata) as file:
            # without Arrow's thread pool, which does not live on in a forked process
            table = file.read_row_group(within, columns=[self._column], use_threads=False)
        return table.flatten().column(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}  # a process sent to reads its own
