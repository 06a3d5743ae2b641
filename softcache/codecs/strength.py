"""``strength(p)``: where a feature map is strong, as attention transfer compares it (Zagoruyko & Komodakis 2017, §3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.f16 import F16
from softcache.codecs.fields import Field, Fields
from softcache.errors import CodecError, SpecError


@dataclass(frozen=True)
class StrengthMap:
    """``values`` float32 ``(…, H, W)``, each of L2 norm 1, or 0 where the map was."""

    values: np.ndarray

    def __getitem__(self, row: int) -> StrengthMap:
        return StrengthMap(self.values[row])

    def arrays(self) -> np.ndarray:
        """The values, as a DataLoader stacks them."""
        return self.values


@dataclass(frozen=True)
class Strength:
    """Of a map F ``(C, H, W)``: Q / ‖Q‖₂ with Q = mean_c |F|^p, as halves: an image's size of one channel."""

    p: float = 2

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("attention_map",)
    limit: ClassVar[float] = float(np.finfo(np.float32).max)
    suffix: ClassVar[str] = ".strength"

    def __post_init__(self) -> None:
        if type(self.p) not in (int, float) or not 0 < self.p <= 16:
            raise SpecError(f"strength: p must be a number above 0, up to 16, not {self.p!r}")

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 3:
            raise CodecError(f"strength is of maps (C, H, W), and the teacher gives {shape}")
        return (Field("value", "float16", shape[1:]),)

    def exact(self, values: np.ndarray) -> StrengthMap:
        """Of feature maps, float32 ``(n, C, H, W)``, nothing rounded."""
        size = np.abs(values)
        most = size.max(axis=(1, 2, 3), keepdims=True)
        shares = np.divide(size, most, out=np.zeros_like(size), where=most > 0)  # or its power would overflow
        q = np.power(shares, self.p, dtype=np.float64).mean(axis=1)
        norm = np.sqrt(np.square(q).sum(axis=(1, 2), keepdims=True))
        return StrengthMap((q / np.where(norm > 0, norm, 1)).astype(np.float32))

    def encode(self, values: np.ndarray) -> Fields:
        return {"value": self.exact(values).values.astype(np.float16)}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> StrengthMap:
        return StrengthMap(fields["value"].astype(np.float32))

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """Of each value."""
        return F16().bound(fields, shape[1:])
