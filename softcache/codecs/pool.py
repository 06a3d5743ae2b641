"""``pool(n)|…``: a map is averaged over cells of n by n, and kept by the codec that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from softcache.codecs.fields import Field, Fields
from softcache.errors import CodecError, SpecError

if TYPE_CHECKING:
    from softcache.codecs import Codec, Decoded


@dataclass(frozen=True)
class Pool:
    """The step: mean over n × n places; where ``n`` does not divide a side, the last cells are of what there is."""

    n: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 2:
            raise SpecError(f"pool: n must be a whole number of at least 2, not {self.n!r}")

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the pooled map. Raises :class:`CodecError` for what is no map."""
        if len(shape) != 3:
            raise CodecError(f"pool({self.n}) is for maps (C, H, W), and the teacher gives {shape}")
        return (shape[0], *(-(-side // self.n) for side in shape[1:]))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """float32 ``(m, C, H, W)`` → ``(m, C, ⌈H/n⌉, ⌈W/n⌉)``, summed in float64."""
        pooled = np.empty((len(values), *self.shape(values.shape[1:])), np.float32)
        starts = [np.arange(0, side, self.n) for side in values.shape[2:]]
        counts = [np.diff([*s, side]) for s, side in zip(starts, values.shape[2:], strict=True)]
        for row, out in zip(values, pooled, strict=True):  # a row may be 10 MB
            down = np.add.reduceat(row, starts[0], axis=1, dtype=np.float64)
            out[:] = np.add.reduceat(down, starts[1], axis=2) / np.outer(*counts)
        return pooled


@dataclass(frozen=True)
class Pooled:
    """A codec of maps behind a step: fields, bound and decoded rows are those of the pooled map."""

    pool: Pool
    then: Codec

    @property
    def version(self) -> int:
        return self.then.version

    @property
    def limit(self) -> float:
        return self.then.limit

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.then.kinds if kind == "feature_map")

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        return self.then.fields(self.pool.shape(shape))

    def encode(self, values: np.ndarray) -> Fields:
        return self.then.encode(self.pool(values))

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> Decoded:
        return self.then.decode(fields, self.pool.shape(shape))

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        bound = self.then.bound(fields, self.pool.shape(shape))
        assert isinstance(bound, np.ndarray)
        return bound

    def exact(self, values: np.ndarray) -> np.ndarray:
        """Of the pooled maps, nothing rounded."""
        exact = getattr(self.then, "exact", None)
        return self.pool(values) if exact is None else exact(self.pool(values))
