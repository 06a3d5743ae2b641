"""``int8``: symmetric eight-bit integers, one scale a sample and channel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields, half_up


@dataclass(frozen=True)
class Int8:
    """``x ≈ scale · value`` with ``scale = max|x| / 127`` rounded up to float16.

    The channel is the first axis of a row (``C`` of a map, ``Q`` of queries); a vector has one scale. Error at
    most ``scale / 2`` (and the last bit of a float32).
    """

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("feature_map", "embedding", "attribution")
    limit: ClassVar[float] = 65504.0 * 127

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        channels = shape[:1] if len(shape) > 1 else (1,)
        return (Field("scale", "float16", channels), Field("value", "int8", shape))

    def encode(self, values: np.ndarray) -> Fields:
        channels = by_channel(values)
        scale = half_up(np.abs(channels).max(axis=2).astype(np.float64) / 127)  # float32 would flush to zero
        # A channel of zeros has scale 0: divide by one there, the quotient is zero.
        divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
        value = np.rint(channels / divisor[:, :, None]).astype(np.int8)
        return {"scale": scale, "value": value.reshape(values.shape)}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        channels = by_channel(fields["value"]) * fields["scale"].astype(np.float32)[:, :, None]
        return channels.reshape(fields["value"].shape)

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        scale = fields["scale"].astype(np.float64)
        half = scale * (0.5 + 127 * 2.0**-23)
        return half.reshape(half.shape + (1,) * (len(shape) - 1))


def by_channel(rows: np.ndarray) -> np.ndarray:
    """``(n, C, *rest)`` or ``(n, D)`` → ``(n, C, m)`` or ``(n, 1, D)``."""
    channels = rows.shape[1] if rows.ndim > 2 else 1
    return rows.reshape(len(rows), channels, prod(rows.shape[1:]) // channels)
