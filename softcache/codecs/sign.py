"""``sign``: which neurons of a layer are on (Heo et al. 2019, "Knowledge Transfer via Distillation of Activation
Boundaries": of a layer before its ReLU)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields


@dataclass(frozen=True)
class Sign:
    """One bit a value: 1 above 0, −1 elsewhere, as float32. Exact."""

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("feature_map", "embedding")
    limit: ClassVar[float] = float(np.finfo(np.float32).max)

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        return (Field("value", "uint8", (-(-prod(shape) // 8),)),)

    def exact(self, values: np.ndarray) -> np.ndarray:
        """The signs of rows, float32."""
        return np.where(values > 0, np.float32(1), np.float32(-1))

    def encode(self, values: np.ndarray) -> Fields:
        return {"value": np.packbits((values > 0).reshape(len(values), prod(values.shape[1:])), axis=1)}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        on = np.unpackbits(fields["value"], axis=1, count=prod(shape))
        signs = on.astype(np.float32)
        signs *= 2
        signs -= 1
        return signs.reshape(len(on), *shape)

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros((len(fields["value"]), *(1 for _ in shape)))
