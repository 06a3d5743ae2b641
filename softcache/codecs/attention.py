"""``attention(tau)``: where a feature map is strong, and in which channels, as FGD weighs its loss by (Yang 2022, §3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.f16 import F16
from softcache.codecs.fields import Field, Fields
from softcache.errors import CodecError, SpecError


@dataclass(frozen=True)
class AttentionMap:
    """``spatial`` float32 ``(…, H, W)``, whose mean is 1, and ``channel`` float32 ``(…, C)``, likewise."""

    spatial: np.ndarray
    channel: np.ndarray

    def __getitem__(self, row: int) -> AttentionMap:
        return AttentionMap(self.spatial[row], self.channel[row])

    def arrays(self) -> dict[str, np.ndarray]:
        """Both by name, as a DataLoader stacks them."""
        return {"spatial": self.spatial, "channel": self.channel}


@dataclass(frozen=True)
class Attention:
    """Of a map F ``(C, H, W)``: ``spatial`` = H·W · softmax over the places of mean_c |F| / tau, ``channel`` = C · softmax
    over the channels of mean_hw |F| / tau; both as halves, error as of ``f16``."""

    tau: float = 0.5

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("attention_map",)
    limit: ClassVar[float] = float(np.finfo(np.float32).max)
    suffix: ClassVar[str] = ".attention"

    def __post_init__(self) -> None:
        if type(self.tau) not in (int, float) or self.tau <= 0:
            raise SpecError(f"attention: tau must be a number above 0, not {self.tau!r}")

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 3 or max(shape[0], shape[1] * shape[2]) > F16.limit:
            raise CodecError(
                f"attention is of maps (C, H, W) of up to {F16.limit:,.0f} channels, and places, and the teacher gives "
                f"{shape}"
            )
        return (Field("channel", "float16", shape[:1]), Field("spatial", "float16", shape[1:]))

    def exact(self, values: np.ndarray) -> AttentionMap:
        """Of feature maps, float32 ``(n, C, H, W)``, nothing rounded."""
        n, _, h, w = values.shape
        strength = np.abs(values)
        places = strength.mean(axis=1, dtype=np.float64).reshape(n, h * w)
        channels = strength.mean(axis=(2, 3), dtype=np.float64)
        spatial, channel = (self._weights(x).astype(np.float32) for x in (places, channels))
        return AttentionMap(spatial.reshape(n, h, w), channel)

    def _weights(self, strength: np.ndarray) -> np.ndarray:
        weights = np.exp((strength - strength.max(axis=1, keepdims=True)) / self.tau)
        return strength.shape[1] * weights / weights.sum(axis=1, keepdims=True)

    def encode(self, values: np.ndarray) -> Fields:
        return {name: part.astype(np.float16) for name, part in self.exact(values).arrays().items()}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> AttentionMap:
        return AttentionMap(fields["spatial"].astype(np.float32), fields["channel"].astype(np.float32))

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Of each part."""
        return {name: F16().bound({"value": part}, part.shape[1:]) for name, part in fields.items()}
