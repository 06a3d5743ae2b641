"""Which rows at which step: a pure function of (seed, epoch, step, rank, world)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from softcache.errors import SpecError
from softcache.indices import is_whole
from softcache.keyed import Permutation, in_turn
from softcache_train.samples import Samples
from softcache_train.shuffle import Blocks


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of a training run, at a cost that does not depend on their number.

    An epoch shows every one of ``samples`` (indices into ``cache.ids``) once, in one view; each cycle of
    ``views`` epochs uses every view once. ``global_batch`` is the batch over all ranks; the last, partial
    batch of an epoch is dropped.

    With ``views_per_image`` an epoch shows every sample in so many views, together in one batch, and so is so many
    times as long, and a cycle so many times shorter. With ``blocks`` the samples are given in the order in which they
    lie, and are shuffled block by block; else globally.

    Raises :class:`SpecError` when no full batch fits, or views do not come out even.
    """

    samples: Samples
    views: int
    global_batch: int
    seed: int
    views_per_image: int = 1
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        each = self.views_per_image
        if not is_whole(each) or each < 1:
            raise SpecError(f"views_per_image={each!r}: it is a whole number, at least 1")
        if self.global_batch % each:
            raise SpecError(
                f"views_per_image={each} does not divide global_batch={self.global_batch}: "
                "a batch holds all views of an image"
            )
        if self.views % each:
            raise SpecError(
                f"views_per_image={each} does not divide the {self.views} views that are trained on, so that an image would "
                f"meet a view twice: train on views={self.views - self.views % each or each}, or show another number"
            )
        if not 1 <= self.images <= len(self.samples):
            raise SpecError(
                f"global_batch={self.global_batch} does not fit {len(self.samples)} samples: "
                "an epoch would have no step; choose a batch from 1 to the number of samples"
            )

    @property
    def images(self) -> int:
        """Samples a global batch."""
        return self.global_batch // self.views_per_image

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.samples) // self.images

    def view(self, epoch: int, turn: int = 0) -> int:
        """The view number, 0 … views-1, that every sample is seen in during ``epoch``; of several, the ``turn``-th."""
        return in_turn(self.views, epoch * self.views_per_image + turn, "view", self.seed)

    def rows(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """int64 sample indices of one rank's share of one global batch, each once however many views it is shown in.

        Ranks hold consecutive parts whose sizes differ by at most one; put together in order of
        rank they are the same global batch for any ``world``. Raises :class:`IndexError` outside
        the epoch.
        """
        if not (0 <= step < self.steps and 0 <= rank < world):
            raise IndexError(f"no step {step} of {self.steps}, or no rank {rank} of {world}")
        first = step * self.images
        start, stop = (first + r * self.images // world for r in (rank, rank + 1))
        places, keys = np.arange(start, stop), (self.seed, epoch)
        if self.blocks is None:
            return self.samples[Permutation(len(self.samples), "rows", *keys).inverse(places)]
        return self.samples[self.blocks.inverse(len(self.samples), places, *keys)]
