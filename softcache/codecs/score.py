"""Class logits as their scores: a byte each on a grid that is fine where scores are small, as nearly all are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields

_TOP = 255
_LEAST = -64.0  # of ``rest``


def _score(t: np.ndarray) -> np.ndarray:
    """Places on the grid, 0 to 1, → scores."""
    return t * np.sqrt(t)


# Of each value the scores at its cell's lower and upper edge, and the one that it stands for.
_PLACE = np.arange(_TOP + 1.0)
_BELOW, _ABOVE = (_score(np.clip(_PLACE + half, 0, _TOP) / _TOP) for half in (-0.5, 0.5))
_MIDDLE = _score(np.where(_PLACE == _TOP, _TOP - 0.25, _PLACE) / _TOP)


@dataclass(frozen=True, eq=False)
class Score:
    """Logits ``(K, C)`` of K items as ``value``: their scores p (``softmax`` or sigmoid) as 255 · p^⅔, rounded.

    A score comes back as (value / 255)^1.5, off by at most 0.004 · p^⅓ (255 as if it were 254.75). Where ``value`` is 0
    (p below 9e-5) each is ``rest``, the logit of the mean p of all such, every item counted as often as its ``weight``
    says; so what they add up to is kept. Of a softmax logits are log p. ``value`` is class by class, (C, K): classes that
    an image does not show are runs of zeros, for zstd.

    ⅔ is between 1, cells of equal error of the gradient p̂ − p of sigmoid losses, and ½, cells of equal KL.
    """

    softmax: bool
    weight: np.ndarray

    limit: ClassVar[float] = 32752.0

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        return (Field("rest", "float16", ()), Field("value", "uint8", shape[::-1]))

    def encode(self, values: np.ndarray) -> Fields:
        p = np.exp(log_scores(values.astype(np.float64), self.softmax))
        value = np.rint(np.cbrt(p * p) * _TOP).astype(np.uint8)
        weight = np.where(value == 0, self.weight[:, None], 0)
        total = weight.sum(axis=(1, 2))
        mean = (weight * p).sum(axis=(1, 2)) / np.where(total > 0, total, 1)
        with np.errstate(divide="ignore"):
            rest = np.maximum(self._logit(mean), _LEAST).astype(np.float16)
        return {"rest": rest, "value": np.ascontiguousarray(value.swapaxes(1, 2))}

    def _logit(self, p: np.ndarray) -> np.ndarray:
        return np.log(p) - (0 if self.softmax else np.log1p(-p))

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        value = np.ascontiguousarray(fields["value"].swapaxes(1, 2))
        with np.errstate(divide="ignore"):
            logits = self._logit(_MIDDLE).astype(np.float32)[value]
        rest = fields["rest"].astype(np.float32)[:, None, None]
        np.copyto(logits, rest, where=value == 0)
        return logits

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """Of logits: to the further edge of the cell, infinity where that is a score of 0 or (of a sigmoid) 1."""
        with np.errstate(divide="ignore", invalid="ignore"):
            low, middle, high = (self._logit(p) for p in (_BELOW, _MIDDLE, _ABOVE))
            off = np.maximum(high - middle, middle - low)
        off[0] = np.inf
        return (off * (1 + 2.0**-20) + 2.0**-20)[fields["value"].swapaxes(1, 2)]


def log_scores(logits: np.ndarray, softmax: bool) -> np.ndarray:
    """Logarithms of the scores of float64 logits ``(…, C)``."""
    if softmax:
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return -np.logaddexp(0, -logits)
