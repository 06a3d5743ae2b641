"""Class logits: one score a class, before the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from softcache.codecs import AnchoredLogits, HardLabels, SampledLogits, SparseLogits
from softcache.errors import SpecError

Other = SparseLogits | AnchoredLogits | SampledLogits | HardLabels


@dataclass(frozen=True)
class Logits:
    """``values``: float32 ``(…, C)``, the teacher's logits within the codec's bound."""

    values: np.ndarray

    def __getitem__(self, row: int) -> Logits:
        return Logits(self.values[row])

    def holds(self, T: float) -> bool:  # noqa: N803 - logits have every temperature
        return True

    def top1(self) -> np.ndarray:
        """The most probable class, int64 ``(…,)``."""
        return self.values.argmax(axis=-1)

    def arrays(self) -> np.ndarray:
        """The values, as a DataLoader stacks them."""
        return self.values

    def dense(self, T: float = 1.0) -> np.ndarray:  # noqa: N803 - the field's name
        """Log-probabilities ``log softmax(values / T)``, float32 ``(…, C)``. Raises :class:`SpecError` unless
        T is finite and above 0."""
        return self.log_probs(T).astype(np.float32)

    def log_probs(self, T: float = 1.0) -> np.ndarray:  # noqa: N803
        """As :meth:`dense`, in float64."""
        if not 0 < T < np.inf:
            raise SpecError(f"the temperature {T} is not finite and above 0")
        z = self.values.astype(np.float64) / T
        z -= z.max(axis=-1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


class LogitsKind:
    """Valid for the exact view they were computed on."""

    name = "logits"
    law = "view-locked"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 1

    def wrap(self, values: np.ndarray | Other) -> Logits | Other:
        return Logits(values) if isinstance(values, np.ndarray) else values
