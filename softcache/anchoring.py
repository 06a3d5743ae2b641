"""Bases on their way: what the views of an image share is made of its first ones, before any of them is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from softcache.codecs import Fields
from softcache.job import Job
from softcache.rows import Batch, Work, checked

Answer = dict[str, np.ndarray]


@dataclass
class Anchoring:
    """The bases of the samples of one block, whose first views, and perhaps others, are ``works``; claimed until they are
    kept."""

    works: Sequence[Work]
    claim: ExitStack
    made: list[dict[str, Fields]] = field(default_factory=list)

    def turn(self) -> Turn:
        """The next rows: a batch of each of the views."""
        return Turn(self)

    def make(self, job: Job, answered: Sequence[tuple[Batch, Answer]]) -> dict[str, Fields]:
        """The bases of some rows, of the batches of their first views. With the last rows, those of all are written."""
        found: dict[str, Fields] = {}
        for name in job.bases.made:
            codec = job.targets[name].anchored
            assert codec is not None
            said = [checked(job, name, answer, batch) for batch, answer in answered[: codec.views]]
            found[name] = codec.anchor(np.stack(said))
        self.made.append(found)
        batch = answered[0][0]
        if batch.last:
            whole = {
                name: {f: np.concatenate([part[name][f] for part in self.made]) for f in fields}
                for name, fields in found.items()
            }
            job.bases.put(batch.work.block.index, whole)
            self.claim.close()
        return found


@dataclass
class Turn:
    """The same rows of several views: batches wait until the first views are all answered."""

    of: Anchoring
    waiting: list[tuple[Batch, Answer]] = field(default_factory=list)
    bases: dict[str, Fields] | None = None

    def take(self, job: Job, batch: Batch, answer: Answer) -> list[tuple[Batch, Answer]]:
        """The batches that can be encoded now: none, the first views' together, or this one."""
        self.waiting.append((batch, answer))
        if self.bases is None and len(self.waiting) < job.bases.views:
            return []
        ready, self.waiting = self.waiting, []
        if any(work.broken for work in self.of.works):
            return ready
        if self.bases is None:
            try:
                self.bases = self.of.make(job, ready)
            except BaseException:
                for work in self.of.works:  # nothing of them may be committed
                    work.broken = True
                raise
        return ready
