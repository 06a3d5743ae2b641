"""Decoded images kept in memory, for views that show those of other samples too."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from softcache.source import Source

ROOM = 256 << 20  # bytes a process, where nobody says otherwise


class Kept:
    """The pixels of samples, of which the first ``room`` bytes are kept; safe to share between threads.

    ``index`` says where each sample is in the source; by default they are its own. A copy, such as in another process,
    has nothing yet.
    """

    def __init__(self, source: Source, room: int, index: Sequence[int] | np.ndarray | None = None):
        self.source, self.room, self.index = source, room, index
        self.kept: dict[int, np.ndarray] = {}
        self._left = room
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self.source, self.room, self.index)

    def __call__(self, sample: int) -> np.ndarray:
        image = self.kept.get(sample)
        if image is None:
            image = self.source.image(sample if self.index is None else int(self.index[sample]))
            with self._lock:
                if sample not in self.kept and image.nbytes <= self._left:
                    self.kept[sample] = image
                    self._left -= image.nbytes
        return image
