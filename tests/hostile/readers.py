"""What reads a stranger's files, one entry each in :data:`READERS`: good files, what is done to them, and the reading.

A new reader is added by a line there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hostile import mutate

import softcache as sc
from softcache import show
from softcache.drawing import overlay
from softcache.exchange import hdf5, webdataset
from softcache.pulled import Pulled
from softcache.recipe import gather, render
from softcache.testing import ToyImages, toy_detector, toy_teacher

SAMPLES = 11
Step = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Reader:
    """``make`` writes good files into a new folder; ``steps(folder, scratch)`` reads it, one thing after the other; in
    ``scratch`` it may write."""

    make: Callable[[Path], object]
    steps: Callable[[Path, Path], Iterator[Step]]
    mutations: dict[str, tuple[int, mutate.Mutation]]


def of_caches(make: Callable[[Path], object]) -> Reader:
    return Reader(make, read_cache, mutate.OF_CACHES)


def build(path: Path, teacher: Any, recipe: str, targets: dict[str, str], views: int = 2) -> None:
    sc.build(
        path,
        source=sc.Source(ToyImages(SAMPLES)),
        teacher=teacher,
        recipe=recipe,
        targets=targets,
        views=views,
        block_rows=4,
        batch=4,
        progress=False,
    )


def small(path: Path) -> None:
    targets = {"logits": "full(u8)", "map": "int8", "vector": "f16"}
    build(path, toy_teacher(), "random_resized_crop(8)|flip", targets)


def mixed(path: Path) -> None:
    """Ops on pixels, mosaics and mixes, and the codecs that keep indices."""
    recipe = "random_resized_crop(8)|flip|rand_augment|erase(p=1)|mosaic(p=1)|mixup(p=1)"
    targets = {"logits": "topk(2)", "map.attention": "attention(tau=0.5)", "map": "pool(2)|f16"}
    build(path, toy_teacher(), recipe, targets, views=3)


def detector(path: Path) -> None:
    targets = {"detections": "top(5, background=4)", "queries": "all", "p3": "int8"}
    build(path, toy_detector(), "letterbox(16)|flip", targets)


def argmax(path: Path) -> None:
    build(path, toy_teacher(), "zoom_out(p=1)|random_affine", {"logits": "argmax"})


def anchored(path: Path) -> None:
    targets = {"logits": "anchored(1, extra=1, views=2)"}
    build(path, toy_teacher(), "random_resized_crop(8)|flip", targets)


def read_cache(path: Path, scratch: Path) -> Iterator[Step]:
    """Whatever one does with a cache, teacher and trainer aside."""
    found: list[sc.Cache] = []
    source = sc.Source(ToyImages(SAMPLES))
    yield "open", lambda: found.append(sc.open(path))
    if not found:
        return
    cache = found[0]
    yield "ids", lambda: cache[cache.ids[-1], cache.views - 1]
    yield "show", lambda: show.tell(show.summary(cache))
    yield "verify", lambda: sc.verify(cache)
    yield "read_data", lambda: sc.verify(cache, read_data=True)
    some = np.arange(min(SAMPLES, cache.samples))
    last = np.array([cache.samples - 1, 0])
    for name in list(cache.targets)[:4]:
        yield "read", lambda name=name: values(cache.read(0, some, name)[name])
        yield "read", lambda name=name: values(cache.read(cache.views - 1, last, [name], slab=False)[name])
    for sample in {0, len(some) // 2, len(some) - 1}:
        yield "views", lambda sample=sample: seen(cache, source, sample, cache.views - 1)
    for name in list(cache.constants)[:40]:
        yield "constant", lambda name=name: cache.constant(name).sum()
    yield "pair", lambda: sc.pair(cache, source)
    yield "diff", lambda: sc.diff(cache, sc.open(path), rows=4)
    yield "several", lambda: sc.open([path, path]).read(0, some)
    yield "with_targets", lambda: sc.with_targets(ToyImages(SAMPLES), cache)[3]
    yield "overlay", lambda: overlay(cache, source, scratch / "drawn", rows=1, views=[0])


def values(decoded: Any) -> None:
    """All that a student is given of a target."""
    if hasattr(decoded, "top1"):
        decoded.top1()
        if decoded.holds(2.0):
            decoded.dense(2.0)
    if hasattr(decoded, "layout"):
        for part in decoded.parts.values():
            part.sum()
        if decoded.layout.scored:
            decoded.layout.scores(decoded.parts)
        if decoded.layout.layers > 1 and len(decoded.index):
            decoded.layer(-1)
    for one in [decoded[0]] if hasattr(decoded, "__getitem__") else []:
        assert one is not None
    if hasattr(decoded, "arrays"):
        decoded.arrays()


def seen(cache: sc.Cache, source: sc.Source, sample: int, number: int) -> None:
    """The pixels of a view."""
    view = cache.read_views(number, np.array([sample]))[0]
    images = gather(sample, view, lambda i: source.image(i))
    render(images[sample], view, (8, 8), images)


def tars(path: Path) -> None:
    """An export, with the pixels."""
    cache = path.with_name("exported")
    build(cache, toy_teacher(), "random_resized_crop(8)|flip", {"logits": "full(u8)", "map": "int8"})
    webdataset.export(sc.open(cache), path, embed="views", source=sc.Source(ToyImages(SAMPLES)))


def read_tars(path: Path, scratch: Path) -> Iterator[Step]:
    yield from read_cache(path, scratch)
    out = _emptied(scratch / "restored")
    yield "restore", lambda: webdataset.restore(path, out)


def one_file(path: Path) -> None:
    """A cache as one HDF5 file."""
    cache = path.with_name("exported")
    build(cache, toy_teacher(), "random_resized_crop(8)|flip", {"logits": "full(u8)", "map": "int8"})
    path.mkdir()
    hdf5.export(sc.open(cache), path / "cache.h5")


def read_one_file(path: Path, scratch: Path) -> Iterator[Step]:
    yield "recognise", lambda: hdf5.recognise(path / "cache.h5")
    out = _emptied(scratch / "restored")
    yield "restore", lambda: hdf5.restore(path / "cache.h5", out)


def _emptied(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def pulled(path: Path) -> None:
    """A cache of which one target is not here."""
    small(path)
    cache = sc.open(path)
    shutil.rmtree(path / "targets" / "vector")
    here = [cache.grid.blocks_per_view] * cache.views
    blocks = dict.fromkeys(("view", "logits", "map"), here)
    Pulled(remote="s3://x/y", tag="t", digest=cache.digest, blocks=blocks).to_file(cache.store)


READERS: dict[str, Reader] = {
    **{f.__name__: of_caches(f) for f in (small, mixed, detector, argmax, anchored)},
    "pulled": Reader(pulled, read_cache, mutate.OF_PULLED),
    "tars": Reader(tars, read_tars, mutate.OF_TARS),
    "hdf5": Reader(one_file, read_one_file, mutate.OF_FILES),
}
