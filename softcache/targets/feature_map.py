"""Feature maps: the activations of a layer, channels first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FeatureMap:
    """``values``: float32 ``(…, C, H, W)``."""

    values: np.ndarray

    def __getitem__(self, row: int) -> FeatureMap:
        return FeatureMap(self.values[row])

    def arrays(self) -> np.ndarray:
        """The values, as a DataLoader stacks them."""
        return self.values

    def dense(self) -> np.ndarray:
        """The activations, float32 ``(…, C, H, W)``."""
        return self.values


class FeatureMapKind:
    """Moves with the view, approximately: no network is exactly equivariant."""

    name = "feature_map"
    law = "spatial"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3

    def wrap(self, values: np.ndarray) -> FeatureMap:
        return FeatureMap(values)
