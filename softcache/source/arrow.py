"""A Hugging Face dataset saved to disk (``save_to_disk``): Arrow streams, mapped into memory.

A folder with ``state.json`` and ``data-00000-of-00005.arrow``, …; or one with ``dataset_dict.json`` and such
a folder for each split. Needs the extra ``softcache[parquet]``, and not ``datasets``.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import SourceError
from softcache.source import columns
from softcache.source.layout import Lock, choose_split

LOOK = "state.json or dataset_dict.json (a dataset saved to disk)"
_STATE, _DICT, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream


@dataclass(frozen=True)
class Saved:
    """An opened split; ids are the images' paths where these are good names, else the number of the row, which
    does not depend on how many files the rows were saved to."""

    split: str | None
    ids: list[str]
    labels: np.ndarray
    classes: tuple[str, ...] | None
    images: Column
    notes: tuple[str, ...] = ()

    def read(self, row: int) -> bytes:
        data = self.images.value(row)
        if data is None:
            raise ValueError(
                "the row holds no bytes (a null, or only the path of an image: save the dataset again "
                "with datasets' save_to_disk, which puts the files' bytes in)"
            )
        return data

    def where(self, row: int) -> str:
        return self.images.place(row)


class Column:
    """One column of some Arrow streams (a field of it, where ``field`` names one). Any thread, any process:
    the files are mapped by who reads first."""

    def __init__(self, files: tuple[Path, ...], column: str, field: str | None) -> None:
        self._files, self._column, self._field = files, column, field
        self._lock = Lock()
        self._mapped: tuple[list[Any], list[int], list[int]] | None = None

    def value(self, row: int) -> bytes | None:
        """The bytes at ``row``, counted through all files; None for a null."""
        parts, starts, _ = self._map()
        part = bisect_right(starts, row) - 1
        return parts[part][row - starts[part]].as_py()

    def place(self, row: int) -> str:
        """``file.arrow, row 17`` of that file."""
        firsts = self._map()[2]
        file = bisect_right(firsts, row) - 1
        return f"{self._files[file]}, row {row - firsts[file]}"

    def _map(self) -> tuple[list[Any], list[int], list[int]]:
        """The batches, the first row of each, and the first row of each file."""
        with self._lock:
            if self._mapped is None:
                files = [_batches(file) for file in self._files]
                parts = [_part(batch, self._column, self._field) for batches in files for batch in batches]
                sizes = [sum(batch.num_rows for batch in batches) for batches in files]
                self._mapped = parts, _firsts([len(part) for part in parts]), _firsts(sizes)
            return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


def recognise(path: Path) -> bool:
    """Has it the file that ``save_to_disk`` leaves beside the data?"""
    return (path / _DICT).is_file() or (path / _STATE).is_file()


def open_split(path: Path, split: str | None, image_column: str | None, label_column: str | None) -> Saved:
    """Reads image paths and labels, no image. Raises :class:`SourceError` for a split or a column that is not
    there or could be several, for a damaged file, and where pyarrow is missing."""
    if not recognise(path):
        raise SourceError(f"{path} is no dataset saved to disk: it has neither {_STATE} nor {_DICT}")
    if (path / _DICT).is_file():
        split = choose_split(split, _json(path / _DICT, "splits"), path)
        path = path / split
    elif split is not None:
        raise SourceError(
            f"{path} is one split already; leave split={split!r} out, or point to the folder above"
        )
    files = _files(path)
    schema = _schema(files)
    features = columns.features(_read(path / _INFO))
    image = columns.image_column(schema, features, image_column)
    label = columns.label_column(schema, features, label_column)
    batches = [batch for file in files for batch in _batches(file)]
    labels = [_labels(batch, label, path) for batch in batches]
    paths = [path for batch in batches for path in _paths(batch, schema, image)]
    field = "bytes" if columns.leaf(schema, image, "bytes") else None
    return Saved(
        split,
        columns.names(paths) or [str(row) for row in range(len(paths))],
        np.concatenate([np.empty(0, np.int64), *labels]),
        columns.classes(features, label),
        Column(files, image, field),
        columns.unused_labels(schema, label),
    )


def _files(folder: Path) -> tuple[Path, ...]:
    names = [file.get("filename") for file in _json(folder / _STATE, "_data_files") if isinstance(file, dict)]
    if any(value for key, value in _read(folder / _STATE).items() if key.startswith("_indices")):
        raise SourceError(
            f"{folder} keeps the order of its rows in a file of its own, as datasets did before version 2: "
            "load it with datasets and save it again"
        )
    if not names:
        raise SourceError(f"{folder / _STATE} names no data files: an empty dataset")
    return tuple(folder / str(name) for name in names)


def _json(file: Path, key: str) -> list[Any]:
    found = _read(file).get(key)
    if not isinstance(found, list):
        raise SourceError(f"{file} has no list {key!r}: damaged, or no dataset saved to disk: save it again")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as e:
        raise SourceError(f"cannot read {file}: {e}; missing or damaged: save the dataset again") from e
    return found if isinstance(found, dict) else {}


def _schema(files: tuple[Path, ...]) -> Any:
    """That of all files."""
    schemas = [_stream(file).schema for file in files]
    for file, schema in zip(files, schemas, strict=True):
        if not schema.equals(schemas[0]):
            raise SourceError(
                f"{file} has other columns than {files[0]}: files of two datasets; save it again"
            )
    return schemas[0]


def _stream(file: Path) -> Any:
    pyarrow = columns.pyarrow(file)
    ipc = pyarrow.ipc
    try:
        # without Arrow's thread pool, which does not live on in a forked process
        return ipc.open_stream(pyarrow.memory_map(str(file)), options=ipc.IpcReadOptions(use_threads=False))
    except (OSError, ValueError) as e:
        raise _damaged(file, e) from e


def _batches(file: Path) -> list[Any]:
    """Record batches that lie in the mapped file."""
    reader = _stream(file)
    with file.open("rb") as raw:
        raw.seek(-len(_END), 2)
        if raw.read() != _END:  # a stream that ends between two batches would pass for a shorter one
            raise _damaged(file, "it does not end as a stream does")
    try:
        return list(reader)
    except (OSError, ValueError) as e:
        raise _damaged(file, e) from e


def _damaged(file: Path, e: Exception | str) -> SourceError:
    return SourceError(f"cannot read {file}: {e}; cut or damaged: copy it again, or save the dataset again")


def _part(batch: Any, column: str, field: str | None) -> Any:
    """The column in a batch, nulls of the struct being nulls of its fields; its offsets checked, since Arrow
    follows them blindly."""
    values = batch.column(batch.schema.get_field_index(column))
    try:
        values.validate(full=True)
    except ValueError as e:
        raise SourceError(f"the column {column!r} is damaged: {e}; copy the dataset again") from e
    if field is None:
        return values
    return values.flatten()[values.type.get_field_index(field)]


def _labels(batch: Any, label: str | None, folder: Path) -> np.ndarray:
    if label is None:
        return np.full(batch.num_rows, -1, np.int64)
    return columns.whole_numbers(_part(batch, label, None), str(folder))


def _paths(batch: Any, schema: Any, image: str) -> list[str | None]:
    if not columns.leaf(schema, image, "path"):
        return [None] * batch.num_rows
    return _part(batch, image, "path").to_pylist()


def _firsts(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]
