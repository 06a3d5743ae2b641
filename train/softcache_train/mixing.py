"""Mixed views that no teacher saw: two rows of a batch become one, and their cached probabilities are mixed like labels.

That is an approximation, since a teacher of a mixed picture does not answer with the mean of its answers to both. What it
says of mixes is cached by a recipe that mixes (``mixup``, ``cutmix``, ``mix``); this is for caches whose recipe does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from softcache import spec
from softcache.errors import MismatchError, SpecError
from softcache.keyed import Permutation, draws
from softcache.recipe.mix import Blend
from softcache.recipe.mixing import Cutmix, Mixing, Mixup, MixupOrCutmix
from softcache_train.objectives import OBJECTIVES
from softcache_train.targets import Anchored, BatchTarget, Dense, Mixed

if TYPE_CHECKING:
    from softcache.cache import Cache
    from softcache_train.config import Objective
    from softcache_train.loader import Batch

OPS: dict[str, type[Mixing]] = {"cutmix": Cutmix, "mix": MixupOrCutmix, "mixup": Mixup}

NOTE = "the targets are approximate, means of what the teacher said of two images; their mix it has not seen"


def parse(text: str) -> Mixing:
    """``mixup(0.8)``, ``cutmix``, ``mix(p=0.9)``: as the recipe's ops of these names. Raises :class:`SpecError`."""
    calls = spec.parse(text)
    if len(calls) != 1:
        raise SpecError(f"{text!r} is {len(calls)} steps: a batch is mixed once, by {', '.join(OPS)}")
    return spec.construct(calls[0], OPS, "mix")


def check(objectives: Iterable[Objective], cache: Cache) -> None:
    """Raise :class:`SpecError` for a cache whose views are mixed, and for what does not learn from probabilities."""
    if cache.mixed or cache.tiled:
        raise SpecError(
            f"approximate_mixing: the views of {cache.path} are mixed already, and their targets are exact: leave it out"
        )
    for asked in objectives:
        known = OBJECTIVES[asked.name]
        if not known.mixes or not (known.probabilities or known.reads == "labels"):
            raise SpecError(
                f"approximate_mixing: {asked.label} does not learn from labels or probabilities alone, and nothing else of "
                "a mixed view is known: build a cache whose recipe mixes, or leave it out"
            )


@dataclass(frozen=True)
class Mixer:
    """Mixes batches, each a function of (seed, epoch, step, rank) alone; partners are rows of the same rank."""

    op: Mixing
    seed: int
    rank: int = 0

    def __call__(self, batch: Batch, epoch: int, step: int) -> Batch:
        """``images`` mixed with those of the partners, and ``labels``, ``partner_labels``, ``lam`` and targets accordingly.

        Raises :class:`MismatchError` for a batch of one row, or targets that have no probabilities.
        """
        if len(batch) < 2:
            raise MismatchError("approximate_mixing: this rank's batch has one row: raise global_batch")
        size = batch.images.shape[2], batch.images.shape[3]
        keys = self.seed, epoch, step, self.rank
        blends = [self.op.blend(size, draws("blend", *keys, row)) for row in range(len(batch))]
        partner = torch.from_numpy(partners(len(batch), *keys)).to(batch.labels.device)
        shares = [1.0 if one is None else one.share for one in blends]
        lam = torch.tensor(shares, dtype=torch.float32).to(batch.lam.device)
        weights = torch.from_numpy(np.stack([weight(one, size) for one in blends])).to(batch.images.device)
        return replace(
            batch,
            images=weights * batch.images + (1 - weights) * batch.images[partner],
            partner_labels=batch.labels[partner],
            lam=lam,
            targets={name: mixed(name, target, partner, lam) for name, target in batch.targets.items()},
        )


def partners(rows: int, *keys: int) -> np.ndarray:
    """int64 (rows,): another row for each, every row once: the next in one ring of all, in a keyed order."""
    ring = Permutation(rows, "ring", *keys).forward(np.arange(rows))
    found = np.empty_like(ring)
    found[ring] = np.roll(ring, -1)
    return found


def weight(blend: Blend | None, size: tuple[int, int]) -> np.ndarray:
    """float32 (1, h, w): the picture's own share of every pixel; the partner has the rest."""
    own = np.full((1, *size), 1.0 if blend is None or blend.width else blend.share, np.float32)
    if blend is not None and blend.width:
        own[(0, *blend.box(size))] = 0
    return own


def mixed(name: str, target: BatchTarget, partner: Tensor, lam: Tensor) -> Mixed:
    """The target of every row, with that of its partner."""
    if isinstance(target, Dense):
        return Mixed(target, Dense(target.values[partner]), lam)
    if isinstance(target, Anchored):
        others = Anchored(target.values[partner], target.rest[partner], target.shift[partner])
        return Mixed(target, others, lam)
    raise MismatchError(
        f"approximate_mixing: the target {name!r} keeps a part of the logits, whose probabilities cannot be mixed: cache "
        "them with full(u8) or full(f16)"
    )
