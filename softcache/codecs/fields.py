"""What a codec writes: named fields of fixed width, and the rounding that keeps their bounds true."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from softcache.errors import DamageError

Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class Field:
    """One field of a row: ``dtype`` is a numpy name (``float16``, ``uint8``), little-endian on disk. A ``plain`` one is not
    compressed, however large it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    plain: bool = False

    @property
    def bytes(self) -> int:
        """Of one row, before zstd."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


_FLOATS = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def floats(halves: np.ndarray) -> np.ndarray:
    """float16 → float32, the same numbers. Looked up: numpy converts one at a time, and zeros slowest."""
    return _FLOATS.take(halves.view(np.uint16))


def half_up(x: np.ndarray) -> np.ndarray:
    """The smallest float16 that is not below ``x`` (``x`` ≥ 0, at most 65504)."""
    half = x.astype(np.float16)
    with np.errstate(over="ignore"):  # of 65504, which is not taken
        above = np.nextafter(half, np.float16(np.inf))
    return np.where(half.astype(x.dtype) < x, above, half)


def half_down(x: np.ndarray) -> np.ndarray:
    """The largest float16 that is not above ``x``."""
    half = x.astype(np.float16)
    with np.errstate(over="ignore"):
        below = np.nextafter(half, np.float16(-np.inf))
    return np.where(half.astype(x.dtype) > x, below, half)


def below(index: np.ndarray, count: int, what: str) -> np.ndarray:
    """``index`` as int64. :class:`DamageError` where one is no number below ``count``: no teacher's answer has it."""
    if index.size and (largest := int(index.max())) >= count:
        raise DamageError(
            f"{what} {largest} is kept of {count}: the file is damaged, verify it with --read-data"
        )
    return index.astype(np.int64)


def class_dtype(classes: int) -> str:
    """The narrowest unsigned integer that holds every class of so many."""
    return np.min_scalar_type(classes - 1).name
