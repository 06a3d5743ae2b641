"""``head(f16)``: instead of class logits what the teacher's last layer makes them of; the layer is a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.f16 import F16
from softcache.codecs.fields import Field, Fields
from softcache.codecs.int8 import Int8
from softcache.errors import CodecError, DamageError, SpecError, nearest

WEIGHT, BIAS = CONSTANTS = ("class_weight", "class_bias")
_KINDS = {"f16": F16, "int8": Int8}


@dataclass(frozen=True)
class Head:
    """The embedding (d) that goes into the teacher's last linear layer, kept as ``dtype`` does; logits are
    ``class_weight`` (C, d) · embedding + ``class_bias`` (C), float32: small where d is much less than C, and right at any
    temperature. What is encoded is the teacher's answer ``logits.head``, of shape (d,).
    """

    dtype: str = "f16"

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("logits",)
    limit: ClassVar[float] = min(F16.limit, Int8.limit)
    taken: ClassVar[str] = ".head"  # what the teacher calls that, behind the target's name

    def __post_init__(self) -> None:
        if self.dtype not in _KINDS:
            raise SpecError(f"head: unknown number type {self.dtype!r}{nearest(str(self.dtype), _KINDS)}")

    @property
    def _inner(self) -> F16 | Int8:
        return _KINDS[self.dtype]()

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 1:
            raise CodecError(
                f"head keeps one vector an image, which a linear layer makes logits of, and the teacher gives {shape}"
            )
        return self._inner.fields(shape)

    def encode(self, values: np.ndarray) -> Fields:
        return self._inner.encode(values)

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """``fields``: those of the rows, and the layer's."""
        weight, bias = layer(fields, shape)
        return self._inner.decode(fields, shape) @ weight.T + bias

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """Of each logit, float64 (n, C): of the embedding's, times the weights; and the last bits of the sums."""
        weight, bias = (np.abs(part).astype(np.float64) for part in layer(fields, shape))
        kept = np.abs(self._inner.decode(fields, shape)).astype(np.float64)
        off = np.broadcast_to(self._inner.bound(fields, shape), kept.shape)
        return off @ weight.T + (kept @ weight.T + bias) * (shape[0] + 2) * 2.0**-24


def layer(constants: Fields, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The last layer: weight (C, d), bias (C,). :class:`DamageError` for what is none of an embedding of this shape."""
    weight, bias = constants[WEIGHT], constants[BIAS]
    fits = weight.ndim == 2 and weight.shape[1:] == shape and bias.shape == weight.shape[:1]
    if not fits or {weight.dtype, bias.dtype} != {np.dtype(np.float32)}:
        raise DamageError(
            f"{WEIGHT} {weight.dtype} {weight.shape} and {BIAS} {bias.dtype} {bias.shape} are no layer that makes logits of "
            f"embeddings {shape}"
        )
    return weight, bias
