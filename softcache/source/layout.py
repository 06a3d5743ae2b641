"""What the dataset layouts have in common: the shape of an opened one, and the choice of a split."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from softcache.errors import SourceError, nearest

SPLITS = ("train", "val", "valid", "validation", "test")  # folder names that mean a split


class Samples(Protocol):
    """An opened split of one layout. ``read`` and ``where`` take a row, 0 to ``len(ids) - 1``.

    One that knows where things are in its images has ``boxes(row) -> Boxes`` as well (see :mod:`.boxes`).
    """

    @property
    def split(self) -> str | None: ...

    @property
    def ids(self) -> Sequence[str]:
        """Unique, in the layout's own order."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """int64 ``(N,)``, -1 where unknown."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know: files that are missing or were ignored."""
        ...

    def read(self, row: int) -> bytes | np.ndarray:
        """The encoded bytes, or uint8 pixels ``(H, W, 3)`` where the layout has no bytes. Any thread."""
        ...

    def where(self, row: int) -> str:
        """For messages: the file, and the row in it."""
        ...


class Lock:
    """A lock that survives pickling (as a new one), so that a source can be sent to a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


def choose_split(wanted: str | None, available: Collection[str], where: object) -> str:
    """The wanted split, or the only one. :class:`SourceError` otherwise, listing what there is."""
    names = sorted(available)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None:
        raise SourceError(
            f"{where} has several splits ({', '.join(names)}): choose one with split= (--split)"
        )
    if wanted not in available:
        raise SourceError(f"{where} has no split {wanted!r}{nearest(wanted, names)}")
    return wanted
