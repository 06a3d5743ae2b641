"""Class logits: one score a class, before the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Logits:
    """``values``: float32 ``(…, C)``, the teacher's logits within the codec's bound."""

    values: np.ndarray

    def dense(self, T: float = 1.0) -> np.ndarray:  # noqa: N803 - the field's name
        """Log-probabilities ``log softmax(values / T)``, float32 ``(…, C)``."""
        if not T > 0:
            raise ValueError(f"temperature {T} is not positive")
        z = self.values.astype(np.float64) / T
        z -= z.max(axis=-1, keepdims=True)
        return (z - np.log(np.exp(z).sum(axis=-1, keepdims=True))).astype(np.float32)


class LogitsKind:
    """Valid for the exact view they were computed on."""

    name = "logits"
    law = "view-locked"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 1

    def wrap(self, values: np.ndarray) -> Logits:
        return Logits(values)
