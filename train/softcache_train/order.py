"""Which rows at which step: a pure function of (seed, epoch, step, rank, world)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from softcache.errors import SpecError
from softcache.keyed import Permutation, in_turn


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of a training run.

    An epoch shows every sample of ``samples`` (int64 (N,), indices into ``cache.ids``) once, in one
    view; each cycle of ``views`` epochs uses every view once. ``global_batch`` is the batch over
    all ranks; the last, partial batch of an epoch is dropped. Raises :class:`SpecError` when no
    full batch fits.
    """

    samples: np.ndarray
    views: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.global_batch <= len(self.samples):
            raise SpecError(
                f"global_batch={self.global_batch} does not fit {len(self.samples)} samples: "
                "an epoch would have no step; choose a batch from 1 to the number of samples"
            )

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.samples) // self.global_batch

    def view(self, epoch: int) -> int:
        """The view number, 0 … views-1, that every sample is seen in during ``epoch``."""
        return in_turn(self.views, epoch, "view", self.seed)

    def rows(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """int64 sample indices of one rank's share of one global batch.

        Ranks hold consecutive parts whose sizes differ by at most one; put together in order of
        rank they are the same global batch for any ``world``. Raises :class:`IndexError` outside
        the epoch.
        """
        if not (0 <= step < self.steps and 0 <= rank < world):
            raise IndexError(f"no step {step} of {self.steps}, or no rank {rank} of {world}")
        first = step * self.global_batch
        start, stop = (first + r * self.global_batch // world for r in (rank, rank + 1))
        shuffled = Permutation(len(self.samples), "rows", self.seed, epoch)
        return self.samples[shuffled.inverse(np.arange(start, stop))]
