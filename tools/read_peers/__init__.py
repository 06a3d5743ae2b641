"""The readers that ``tools/bench_read.py`` compares, one a file, each as its own documentation recommends.

A reader is a module with

- ``write(arrays, folder, zstd)``: the records, ``{name: (rows, …)}``, into an empty folder; with ``zstd``, compressed at
  level 1;
- ``opened(folder, case)``: a context that gives the :class:`Ways` to read them;
- ``ZSTD``: does it compress? ``SLOW``, where writing takes long: so many rows are enough to time it.

It is called ``by_NAME``: pyright would take ``NAME`` for the library. Each runs in an environment of its own, where there is
numpy and nothing of ours but this package; ``memmap``, which all are compared with, runs in every one of them, and
``softcache`` where the tool runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Rows = Sequence[np.ndarray]  # of a batch: its arrays

# What is installed for each; versions are those that the published figures are of.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "softcache": (),
    "memmap": (),
    "zarr": ("zarr==3.1.6; python_version < '3.12'", "zarr==3.4.2; python_version >= '3.12'", "numpy==2.4.6"),
    "tensorstore": ("tensorstore==0.1.86", "numpy==2.4.6"),
    "h5py": ("h5py==3.16.0", "numpy==2.4.6"),
    "lmdb": ("lmdb==3.0.0", "numpy==2.4.6"),
    "lance": ("pylance==14.0.2", "pyarrow==26.0.1", "numpy==2.4.6"),
    "webdataset": ("webdataset==1.0.2", "numpy==2.4.6"),
    "litdata": ("litdata==0.2.76", "zstd==1.5.7.2", "torch==2.15.0", "torchvision==0.29.2", "numpy==2.4.6"),
    "mosaic": ("mosaicml-streaming==0.13.0", "torch==2.15.0", "torchvision==0.29.2", "numpy==2.1.3"),
}


@dataclass(frozen=True)
class Case:
    """Records of one kind: the arrays of a row, rows a batch, rows a block of a block-wise shuffle."""

    name: str
    arrays: tuple[str, ...]
    batch: int
    block: int
    zstd: bool = False


CASES = {
    case.name: case
    for case in (
        Case("rows", ("index", "value"), 256, 1024),
        Case("maps", ("map",), 16, 64),
        Case("zstd", ("map",), 16, 64, zstd=True),
        Case("small", ("small",), 64, 256, zstd=True),
    )
}


@dataclass
class Ways:
    """How records are read.

    Attributes:
        takes: rows by their numbers, in any order.
        streams: the reader's own shuffled stream of batches: an epoch of it.
        references: what decoding alone does: called with seconds, rows a second.
        disk: the numbers of the rows as they follow each other on the disk; None for 0, 1, 2, …
        whole: what a take gave → the case's arrays; only to compare them. Ways in ``inexact`` are not compared: they give
            what was made of the records.
    """

    takes: dict[str, Callable[[np.ndarray], Rows]] = field(default_factory=dict)
    streams: dict[str, Callable[[], Iterator[Rows]]] = field(default_factory=dict)
    references: dict[str, Callable[[float], float]] = field(default_factory=dict)
    disk: np.ndarray | None = None
    whole: Callable[[Rows], Rows] = list
    inexact: frozenset[str] = frozenset()
