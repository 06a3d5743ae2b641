"""A cache and its source → batches: the very pixels that the teacher saw, and what it said.

Pixels are rendered by threads, ahead of the step and in the order of the steps; targets are read by
the thread that iterates. What a batch holds is a function of (seed, epoch, step, rank, world)
alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache import canary
from softcache.cache import Cache
from softcache.errors import MismatchError, SpecError, nearest
from softcache.indices import integers, is_whole
from softcache.pixels import normalise as normalised
from softcache.probes import Probes
from softcache.recipe import View, gather, render
from softcache.recipe.options import rendered
from softcache.source import Source
from softcache.source.kept import Kept
from softcache_train.order import Order
from softcache_train.policy import THRESHOLD, ViewPolicy
from softcache_train.targets import BatchTarget, CacheTargets, TargetSource

DECODED_BYTES = 1 << 30  # decoded images kept in memory, so that a small dataset is decoded once


@dataclass(frozen=True)
class Batch:
    """One step's rows of one rank.

    ``images`` float32 (B, 3, h, w), normalised; ``labels`` int64 (B,), the cache's classes, −1
    where unknown and of a mosaic, which shows four samples; ``partner_labels`` likewise, of the
    samples they are mixed with, and ``lam``
    float32 (B,), the share of ``labels`` (unmixed: 1, and the same label twice); ``index`` int64
    (B,), indices into ``cache.ids``; ``view`` the cached view number (0, the canonical one, where
    views are fresh) and ``views`` the realised views that are shown;
    ``targets`` by name, also as ``batch["logits"]``.
    """

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    index: np.ndarray
    view: int
    views: list[View]
    targets: dict[str, BatchTarget]

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
        workers: threads that decode and render; 0 does it in the thread that iterates.
        targets: names of the targets to read, or one name; all by default.
        target_source: where targets come from; the cache by default.
        samples: int64 indices into ``cache.ids`` to train on; all valid ones by default, of a cache that was
            pulled in part those that are here. Mixed views show their partners, too.
        views: train on the first so many of the cache's views; all that are here by default. Fresh views have no
            number.
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
        samples: np.ndarray | None = None,
        views: int | None = None,
        pairing: canary.Pairing | None = None,
        policy: str = "exact",
        recipe: str | None = None,
        warp_threshold: float = THRESHOLD,
    ):
        check_counts(global_batch, workers, rank, world)
        self.input_spec = input_spec or cache.identity["teacher"]["input_spec"]
        self.size = rendered(self.input_spec["size"] if size is None else size)
        self.pairing = pairing or canary.pair(cache, source)
        self.cache, self.source = cache, source
        self.workers = workers
        self.rank, self.world = rank, world
        self.target_source = target_source or CacheTargets(cache, targets)
        samples = trainable(cache, targets) if samples is None else integers(samples)
        if samples.ndim != 1 or ((samples < 0) | (samples >= cache.samples)).any():
            raise SpecError(f"samples are indices into cache.ids, from 0 to {cache.samples - 1}: {samples}")
        if refused := np.intersect1d(samples, cache.invalid).tolist():
            raise SpecError(f"{cache.ids[refused[0]]!r} cannot be trained on: its image is unreadable")
        if views is not None and not 1 <= views <= cache.views:
            raise SpecError(f"views={views}, and the cache {cache.path} holds {cache.views}")
        self.policy = ViewPolicy.make(
            cache, policy, recipe, seed, self.target_source, warp_threshold, self._boxes
        )
        if rank == 0 and self.policy.warning:
            logging.getLogger(__name__).warning(self.policy.warning)
        self.order = Order(
            samples, 1 if self.policy.fresh else views or cache.pulled_views(targets), global_batch, seed
        )
        self.labels = canary.class_labels(cache, source, self.pairing.index)
        self.image = Kept(source, DECODED_BYTES, self.pairing.index)
        self.probes = self._probes() if self.target_source.probed else None
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

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        for step, batch in self._ahead(epoch, range(self.step, len(self))):
            self.step = step + 1
            yield batch
        self.epoch, self.step = epoch + 1, 0

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of one step, whatever was iterated before."""
        rows, view, views = self._rows(epoch, step)
        return self._batch(rows, view, views, *self._render(rows, view, views))

    def _ahead(self, epoch: int, steps: range) -> Iterator[tuple[int, Batch]]:
        """Batches in order, the pixels of the next few being rendered by the workers."""
        if not self.workers:
            yield from ((step, self.batch(epoch, step)) for step in steps)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="softcache-render")
        waiting: deque[tuple[int, Any, Future[Any]]] = deque()
        try:
            for step in steps:
                rows, view, views = self._rows(epoch, step)
                pixels = pool.submit(self._render, rows, view, views)
                waiting.append((step, (rows, view, views), pixels))
                if len(waiting) > self.workers + 1:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            pool.shutdown(cancel_futures=True)

    def _next(self, waiting: deque[tuple[int, Any, Future[Any]]]) -> tuple[int, Batch]:
        step, which, pixels = waiting.popleft()
        return step, self._batch(*which, *pixels.result())

    def _rows(self, epoch: int, step: int) -> tuple[np.ndarray, int, list[View]]:
        rows, view = self.order.rows(epoch, step, self.rank, self.world), self.order.view(epoch)
        return rows, view, self.policy.views(epoch, view, rows)

    def _render(
        self, rows: np.ndarray, view: int, views: list[View]
    ) -> tuple[Tensor, np.ndarray | None, dict[str, np.ndarray]]:
        """The student's images, and the pixels that the target source asks for, and what else."""
        asked = self.target_source.size
        pixels = {size: np.empty((len(rows), *size, 3), np.uint8) for size in {self.size, asked or self.size}}
        shown = list(zip(rows.tolist(), views, strict=True))
        for i, (sample, one) in enumerate(shown):
            images = gather(sample, one, self.image)
            for size, out in pixels.items():
                out[i] = render(images[sample], one, size, images)
        given = {}
        if self.target_source.labelled:
            given["labels"] = self.labels[rows].astype(np.int64)
        if self.probes:
            given["probes"] = np.stack([self.probes(one, sample, view) for sample, one in shown])
        return normalise(pixels[self.size], self.input_spec), asked and pixels[asked], given

    def _batch(
        self,
        rows: np.ndarray,
        view: int,
        views: list[View],
        images: Tensor,
        pixels: np.ndarray | None,
        given: dict[str, np.ndarray],
    ) -> Batch:
        targets = self.target_source(view, rows, pixels, **given)
        refuse_constant(targets, len(np.unique(rows)))
        targets = self.policy.targets(targets, view, rows, views)
        own = list(zip(rows.tolist(), views, strict=True))
        partners = [(v.mix.partner, v.mix.view) if v.mix else (row, v) for row, v in own]
        lam = torch.tensor([v.mix.blend.share if v.mix else 1.0 for v in views], dtype=torch.float32)
        labels, others = (
            torch.tensor([-1 if v.mosaic else self.labels[i] for i, v in shown], dtype=torch.int64)
            for shown in (own, partners)
        )
        return Batch(images, labels, others, lam, rows, view, views, targets)


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


def trainable(cache: Cache, targets: str | Iterable[str] | None = None) -> np.ndarray:
    """int64 indices into ``cache.ids`` of the samples whose images could be read, and whose targets (all
    that were pulled, by default) are here."""
    return np.setdiff1d(cache.pulled_samples(targets), cache.invalid)


def stack_views(images: list[np.ndarray], views: list[View], size: tuple[int, int]) -> np.ndarray:
    """Rendered views that show nothing but their own images, uint8 (B, h, w, 3)."""
    pixels = np.empty((len(images), *size, 3), np.uint8)
    for out, image, view in zip(pixels, images, views, strict=True):
        out[:] = render(image, view, size)
    return pixels


def normalise(pixels: np.ndarray, input_spec: Mapping[str, Any]) -> Tensor:
    """uint8 RGB (B, h, w, 3) → float32 (B, 3, h, w); see :func:`softcache.pixels.normalise`."""
    return torch.from_numpy(normalised(pixels, input_spec))
