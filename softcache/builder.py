"""``build``: run the teacher over a source once, and keep what it said.

Run again after a crash it resumes: a block with a receipt is never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softcache import cache as caches
from softcache import loop, measure
from softcache.cache import Cache
from softcache.choice import kept_to, limits, settled
from softcache.commission import commission, teller
from softcache.finish import finish
from softcache.job import Job
from softcache.mend import reopened
from softcache.meter import Meter
from softcache.recipe import Recipe
from softcache.store import Store


def build(
    out: str | Path | Store,
    *,
    source: Any,
    teacher: str | Callable[..., Any] | Sequence[str | Callable[..., Any]],
    recipe: str = "identity",
    targets: Mapping[str, str] | Sequence[str] = ("logits=full(f16)",),
    views: int = 1,
    seed: int = 0,
    split: str | None = None,
    limit: int | None = None,
    layout: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    weights: str | Path | Sequence[str | Path | None] | None = None,
    allow_pickle: bool = False,
    precision: str = "fp32",
    device: str | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    color: str | None = None,
    flip_tta: bool = False,
    classes: str | Path | Sequence[str] | None = None,
    label_smoothing: float | None = None,
    head: str | None = None,
    licences: Mapping[str, str] | Sequence[str] = (),
    budget: int | str | None = None,
    max_kl: float | None = None,
    batch: int = 64,
    block_rows: int | None = None,
    skip_corrupt: bool = False,
    ignore_labels: bool = False,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    progress: bool = True,
) -> Cache:
    """Build a cache, or go on with one.

    Args:
        out: the cache's folder.
        source: a path, a map-style dataset, or a :class:`~softcache.Source`.
        teacher: ``torchvision:NAME``, ``timm:NAME``, ``onnx:FILE``, ``ultralytics:FILE``, ``hf:FOLDER``,
            ``package.module:factory``, a module or any callable; or a list of those, which run as one: see
            :mod:`softcache.teachers.ensemble`.
        recipe: how views are made, e.g. ``"crop(32, pad=4)|flip"``.
        targets: what to keep: ``{"logits": "full(u8)", "layer3": "int8"}``; a name other than ``logits`` is a module.
        views: views of each image. seed: keys the views and the order on disk.
        split, limit, layout, image_column, label_column: see :class:`~softcache.Source`.
        weights: the teacher's weights, safetensors (or a pickle, with ``allow_pickle``); of several, a list.
        precision: ``fp32``, ``bf16`` or ``fp16``. device: a torch device; CUDA where there is one.
        input_size, mean, std, color: what the teacher wants to see, where it does not say so itself.
        flip_tta: logits are the mean over an image and its mirror image.
        classes: the teacher's class names in its order, or a file of them, where it carries none: its logits are put
            into the order of the source's.
        label_smoothing: ε of the teacher's training; recorded, for who learns from it.
        head: of a detector's ONNX graph, what its outputs mean, where that is not plain: ``yolo``, ``yolox``, ``detr``.
        licences: of the source, the teacher and the cache, such as ``{"source": "CC-BY-4.0", "cache": "CC-BY-4.0"}``: see
            :mod:`softcache.licences`.
        budget: bytes that the cache may take, such as ``"20GB"``; max_kl: nats that T²·KL of logits may be, at the worst of
            T = 1, 2, 4, 8. With either the codecs are chosen, from a pilot: see :mod:`softcache.choice`; those
            that ``targets`` name are candidates, too. The choice and its reasons are in the manifest.
        batch: rows a teacher's batch. block_rows: rows a block; about 64 MiB by default.
        skip_corrupt: keep rows of unreadable images as invalid, instead of refusing.
        ignore_labels: the source's labels are not the teacher's classes; keep neither.
        rank, world: start at this builder's share of the blocks; every builder ends when all are done.
        workers: threads that decode and render.
        progress: print the live line and the summary on stderr.

    Returns:
        The open cache; ``cache.manifest.report`` holds what was measured.

    Raises:
        SoftcacheError: of the kinds in :mod:`softcache.errors`; what was committed stays committed.
    """
    settings = {name: value for name, value in locals().items() if name != "out"}
    say, store = teller(progress), out if isinstance(out, Store) else Store(out)
    wanted = limits(budget, max_kl)
    asked = commission(settings, say)
    if wanted:
        asked = settled(store, asked, wanted, say)
    else:
        kept_to(store, asked)
    job = asked.job(store)
    if job.source.rotation:
        say(job.source.rotation)
    if stretched := _stretched(job.recipe, job.teacher.input_spec.size):
        say(stretched)
    return complete(job, asked.licences, rank, world, workers, progress)


def complete(
    job: Job, licences: Mapping[str, str], rank: int, world: int, workers: int, progress: bool
) -> Cache:
    """Compute what is missing of a job's part, and put it into the manifest, with the licences that are stated.

    Returns the cache that is then there.
    """
    store, say, meter = job.store, teller(progress), Meter(0, show=False)
    job = reopened(job, say)
    if job.sealed is None or any(not store.exists(job.part.receipt(block)) for block in job.grid.blocks()):
        meter = loop.run(job, rank, world, workers, progress, say)
    else:
        say(f"{store.root} is complete: 0 rows through the teacher")
    pace = meter.pace()
    finish(job, licences)
    cache = caches.open(store.root)
    if {**cache.licences, **licences} != cache.licences:
        say(
            "NOTE: the cache was finished before, and keeps the licences it has: softcache licence states others"
        )
    cache.teacher_rows, cache.pace = meter.rows, pace
    say(measure.tell(cache))
    return cache


def _stretched(recipe: Recipe, size: tuple[int, int]) -> str:
    """A line for a person where views have other proportions than what the teacher sees."""
    if recipe.size is None and recipe.tiled:
        return (
            "NOTE: a mosaic without a size lays views of different proportions, which the teacher sees stretched: say "
            f"mosaic(({size[0]}, {size[1]})), whose tiles keep theirs"
        )
    if recipe.size is None or recipe.size[0] * size[1] == recipe.size[1] * size[0]:
        return ""
    views, seen = (f"{width}x{height}" for height, width in (recipe.size, size))
    return f"NOTE: the recipe's views are {views} and the teacher sees {seen}: they are stretched"
