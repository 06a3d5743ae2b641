"""Parquet in the Hugging Face layout: images as bytes in a column, the features in the schema.

A directory with ``{split}-00000-of-00005.parquet`` or ``{split}.parquet`` directly or in ``data/``, or
any ``*.parquet`` in ``train/``, ``test/``, …; or a single file. Needs the extra ``softcache[parquet]``.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import SourceError
from softcache.source import columns
from softcache.source.layout import SPLITS, choose_split
from softcache.source.rowgroups import RowGroups

LOOK = "*.parquet (directly, in data/ or in a split's folder)"
_STEM = re.compile(r"(?P<split>.+?)(-\d{5}-of-(?P<total>\d{5}))?(-[0-9a-f]{16})?")


@dataclass(frozen=True)
class Parquet:
    """An opened split; ids are the images' paths where these are good names, else ``file:row``."""

    split: str
    ids: list[str]
    labels: np.ndarray
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]
    images: RowGroups

    def read(self, row: int) -> bytes:
        data = self.images.value(row)
        if data is None:
            raise ValueError("the row holds no bytes (a null, or only the path of an image)")
        return data

    def where(self, row: int) -> str:
        return self.images.place(row)


def recognise(path: Path) -> bool:
    """Is it a Parquet file, or a directory with some at the known places?"""
    return bool(_splits(path))


def open_split(path: Path, split: str | None, image_column: str | None, label_column: str | None) -> Parquet:
    """Reads the schemas, image paths and labels, no image. Raises :class:`SourceError` for a split or
    a column that is not there or could be several, for a damaged file, and where pyarrow is missing."""
    splits = _splits(path)
    if not splits:
        raise SourceError(f"{path} holds no Parquet files, directly, in data/ or in a split's folder")
    split = choose_split(split, splits, path)
    files = tuple(splits[split])
    notes = _missing(files)
    with _open(files[0]) as first:
        schema = first.schema_arrow
    features = _features(schema)
    image = columns.image_column(schema, features, image_column)
    label = columns.label_column(schema, features, label_column)
    parts = [_read(file, schema, image, label) for file in files]
    return Parquet(
        split,
        _ids(files, parts),
        np.concatenate([part.labels for part in parts]),
        columns.classes(features, label),
        (*notes, *columns.unused_labels(schema, label)),
        RowGroups(files, tuple(p.metadata for p in parts), columns.leaf(schema, image, "bytes") or image),
    )


@dataclass(frozen=True)
class _Part:
    """What is read of a file at once."""

    metadata: Any
    paths: list[str | None]  # all None where the column has none
    labels: np.ndarray


def _read(file: Path, schema: Any, image: str, label: str | None) -> _Part:
    path = columns.leaf(schema, image, "path")
    with _open(file) as opened:
        absent = {image, label} - {None, *opened.schema_arrow.names}
        if absent:
            raise SourceError(
                f"{file} has no column {absent.pop()!r}, which other files of the split have: "
                "files of different datasets; keep those of one in a directory"
            )
        rows = opened.metadata.num_rows
        paths, labels = [None] * rows, np.full(rows, -1, np.int64)
        try:
            if path:
                paths = opened.read(columns=[path]).flatten().column(0).to_pylist()
            if label:
                labels = columns.whole_numbers(opened.read(columns=[label]).column(0), str(file))
        except (OSError, ValueError) as e:
            raise _damaged(file, e) from e
        return _Part(opened.metadata, paths, labels)


def _splits(path: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    direct = [path] if path.is_file() and path.suffix == ".parquet" else _parquets(path)
    for file in [*direct, *_parquets(path / "data")]:
        found[_stem(file)["split"]].append(file)
    for split in SPLITS:
        if files := _parquets(path / split):
            found[split] += files
    return dict(found)


def _parquets(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*.parquet") if not f.name.startswith("."))


def _stem(file: Path) -> re.Match[str]:
    match = _STEM.fullmatch(file.stem)
    assert match  # any stem does
    return match


def _missing(files: tuple[Path, ...]) -> tuple[str, ...]:
    totals = {int(total) for file in files if (total := _stem(file)["total"])}
    if len(totals) > 1:
        raise SourceError(
            f"{files[0].parent} mixes files of {' and of '.join(map(str, sorted(totals)))}: "
            "two exports of one split; keep those of one"
        )
    total = max(totals, default=len(files))
    return (f"{len(files)} of {total} files of this split are here",) if len(files) < total else ()


def _open(file: Path) -> Any:
    parquet = columns.pyarrow(file).parquet
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as e:
        raise _damaged(file, e) from e


def _damaged(file: Path, e: Exception) -> SourceError:
    return SourceError(f"cannot read {file}: {e}; damaged or not Parquet: fetch it again")


def _features(schema: Any) -> dict[str, Any]:
    try:
        return columns.features(json.loads(schema.metadata[b"huggingface"])["info"])
    except (TypeError, KeyError, ValueError):
        return {}


def _ids(files: tuple[Path, ...], parts: list[_Part]) -> list[str]:
    return columns.names([path for part in parts for path in part.paths]) or [
        f"{file.stem}:{row}"
        for file, part in zip(files, parts, strict=True)
        for row in range(len(part.paths))
    ]
