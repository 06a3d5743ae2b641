"""A cache and its source → batches: the very pixels that the teacher saw, and what it said.

Ahead of the step, and in the order of the steps, a thread reads views and targets, and workers render pixels.
What a batch holds is a function of (seed, epoch, step, rank, world) alone.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache import canary
from softcache.cache import Cache
from softcache.errors import MismatchError, SpecError, counted, nearest
from softcache.indices import integers, is_whole
from softcache.pixels import normalise as normalised
from softcache.probes import Probes
from softcache.recipe import View, render
from softcache.recipe.options import rendered
from softcache.source import Source
from softcache.source.kept import Kept
from softcache_train.order import Order
from softcache_train.policy import THRESHOLD, ViewPolicy
from softcache_train.prefetch import Buffers, ahead, together
from softcache_train.rendering import Processes, draw
from softcache_train.samples import Every, Samples, as_stored, trainable
from softcache_train.shuffle import choose
from softcache_train.targets import BatchTarget, CacheTargets, TargetSource

DECODED_BYTES = 1 << 30  # decoded images kept in memory, so that a small dataset is decoded once


@dataclass(frozen=True)
class Batch:
    """One step's rows of one rank.

    ``images`` float32 (B, 3, h, w), normalised; ``labels`` int64 (B,), the cache's classes, −1
    where unknown and of a mosaic, which shows four samples; ``partner_labels`` likewise, of the
    samples they are mixed with, and ``lam``
    float32 (B,), the share of ``labels`` (unmixed: 1, and the same label twice); ``index`` int64
    (B,), indices into ``cache.ids``; ``numbers`` the cached view number (0, the canonical one, where
    views are fresh) and ``views`` the realised views that are shown;
    ``targets`` by name, also as ``batch["logits"]``.

    Where every image is shown in several views there is a number for each: the batch is so many equal parts,
    of the same samples in the same order, one after the other.
    """

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    index: np.ndarray
    numbers: tuple[int, ...]
    views: list[View]
    targets: dict[str, BatchTarget]

    @property
    def view(self) -> int:
        """The first of ``numbers``, as a rule the only one."""
        return self.numbers[0]

    def __getitem__(self, name: str) -> BatchTarget:
        if name not in self.targets:
            raise SpecError(f"the batch has no target {name!r}{nearest(name, self.targets)}")
        return self.targets[name]

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            partner_labels=self.partner_labels.to(device, non_blocking=True),
            lam=self.lam.to(device, non_blocking=True),
            targets={name: target.to(device) for name, target in self.targets.items()},
        )


class Loader:
    """Batches of a cache. Iterating gives the rest of one epoch, from ``epoch`` and ``step``.

    Both can be set, and say at every moment which batch comes next; at the end of an epoch
    ``epoch`` has grown by one. So a loop that was broken off goes on where it was.

    Args:
        source: the images the cache was built from; see :func:`softcache.canary.pair`.
        global_batch: rows a step over all ranks; the last, partial batch of an epoch is dropped.
        size: (h, w) of the pixels, or both in one number; by default that of ``input_spec``.
        input_spec: ``size``, ``mean``, ``std`` (of pixels in 0…1) and ``color``; the teacher's by
            default.
        workers: how many decode and render; 0 does all in the thread that iterates.
        processes: workers are processes, each with images of its own in memory, which pays where images are so small
            that threads wait for one another in Python. They are spawned: a script needs its
            ``if __name__ == "__main__":``.
        targets: names of the targets to read, or one name; all by default.
        target_source: where targets come from; the cache by default.
        samples: int64 indices into ``cache.ids`` to train on; all valid ones by default, of a cache that was
            pulled in part those that are here. Mixed views show their partners, too.
        views: train on the first so many of the cache's views; all that are here by default. Fresh views have no
            number.
        views_per_image: how many views of every image a batch holds, each image decoded once for them; they must divide
            both ``global_batch`` and ``views``. An epoch is so many times as long.
        shuffle: ``global``, or ``blocks``: see :mod:`softcache_train.shuffle`; ``auto`` is global where what an epoch
            reads fits in memory.
        pairing: of this cache and source, where it was made before.
        policy, recipe, warp_threshold: how cached targets go with the views that are shown, and how
            fresh views are drawn; see :mod:`softcache_train.policy`.

    Raises:
        MismatchError: the source is not the one the cache was built from, or lacks the boxes that a
            live teacher is asked at; or a target is constant across a batch, or cannot be warped.
        SpecError: no full batch fits, a sample is invalid, or an option cannot be understood.
    """

    def __init__(
        self,
        cache: Cache,
        source: Source,
        *,
        global_batch: int,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        input_spec: Mapping[str, Any] | None = None,
        workers: int = 2,
        targets: str | Iterable[str] | None = None,
        rank: int = 0,
        world: int = 1,
        target_source: TargetSource | None = None,
        samples: Samples | None = None,
        views: int | None = None,
        views_per_image: int = 1,
        shuffle: str = "auto",
        processes: bool = False,
        pairing: canary.Pairing | None = None,
        policy: str = "exact",
        recipe: str | None = None,
        warp_threshold: float = THRESHOLD,
    ):
        check_counts(global_batch, workers, rank, world)
        if not isinstance(processes, bool):
            raise SpecError(f"processes={processes!r}: True or False")
        self.input_spec = input_spec or cache.identity["teacher"]["input_spec"]
        self.size = rendered(self.input_spec["size"] if size is None else size)
        self.pairing = pairing or canary.pair(cache, source)
        self.cache, self.source = cache, source
        self.workers = workers
        self.rank, self.world = rank, world
        self.target_source = target_source or CacheTargets(cache, targets)
        self._samples = trainable(cache, targets) if samples is None else _checked(cache, samples)
        if views is not None and not 1 <= views <= cache.views:
            raise SpecError(f"views={views}, and the cache {cache.path} holds {cache.views}")
        self.policy = ViewPolicy.make(
            cache, policy, recipe, seed, self.target_source, warp_threshold, self._boxes
        )
        if rank == 0 and self.policy.warning:
            logging.getLogger(__name__).warning(self.policy.warning)
        shown = views or cache.pulled_views(targets)
        read = self.target_source.names if isinstance(self.target_source, CacheTargets) else ()
        blocks = choose(cache, len(self._samples), read, views_per_image, shuffle)
        self.order = Order(
            self._samples if blocks is None else as_stored(cache, self._samples),
            views_per_image if self.policy.fresh else shown,
            global_batch,
            seed,
            views_per_image,
            blocks,
        )
        if world > self.order.images:
            raise SpecError(f"{counted(self.order.images, 'image')} a batch leave some of {world} ranks none")
        self.labels = canary.class_labels(cache, source, self.pairing.index)
        self.image = Kept(source, DECODED_BYTES, self.pairing.index)
        self.probes = self._probes() if self.target_source.probed else None
        self._buffers = Buffers(workers + 4)
        self._spawned = Processes(self.image, workers) if processes and workers else None
        if self._spawned:
            weakref.finalize(self, self._spawned.close)
        self.epoch = self.step = 0

    def _probes(self) -> Probes | None:
        index = self.pairing.index
        if self.cache.identity["source"].get("boxes") and not self.source.has_boxes:
            raise MismatchError(
                f"the teacher of {self.cache.path} is asked at boxes, and {self.source.describe()} has "
                "none: use the source that the cache was built from"
            )
        asked = next(name for name, target in self.cache.targets.items() if target.kind == "probes")
        whose = self.cache.identity | {"teacher": self.cache.teacher(asked)}
        return Probes.of(whose, self.cache.ids, lambda i: self.source.boxes(int(index[i])))

    def _boxes(self, sample: int) -> np.ndarray | None:
        boxes = self.source.boxes(int(self.pairing.index[sample]))
        return None if boxes is None else boxes.xyxy

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self.order.steps

    @cached_property
    def samples(self) -> np.ndarray:
        """int64: the indices into ``cache.ids`` that are trained on."""
        return np.asarray(self._samples)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        steps = range(self.step, len(self))
        for step, asked, drawn in ahead(
            steps, self.workers, lambda step: self._ask(epoch, step), self._render
        ):
            self.step = step + 1
            yield self._batch(asked, drawn)
        self.epoch, self.step = epoch + 1, 0

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of one step, whatever was iterated before."""
        asked = self._ask(epoch, step)
        return self._batch(asked, self._render(asked))

    def _ask(self, epoch: int, step: int) -> _Asked:
        """What a step shows, and its targets, unless they are to be asked with the pixels."""
        rows, each = self.order.rows(epoch, step, self.rank, self.world), self.order.views_per_image
        fresh = self.policy.fresh
        numbers = tuple(0 if fresh else self.order.view(epoch, turn) for turn in range(each))
        views = [self.policy.views(epoch * each + turn, n, rows) for turn, n in enumerate(numbers)]
        asked = _Asked(rows, numbers, views, None)
        if self.target_source.size or self.target_source.probed or self.target_source.labelled:
            return asked
        return replace(asked, targets=self._buffers.pinned(self._targets(asked, None, [{}] * each)))

    def _render(self, asked: _Asked) -> _Drawn:
        """The student's images, and what a live teacher is given."""
        sizes = list({self.size, self.target_source.size or self.size})
        samples = asked.rows.tolist()
        if self._spawned:
            pixels = self._spawned.draw(samples, asked.views, sizes)
        else:
            pixels = draw(self.image, samples, asked.views, sizes, self._buffers.array)
        found = dict(zip(sizes, pixels, strict=True))
        labels = {"labels": self.labels[asked.rows].astype(np.int64)} if self.target_source.labelled else {}
        given = [{**labels} for _ in asked.views]
        if self.probes:
            for here, number, views in zip(given, asked.numbers, asked.views, strict=True):
                boxes = [self.probes(v, sample, number) for sample, v in zip(samples, views, strict=True)]
                here["probes"] = np.stack(boxes)
        own = found[self.size]
        height, width = self.size
        images = self._buffers.images((len(own), 3, height, width))
        normalised(own, self.input_spec, images.numpy())
        return _Drawn(images, self.target_source.size and found[self.target_source.size], given)

    def _targets(
        self, asked: _Asked, pixels: np.ndarray | None, given: Sequence[dict[str, np.ndarray]]
    ) -> dict[str, BatchTarget]:
        """What is said of all parts of a batch; ``pixels`` of all parts, ``given`` for each."""
        parts, rows, several = [], asked.rows, len(asked.numbers)
        shares = [None] * several if pixels is None else np.split(pixels, several)
        for number, views, own, more in zip(asked.numbers, asked.views, shares, given, strict=True):
            said = self.target_source(number, rows, own, **more)
            refuse_constant(said, len(np.unique(rows)))
            parts.append(self.policy.targets(said, number, rows, views))
        return parts[0] if several == 1 else {n: together([part[n] for part in parts]) for n in parts[0]}

    def _batch(self, asked: _Asked, drawn: _Drawn) -> Batch:
        targets = asked.targets
        if targets is None:
            targets = self._targets(asked, drawn.pixels, drawn.given)
        rows = np.tile(asked.rows, len(asked.numbers))
        views = [view for part in asked.views for view in part]
        own = list(zip(rows.tolist(), views, strict=True))
        partners = [(v.mix.partner, v.mix.view) if v.mix else (row, v) for row, v in own]
        lam = torch.tensor([v.mix.blend.share if v.mix else 1.0 for v in views], dtype=torch.float32)
        labels, others = (
            torch.tensor([-1 if v.mosaic else self.labels[i] for i, v in shown], dtype=torch.int64)
            for shown in (own, partners)
        )
        return Batch(drawn.images, labels, others, lam, rows, asked.numbers, views, targets)


@dataclass(frozen=True)
class _Asked:
    """What a step shows of ``rows``, int64: in each of its parts the views of one number; and what is said of all."""

    rows: np.ndarray
    numbers: tuple[int, ...]
    views: list[list[View]]
    targets: dict[str, BatchTarget] | None


@dataclass(frozen=True)
class _Drawn:
    """Of all parts, the images, and the pixels for a live teacher; of each, what else it is given."""

    images: Tensor
    pixels: np.ndarray | None
    given: list[dict[str, np.ndarray]]


def _checked(cache: Cache, samples: Any) -> Samples:
    """Samples that the caller chose. :class:`SpecError` for those that cannot be trained on."""
    if isinstance(samples, Every):
        return samples
    chosen = integers(samples)
    if chosen.ndim != 1 or ((chosen < 0) | (chosen >= cache.samples)).any():
        raise SpecError(f"samples are indices into cache.ids, from 0 to {cache.samples - 1}: {samples}")
    if refused := np.intersect1d(chosen, cache.invalid).tolist():
        raise SpecError(f"{cache.ids[refused[0]]!r} cannot be trained on: its image is unreadable")
    return chosen


def check_counts(global_batch: int, workers: int, rank: int, world: int) -> None:
    """:class:`SpecError` for numbers that no loader can work with."""
    for name, value, least in (
        ("global_batch", global_batch, 1),
        ("workers", workers, 0),
        ("world", world, 1),
        ("rank", rank, 0),
    ):
        if not is_whole(value) or value < least:
            raise SpecError(f"{name}={value!r}: it is a whole number, at least {least}")
    if rank >= world:
        raise SpecError(f"rank={rank}: the ranks of world={world} are 0 to {world - 1}")
    if world > global_batch:
        raise SpecError(f"a global batch of {global_batch} leaves some of {world} ranks no row")


def refuse_constant(targets: Mapping[str, BatchTarget], distinct: int) -> None:
    """:class:`MismatchError` for a target that is the same for all of several samples."""
    for name, target in targets.items():
        if distinct > 1 and target.constant():
            raise MismatchError(
                f"the target {name!r} is the same for all {distinct} samples of a batch: the "
                "teacher did not see its input, or this cache is not of these images"
            )


def stack_views(images: list[np.ndarray], views: list[View], size: tuple[int, int]) -> np.ndarray:
    """Rendered views that show nothing but their own images, uint8 (B, h, w, 3)."""
    pixels = np.empty((len(images), *size, 3), np.uint8)
    for out, image, view in zip(pixels, images, views, strict=True):
        out[:] = render(image, view, size)
    return pixels


def normalise(pixels: np.ndarray, input_spec: Mapping[str, Any]) -> Tensor:
    """uint8 RGB (B, h, w, 3) → float32 (B, 3, h, w); see :func:`softcache.pixels.normalise`."""
    return torch.from_numpy(normalised(pixels, input_spec))
