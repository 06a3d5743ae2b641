"""Is this the source the cache was built from? Ids, class names, and rendered pixels are compared.

A cache keeps the pixels of a few of its views (the canaries). Rendering them again with this machine's decoder
and resampler, from this copy of the images, must give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from softcache import shown
from softcache.cache import Cache
from softcache.errors import DamageError, MismatchError, NotBuilt, UnreadableImage, counted
from softcache.keyed import draws
from softcache.recipe import OPS, RENDER_VERSION, View, gather, render
from softcache.recipe import mix as mixes
from softcache.recipe import mosaic as mosaics
from softcache.several import Joined, Several
from softcache.source import Source, digest_contents, digest_labels

COUNT = 8
TOLERANCE = 1.0  # mean absolute difference, in levels of 0…255, that is reported and still allowed


@dataclass(frozen=True)
class Pairing:
    """How a source answers to a cache.

    Attributes:
        index: int64 ``(samples,)``: where each of the cache's samples is in the source.
        classes: int64: the cache's class for each of the source's, by name; None when either has no names.
        message: one line for a person: what was compared, and how large the pixels' difference is.
        same_labels: whether the labels are those that the cache was built with; true where it was without.
    """

    index: np.ndarray
    classes: np.ndarray | None
    message: str
    same_labels: bool = True


def choose(samples: int, views: int, invalid: list[int], seed: int) -> list[tuple[int, int]]:
    """The (sample, view) rows that become canaries: up to eight, none of them invalid."""
    draw, refused, chosen = draws("canary", seed), set(invalid), []
    if len(refused) == samples:
        return []
    while len(chosen) < min(COUNT, (samples - len(refused)) * views):
        row = draw.integer(samples), draw.integer(views)
        if row[0] not in refused and row not in chosen:
            chosen.append(row)
    return chosen


def pair(cache: Cache, source: Source, tolerance: float = TOLERANCE, every: bool = False) -> Pairing:
    """Match a source to a cache by id, its classes by name, and check the canaries.

    With ``every``, the content of every image is read and compared too (the canaries are eight views).

    Raises:
        MismatchError: an id is missing, a class has no counterpart, the recipe's operations are of another
            version, the pixels differ by more than ``tolerance`` levels on average, or with ``every`` an image
            is another.
    """
    if not cache.complete:
        raise NotBuilt(f"{cache.path} is not finished: run the same build-cache command again, then train")
    if isinstance(cache, Joined):
        return _joined([pair(one, source, tolerance, every) for one in cache.members])
    for other in cache.members[1:] if isinstance(cache, Several) else ():
        pair(other, source, tolerance, every)
    _check_versions(cache)
    index = _index(cache, source)
    classes, mapped = _classes(cache.classes, source.classes)
    worst = _worst(cache, source, index)
    if worst > tolerance:
        raise MismatchError(
            f"the pixels of {source.describe()} are not those the cache {cache.path} was built on: they differ by "
            f"{worst:.1f} levels on average (at most {tolerance:g} is allowed). Are these the same images, and not "
            "resized or compressed again?"
        )
    pixels = "pixels equal" if worst == 0 else f"pixels differ by {worst:.3f} levels (allowed: {tolerance:g})"
    message = f"{counted(cache.samples, 'id')} found, {mapped}, {pixels} on {COUNT} views or fewer"
    if every:
        _check_contents(cache, source, index)
        message += ", every image the same"
    same = _same_labels(cache, source, index, classes)
    if not same:
        message += "; NOTE: its labels are not those the cache was built with"
    known = cache.identity["source"].get("boxes")
    if known is not None and known != source.digest_boxes(index.tolist()):
        message += "; NOTE: its boxes are not those the cache was built with"
    return Pairing(index, classes, message, same)


def class_labels(cache: Cache, source: Source, index: np.ndarray) -> np.ndarray:
    """int64, as ``index``: the cache's class, by name, of some images of ``source``; −1 if unknown, as
    all are where the cache was built with ``ignore_labels``."""
    labels = source.labels[index]
    if source.classes is None:
        return labels
    if cache.classes is None:
        return np.full_like(labels, -1)
    ours = {name: number for number, name in enumerate(cache.classes)}
    table = np.array([ours.get(name, -1) for name in source.classes], np.int64)
    return np.where(labels >= 0, table[labels], -1)


def _joined(pairings: list[Pairing]) -> Pairing:
    """Of caches of other samples, one after the other; their classes are the same."""
    return Pairing(
        np.concatenate([one.index for one in pairings]),
        pairings[0].classes,
        " + ".join(one.message for one in pairings),
        all(one.same_labels for one in pairings),
    )


def _check_versions(cache: Cache) -> None:
    recipe = cache.identity["recipe"]
    ours = {name: op.version for name, op in OPS.items()} | {"render": RENDER_VERSION}
    theirs = recipe["ops"] | {"render": recipe["render"].get("version")}
    for name, version in theirs.items():
        if ours.get(name) != version:
            raise MismatchError(
                f"the cache {cache.path} was made with version {version} of {name!r}, and this softcache has "
                f"{ours.get(name, 'none')}: its views would not be the same pixels. Install the softcache that made it"
            )


def _check_contents(cache: Cache, source: Source, index: np.ndarray) -> None:
    if digest_contents(cache.ids, source.contents(index.tolist())) != cache.identity["source"]["content"]:
        raise MismatchError(
            f"an image of {source.describe()} is not what it was when the cache {cache.path} was built: "
            "use the same copy of the dataset, or build a cache of this one"
        )


def _same_labels(cache: Cache, source: Source, index: np.ndarray, classes: np.ndarray | None) -> bool:
    known, labels = cache.identity["source"]["labels"], source.labels[index]
    if classes is not None:
        labels = np.where(labels >= 0, classes[labels], -1)
    return known is None or known == digest_labels(labels)


def _index(cache: Cache, source: Source) -> np.ndarray:
    if source.ids_digest == cache.identity["source"]["ids"]:
        return np.arange(cache.samples)
    places = {id: i for i, id in enumerate(source.ids)}
    missing = [id for id in cache.ids if id not in places]
    if missing:
        split = cache.identity["source"]["split"]
        raise MismatchError(
            f"{len(missing):,} of the cache's {cache.samples:,} ids are not in {source.describe()}, for example "
            f"{missing[0]!r}. The cache was built from "
            + (f"the split {split!r}" if split else "another folder")
        )
    return np.array([places[id] for id in cache.ids], np.int64)


def _classes(ours: tuple[str, ...] | None, theirs: tuple[str, ...] | None) -> tuple[np.ndarray | None, str]:
    if ours is None or theirs is None:
        return None, "no class names to compare"
    if ours == theirs:
        return np.arange(len(ours)), f"{counted(len(ours), 'class')} in the same order"
    unknown = [c for c in theirs if c not in ours]
    if unknown:
        raise MismatchError(
            f"the source's class {unknown[0]!r} is not one of the cache's: {', '.join(ours[:20])}"
        )
    table = ", ".join(f"{c} {i}→{ours.index(c)}" for i, c in enumerate(theirs) if ours.index(c) != i)
    return np.array([ours.index(c) for c in theirs]), f"classes matched by name: {table}"


def _worst(cache: Cache, source: Source, index: np.ndarray) -> float:
    """The largest mean absolute difference of a canary, in levels."""
    worst = 0.0
    size = tuple(cache.identity["teacher"]["input_spec"]["size"])
    for sample, view, kept in _canaries(cache, size):
        try:
            images = gather(sample, view, lambda i: source.image(int(index[i])))
        except UnreadableImage as e:
            raise MismatchError(f"a canary of the cache {cache.path} cannot be rendered: {e}") from e
        seen = render(images[sample], view, size, images)
        worst = max(worst, float(np.abs(seen.astype(np.int16) - kept).mean()))
    return worst


def _canaries(cache: Cache, size: tuple[int, int]) -> Iterator[tuple[int, View, np.ndarray]]:
    """Sample, view and pixels of each. :class:`DamageError` for canaries that no build writes."""
    samples = cache.constant("canary/sample")
    n = samples.size
    should = {"pixels": ((n, *size, 3), "uint8"), "sample": ((n,), "int64")}
    views = shown.room(n, cache.parameters, cache.mixed, cache.tiled)
    should |= {name: (rows.shape, rows.dtype.name) for name, rows in views.items()}
    kept = {name: cache.constant(f"canary/{name}") for name in should}
    found = {name: (values.shape, values.dtype.name) for name, values in kept.items()}
    if (
        found != should
        or (n and not 0 <= samples.min() <= samples.max() < cache.samples)
        or _impossible(cache, samples, kept)
    ):
        raise DamageError(f"the canaries of {cache.path} are not what a build writes: {found}")
    for i, sample in enumerate(samples.tolist()):
        yield sample, shown.view_of(kept, i), kept["pixels"][i]


def _impossible(cache: Cache, samples: np.ndarray, kept: Mapping[str, np.ndarray]) -> bool:
    """Is there a mix or a mosaic that no recipe draws?"""
    count, wrong = (cache.samples, cache.views), False
    if cache.tiled:
        wrong = mosaics.impossible(samples, kept["tiles"], kept["mosaic"], *count).any()
    if not wrong and cache.mixed:
        wrong = mixes.impossible(samples, kept["partner"], kept["mix"], *count).any()
    if not wrong and cache.mixed and cache.tiled:
        mixed = kept["partner"][:, 0] >= 0
        partners, tiles, frames = (
            kept[name][mixed] for name in ("partner", "partner_tiles", "partner_mosaic")
        )
        wrong = mosaics.impossible(partners[:, 0], tiles, frames, *count).any()
    return bool(wrong)
