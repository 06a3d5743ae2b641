"""Fixed point: 16 bits over a range that is known beforehand."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields

LOW, HIGH = -0.5, 1.5
_LEVELS = 65535


class Fixed:
    """Coordinates in the unit square of a view: ``x ≈ -0.5 + value · 2/65535``, clipped to −0.5 … 1.5.

    Error at most 1/65535 (a hundredth of a pixel of 640); of ``value`` 0 and 65535 unknown, they may have been clipped.
    """

    limit: ClassVar[float] = float(np.finfo(np.float32).max)

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        return (Field("value", "uint16", shape),)

    def encode(self, values: np.ndarray) -> Fields:
        clipped = np.clip(values.astype(np.float64), LOW, HIGH)
        return {"value": np.rint((clipped - LOW) * (_LEVELS / (HIGH - LOW))).astype(np.uint16)}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        return fields["value"].astype(np.float32) * np.float32((HIGH - LOW) / _LEVELS) + np.float32(LOW)

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        value, half = fields["value"], (HIGH - LOW) / _LEVELS / 2
        return np.where((value == 0) | (value == _LEVELS), np.inf, half + 2.0**-21)
