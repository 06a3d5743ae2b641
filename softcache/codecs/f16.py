"""``f16``: IEEE half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields, floats


@dataclass(frozen=True)
class F16:
    """``value = float16(x)``. Error at most 2⁻¹¹·|x|, or 2⁻²⁵ for subnormal values."""

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("feature_map", "embedding", "attribution")
    limit: ClassVar[float] = 65504.0

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        return (Field("value", "float16", shape),)

    def encode(self, values: np.ndarray) -> Fields:
        return {"value": values.astype(np.float16)}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        return floats(fields["value"])

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        # |x| ≤ |value|·(1 + 2⁻¹¹)/(1 − 2⁻²²) < |value|·1.001: the stored value bounds the original.
        return np.maximum(np.abs(fields["value"].astype(np.float64)) * (1.001 * 2.0**-11), 2.0**-25)
