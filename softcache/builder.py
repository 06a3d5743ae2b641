"""``build``: run the teacher over a source once, and keep what it said.

Run again after a crash it resumes: a block with a receipt is never computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softcache import cache as caches
from softcache import loop, measure
from softcache.cache import Cache
from softcache.errors import SpecError
from softcache.finish import finish
from softcache.job import Job, check, prepare
from softcache.licences import read as read_licences
from softcache.mend import reopened
from softcache.meter import Meter
from softcache.recipe import Recipe
from softcache.source import Source
from softcache.store import Store
from softcache.targets import Request, is_attribution, is_logits, requests, taps
from softcache.teachers import Options, Teacher, layouts_of
from softcache.teachers.classes import aligned
from softcache.teachers.classes import read as read_classes
from softcache.teachers.ensemble import assemble


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
    check_numbers(rank, world, batch, workers, label_smoothing)
    asked, made = requests(targets), Recipe(recipe, seed)
    stated = {what: one for what, one in read_licences(licences).items() if one}
    samples = open_source(source, split, limit, layout, image_column, label_column)
    check(samples, views, block_rows, made)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    options = Options(
        allow_pickle=allow_pickle,
        taps=taps(asked),
        precision=precision,
        device=device,
        batch=batch,
        input_size=size,
        mean=mean,
        std=std,
        color=color,
        flip_tta=flip_tta,
        label_smoothing=label_smoothing,
        head=head,
    )
    say = teller(progress)
    say(samples.describe())
    store = out if isinstance(out, Store) else Store(out)
    who = assemble(teacher, weights, options)
    who = in_order(who, asked, classes, None if ignore_labels else samples.classes, say)
    job = prepare(store, samples, who, made, asked, views, block_rows, skip_corrupt, ignore_labels)
    if samples.rotation:
        say(samples.rotation)
    if stretched := _stretched(made, who.input_spec.size):
        say(stretched)
    return complete(job, stated, rank, world, workers, progress)


def in_order(
    teacher: Teacher,
    asked: Iterable[Request],
    said: str | Path | Sequence[str] | None,
    wanted: tuple[str, ...] | None,
    say: Callable[[str], None],
) -> Teacher:
    """The teacher with its classes in the order ``wanted``, where something is asked for that has classes; see
    :func:`softcache.teachers.classes.aligned`. ``said``: its class names, or their file."""
    heads = {name for name, one in layouts_of(teacher).items() if one.classes}
    named = any(is_logits(r.name) or r.name in heads or is_attribution(r.tap) for r in asked)
    return aligned(teacher, read_classes(said), wanted if named else None, say)


def check_numbers(
    rank: int, world: int, batch: int | None, workers: int, label_smoothing: float | None
) -> None:
    """Refuse numbers that cannot be."""
    if world < 1 or not 0 <= rank < world:
        raise SpecError(f"rank {rank} of world {world}: ranks go from 0 to world - 1")
    if (batch is not None and batch < 1) or workers < 1:
        raise SpecError("batch and workers are at least 1")
    if label_smoothing is not None and not 0 <= label_smoothing < 1:
        raise SpecError(f"label_smoothing {label_smoothing}: it is from 0 up to 1, such as 0.1")


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


def teller(progress: bool) -> Callable[[str], None]:
    """Prints lines on stderr, or does nothing."""
    return (lambda text: print(text, file=sys.stderr, flush=True)) if progress else (lambda text: None)


def open_source(
    source: Any,
    split: str | None,
    limit: int | None,
    layout: str | None,
    image_column: str | None,
    label_column: str | None,
) -> Source:
    """The source that :func:`build` is asked to read, by the arguments of their names."""
    if isinstance(source, Source):
        if any(v is not None for v in (split, limit, layout, image_column, label_column)):
            raise SpecError(
                "split, limit, layout and columns belong to the Source you made; leave them out here"
            )
        return source
    return Source(
        source, split=split, limit=limit, layout=layout, image_column=image_column, label_column=label_column
    )
