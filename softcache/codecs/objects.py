"""Objects: where things are in a view, for codecs that ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Objects:
    """The ``m`` boxes of the source that a view shows, but for crowds and those to be ignored.

    Attributes:
        boxes: float64 ``(m, 4)``: x1, y1, x2, y2 in the unit square of the view, clipped to it.
        label: int64 ``(m,)``: the class of each, counted from 0 in the order of the source's class names.
    """

    boxes: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


NOTHING = Objects(np.zeros((0, 4)), np.zeros(0, np.int64))


def is_boxed(codec: Any) -> bool:
    """Is it given the :class:`Objects` of each row when it encodes?"""
    return getattr(codec, "boxed", False)


def is_labelled(codec: Any) -> bool:
    """Does it compare their classes with the teacher's, too?"""
    return getattr(codec, "labelled", False)
