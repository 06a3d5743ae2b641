"""``full(f16)`` and ``full(u8)``: every logit of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields, floats, half_down, half_up
from softcache.errors import CodecError, SpecError, nearest

_DTYPES = {"f16": "float16", "u8": "uint8"}


@dataclass(frozen=True)
class Full:
    """All ``C`` logits: as halves (``f16``), or as bytes on a grid of 256 steps per row (``u8``).

    ``u8``: ``x ≈ low + step · value``; ``low`` is the row's minimum rounded down to float16 and ``step`` a 255th
    of the range rounded up, so the error is at most ``step / 2`` (and the last bits of a float32).
    ``f16``: at most 2⁻¹¹·|x|, or 2⁻²⁵ for subnormal values.
    """

    dtype: str

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("logits",)
    limit: ClassVar[float] = 32752.0  # half of float16's range, so that step·255 cannot overflow it

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise SpecError(f"full({self.dtype}): unknown number type{nearest(self.dtype, _DTYPES)}")

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 1 or shape[0] < 2:
            raise CodecError(
                f"full({self.dtype}) holds one row of at least two class logits, and the teacher gives {shape}"
            )
        value = Field("value", _DTYPES[self.dtype], shape)
        if self.dtype == "f16":
            return (value,)
        return (Field("low", "float16", ()), Field("step", "float16", ()), value)

    def encode(self, values: np.ndarray) -> Fields:
        if self.dtype == "f16":
            return {"value": values.astype(np.float16)}
        rows = values.astype(np.float64)
        low = half_down(rows.min(axis=-1))
        step = half_up((rows.max(axis=-1) - low.astype(np.float64)) / 255)
        divisor = np.where(step > 0, step, np.float16(1)).astype(np.float64)
        rows -= low.astype(np.float64)[..., None]
        rows /= divisor[..., None]
        value = np.rint(rows, out=rows)
        return {"low": low, "step": step, "value": value.astype(np.uint8)}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        if self.dtype == "f16":
            return floats(fields["value"])
        value = fields["value"].astype(np.float32)
        value *= fields["step"].astype(np.float32)[..., None]
        value += fields["low"].astype(np.float32)[..., None]
        return value

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        value = np.abs(self.decode(fields, shape).astype(np.float64))
        if self.dtype == "f16":
            return np.maximum(value * (1.001 * 2.0**-11), 2.0**-25)
        step = fields["step"].astype(np.float64)[..., None]
        low = np.abs(fields["low"].astype(np.float64))[..., None]
        return step / 2 + (low + 256 * step) * 2.0**-22
