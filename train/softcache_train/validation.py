"""Which images a run is validated on, and how well a student does there.

Images are whole (no crop, no flip), resized to the student's size. None was trained on:

* a split given: its images, but those that the cache holds (the same id and the same pixels);
* else the images of the cache's own split that are not in the cache, if there are at least 100;
* else a tenth of the cache's samples, chosen by key, which are then left out of training; none
  where views are mixed or mosaics, for every sample is then seen in the views of others.

The choice does not depend on the run's seed, so runs of several seeds compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from softcache.cache import Cache
from softcache.canary import Pairing, class_labels
from softcache.errors import MismatchError, UnreadableImage
from softcache.keyed import Permutation
from softcache.recipe import View, render
from softcache.source import Source
from softcache_train.loader import normalise
from softcache_train.samples import Samples, trainable

ENOUGH = 100
HELD_OUT = 10  # one cached sample in so many
BATCH = 250
THREADS = 2


@dataclass(frozen=True)
class Split:
    """``train`` indices into ``cache.ids``; ``val`` int64 indices into ``source``,
    labelled."""

    train: Samples
    source: Source
    val: np.ndarray
    origin: str


def split(cache: Cache, source: Source, pairing: Pairing, val_source: Source | None, limit: int) -> Split:
    """Divide what is there. ``val`` is at most ``limit`` images, and empty where none has a
    label."""
    train, pool = trainable(cache), val_source or source
    labels = class_labels(cache, pool, np.arange(len(pool)))
    labelled = np.flatnonzero(labels >= 0)
    if val_source is not None:
        return Split(train, pool, _some(labelled, limit), f"split {pool.split!r}")
    outside = np.setdiff1d(labelled, pairing.index)
    if len(outside) >= ENOUGH:
        return Split(train, source, _some(outside, limit), "images outside the cache")
    if cache.mixed or cache.tiled:
        return Split(train, source, outside[:0], "")
    train = np.asarray(train)
    held = train[labels[pairing.index[train]] >= 0]
    held = _some(held, len(held) // HELD_OUT)
    origin = "samples of the cache held out of training"
    return Split(np.setdiff1d(train, held), source, pairing.index[_some(held, limit)], origin)


def _some(index: np.ndarray, count: int) -> np.ndarray:
    """``count`` of ``index`` (or all), chosen by key, sorted."""
    count = min(count, len(index))
    return np.sort(index[Permutation(len(index), "validation").inverse(np.arange(count))])


@dataclass(frozen=True)
class Images:
    """``pixels`` uint8 (N, h, w, 3), ``labels`` int64 (N,), ``message`` for a person."""

    pixels: np.ndarray
    labels: np.ndarray
    message: str

    def __len__(self) -> int:
        return len(self.labels)


def load(cache: Cache, source: Source, chosen: Split, size: tuple[int, int]) -> Images:
    """Decode and render the images to validate on, once; unreadable ones are left out.

    Raises :class:`MismatchError` when every one of a given split is an image of the cache.
    """
    cached = set(cache.ids) if chosen.source is not source else set()

    def whole(i: int) -> np.ndarray | None:
        id = chosen.source.ids[i]
        try:
            image = chosen.source.image(i)
            # In another split an id may name another image, as 001.png does in every folder.
            if id in cached and np.array_equal(image, source.image(source.index(id))):
                return None
        except UnreadableImage:
            return None
        height, width = image.shape[:2]
        return render(image, View(0, 0, width, height, width, height, flip=False), size)

    with ThreadPoolExecutor(THREADS) as pool:
        rendered = list(pool.map(whole, chosen.val.tolist()))
    good = [i for i, pixels in enumerate(rendered) if pixels is not None]
    if rendered and not good:
        raise MismatchError(
            f"every image of {chosen.source.describe()} is unreadable or one the cache holds: none "
            "is left to validate on; choose another val_split"
        )
    pixels = np.array([rendered[i] for i in good], np.uint8).reshape(-1, *size, 3)
    labels = class_labels(cache, chosen.source, chosen.val[good])
    left_out = len(rendered) - len(good)
    message = f"validation on {len(good):,} images: {chosen.origin}" + (
        f" ({left_out:,} left out: unreadable, or in the cache)" if left_out else ""
    )
    return Images(pixels, labels, message if good else _none(cache))


def _none(cache: Cache) -> str:
    crossed = cache.mixed or cache.tiled
    why = ": the cache mixes every sample into the views of others; give val_split" if crossed else ""
    return "no labelled image to validate on" + why


@torch.inference_mode()
def score(
    model: nn.Module, images: Images, input_spec: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """``top1`` in 0…1 of the model in eval mode; None without images. Leaves the model's mode alone.

    Of a student with exits (see :mod:`softcache_train.students`) also ``exits``, the top-1 of each, the last of which is
    ``top1``, and ``ensemble``, that of the mean of their logits.
    """
    if not len(images):
        return {"top1": None}
    answer, mode = getattr(model, "every_exit", None), model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64)
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        shown = normalise(images.pixels[part], input_spec).to(device)
        said = torch.stack(answer(shown) if answer else (model(shown),))
        classes = torch.cat([said, said.mean(0, keepdim=True)]).argmax(2).cpu()
        right = right + (classes == torch.from_numpy(images.labels[part])).sum(1)
    model.train(mode)
    *exits, ensemble = (n / len(images) for n in right.tolist())
    return {"top1": exits[-1]} | ({"exits": exits, "ensemble": ensemble} if answer else {})


def accuracy(
    model: nn.Module, images: Images, input_spec: Mapping[str, Any], device: torch.device
) -> float | None:
    """The ``top1`` of :func:`score`."""
    return score(model, images, input_spec, device)["top1"]
