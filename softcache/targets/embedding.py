"""Embeddings: one vector a sample ``(D,)``, or one a query or token ``(Q, D)``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Embedding:
    """``values``: float32 ``(…, D)`` or ``(…, Q, D)``."""

    values: np.ndarray

    def __getitem__(self, row: int) -> Embedding:
        return Embedding(self.values[row])

    def arrays(self) -> np.ndarray:
        """The values, as a DataLoader stacks them."""
        return self.values

    def dense(self) -> np.ndarray:
        """The vectors, float32."""
        return self.values


class EmbeddingKind:
    """Valid for the exact view they were computed on."""

    name = "embedding"
    law = "view-locked"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) in (1, 2)

    def wrap(self, values: np.ndarray) -> Embedding:
        return Embedding(values)
