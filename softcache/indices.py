"""Whole numbers and arrays of them, as callers give them."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
from numpy.typing import ArrayLike

from softcache.errors import SpecError


def is_whole(value: object) -> TypeGuard[int]:
    """A whole number, numpy's too; no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def integers(samples: ArrayLike) -> np.ndarray:
    """Indices as int64. :class:`SpecError` for other numbers."""
    found = np.asarray(samples)
    if found.size and found.dtype.kind not in "iu":  # a mask would be taken for other rows
        raise SpecError(f"samples are whole numbers, not {found.dtype}")
    return found.astype(np.int64, copy=False)
