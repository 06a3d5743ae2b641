"""``int4``: four bits a value, on a grid of sixteen steps for each sample and channel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields, half_down, half_up
from softcache.codecs.int8 import by_channel

_MOST = 15


@dataclass(frozen=True)
class Int4:
    """``x ≈ low + step · value``: ``low`` is the channel's minimum rounded down to float16, ``step`` a 15th of its range
    rounded up; two values a byte, a channel's first one in the high bits.

    Channels are those of ``int8``. What a ReLU made zero stays zero. Error at most ``step / 2`` (and the last bits of a
    float32).
    """

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("feature_map", "embedding", "attribution")
    limit: ClassVar[float] = 65504.0

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        channels, each = _split(shape)
        return (
            Field("low", "float16", (channels,)),
            Field("step", "float16", (channels,)),
            Field("value", "uint8", (channels, -(-each // 2))),
        )

    def encode(self, values: np.ndarray) -> Fields:
        channels = by_channel(values)
        low = half_down(channels.min(axis=2))
        top = channels.max(axis=2).astype(np.float64)  # in float32 a small range would flush to zero
        step = half_up((top - low) / _MOST)
        divisor = np.where(step > 0, step, np.float16(1)).astype(np.float32)
        level = np.rint((channels - low.astype(np.float32)[:, :, None]) / divisor[:, :, None])
        level = np.pad(
            np.clip(level, 0, _MOST).astype(np.uint8), ((0, 0), (0, 0), (0, channels.shape[2] % 2))
        )
        return {"low": low, "step": step, "value": level[:, :, ::2] << 4 | level[:, :, 1::2]}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        packed, each = fields["value"], _split(shape)[1]
        values = np.empty((*packed.shape[:2], each), np.float32)
        values[:, :, ::2] = packed >> 4
        values[:, :, 1::2] = packed[:, :, : each // 2] & 15
        values *= fields["step"].astype(np.float32)[:, :, None]
        values += fields["low"].astype(np.float32)[:, :, None]
        return values.reshape(len(packed), *shape)

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        step, low = (fields[f].astype(np.float64) for f in ("step", "low"))
        half = step * (0.5 + 2.0**-18) + np.abs(low) * 2.0**-22
        return half.reshape(half.shape + (1,) * (len(shape) - 1))


def _split(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many channels a row has, and how many values each."""
    channels = shape[0] if len(shape) > 1 else 1
    return channels, prod(shape) // channels
