"""Where a batch's targets come from: the cache, or a live teacher, behind one protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from softcache.cache import Cache


@dataclass(frozen=True)
class Dense:
    """A target of a batch with nothing left out: ``values`` float32 (B, …)."""

    values: Tensor

    def to(self, device: torch.device | str) -> Dense:
        return Dense(self.values.to(device, non_blocking=True))


class TargetSource(Protocol):
    """Rows → targets. ``size``: (height, width) of the pixels it must be given, None for none."""

    @property
    def size(self) -> tuple[int, int] | None: ...

    def __call__(self, view: int, samples: np.ndarray, pixels: np.ndarray | None) -> dict[str, Dense]:
        """Targets of ``samples`` (int64 (B,), indices into ``cache.ids``) in view number ``view``.

        ``pixels`` is the rendered views, uint8 (B, *size, 3), or None when ``size`` is None.
        """
        ...


class CacheTargets:
    """What the teacher said, read from the cache: the named targets, or all."""

    size = None

    def __init__(self, cache: Cache, names: Iterable[str] | None = None):
        self.cache = cache
        self.names = tuple(cache.targets if names is None else names)

    def __call__(self, view: int, samples: np.ndarray, pixels: np.ndarray | None = None) -> dict[str, Dense]:
        if not self.names:
            return {}
        decoded = self.cache.read(view, samples, self.names)
        return {name: Dense(torch.from_numpy(d.values)) for name, d in decoded.items()}
