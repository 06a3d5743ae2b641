"""How much a teacher's answers still tell of the classes that are not the answer, or has been erased of it.

Müller, Kornblith, Hinton 2019, "When Does Label Smoothing Help?", found that a teacher trained with label smoothing says of
all images of a class the same, and of all other classes as much; Shen et al. 2021, "Is Label Smoothing Truly Incompatible
with Knowledge Distillation", that this is not the whole story. These numbers are not theirs: they are the shares of a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from softcache.codecs import AnchoredLogits
from softcache.targets import Logits

if TYPE_CHECKING:
    from softcache.cache import Cache

ROWS = 1024  # that are read of a cache


@dataclass(frozen=True)
class Erasure:
    """Shares of log(C − 1) nats, the most that a row can tell of the C − 1 classes that are not its answer; they sum to 1.

    With q a row's probabilities at ``T`` without its most probable class, scaled to sum to 1, and q̄ the mean of q over the
    ``rows`` with the same answer: ``erased`` is the mean of H(q), 1 where nothing tells the other classes apart and 0 where
    one has all; ``of_class`` the mean of KL(q̄ ‖ even), what follows from the answer alone; ``of_image`` the mean of
    KL(q ‖ q̄), what an image adds to that. The last is low where few rows have an answer.
    """

    erased: float
    of_class: float
    of_image: float
    T: float
    rows: int

    def words(self) -> str:
        """``at T=4 61.0 % erased, 30.2 % said of the class, 8.8 % of the image (1,024 rows)``."""
        shares = f"{self.erased:.1%} erased, {self.of_class:.1%} said of the class, {self.of_image:.1%} of the image"
        return f"at T={self.T:g} {shares} ({self.rows:,} rows)"


def shares(log_probs: np.ndarray, T: float) -> Erasure | None:  # noqa: N803 - the field's name
    """Of log-probabilities at ``T``, float64 ``(n, C)``; None where there are no rows, or no two other classes."""
    rows, classes = log_probs.shape
    if not rows or classes < 3:
        return None
    answer = log_probs.argmax(axis=1)
    others = log_probs[np.arange(classes) != answer[:, None]].reshape(rows, classes - 1)
    q = np.exp(others - others.max(axis=1, keepdims=True))
    q /= q.sum(axis=1, keepdims=True)
    left = class_left = 0.0
    for own in (q[answer == one] for one in np.unique(answer)):
        left += _entropy(own).sum()
        class_left += len(own) * _entropy(own.mean(axis=0))
    erased, of_class = (float(x / (rows * math.log(classes - 1))) for x in (left, class_left))
    return Erasure(erased, 1 - of_class, of_class - erased, T, rows)


def of(cache: Cache, name: str, T: float, samples: np.ndarray) -> Erasure | None:  # noqa: N803
    """Of a target in the first view, from at most :data:`ROWS` of the ``samples``, evenly; None where its codec does not
    keep every logit, or none at ``T``."""
    said = cache.read(0, samples[:: max(1, -(-len(samples) // ROWS))], name, slab=False)[name]
    if not isinstance(said, Logits | AnchoredLogits) or not said.holds(T):
        return None
    return shares(said.log_probs(T), T)


def _entropy(p: np.ndarray) -> np.ndarray:
    """In nats, of the last axis."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
