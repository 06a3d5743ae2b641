"""``build``: run the teacher over a source once, and keep what it said.

One visible loop: claim a block in several views, decode an image once for all of them, render, run the teacher, encode,
write the shards, then the receipt.
Run again after a crash it resumes: a block with a receipt is never computed again.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from softcache import cache as caches
from softcache import measure
from softcache.arrays import keep_view, view_rows
from softcache.block import Block
from softcache.cache import Cache
from softcache.codecs import NOTHING
from softcache.errors import SourceError, SpecError, UnreadableImage, counted
from softcache.finish import finish
from softcache.job import Job, check, prepare
from softcache.licences import read as read_licences
from softcache.mend import reopened
from softcache.meter import Meter
from softcache.probes import COUNT
from softcache.recipe import Recipe, render
from softcache.rows import Batch, Work, keep
from softcache.source import Source, find_unreadable
from softcache.store import Store
from softcache.targets import Request, is_logits, requests, taps
from softcache.teachers import Options, Teacher, layouts_of
from softcache.teachers.classes import aligned
from softcache.teachers.classes import read as read_classes
from softcache.teachers.ensemble import assemble

_AHEAD = 4  # batches rendered ahead, and batches that may wait to be written
_PARTS = 8  # of a batch, rendered by threads
_TOGETHER = 256 << 20  # bytes of encoded rows and of pixels, of the views for which an image is decoded once


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
    named = any(is_logits(r.name) or r.name in heads for r in asked)
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
        meter = _build_blocks(job, rank, world, workers, progress, say)
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


# -- the loop ----------------------------------------------------------------------------------------------


def _build_blocks(
    job: Job, rank: int, world: int, workers: int, progress: bool, say: Callable[[str], None]
) -> Meter:
    """Claim, compute and commit every block that has no receipt, with other builders at work or not.

    Returns what was measured; ``rows`` is the rows that this builder's teacher answered.
    """
    groups = _groups(job, world)
    first = rank * len(groups) // world
    todo = _missing(job, groups[first:] + groups[:first])
    every, left = sum(map(len, groups)), sum(map(len, todo))
    if left < every:
        say(f"{every - left:,} of {every:,} blocks are committed; going on with the rest")
    meter = Meter(sum(b.rows for group in todo for b in group), progress)
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer:
        while todo:
            try:
                _pass(job, todo, readers, writer, meter)
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                raise
            held = _missing(job, todo)
            if held == todo:
                time.sleep(0.1)  # other builders hold all that is left
            todo = held
    say(meter.summary())
    return meter


def _groups(job: Job, world: int) -> list[list[Block]]:
    """All blocks; those in one list are views of the same samples, which are decoded once for all of them.

    They are as many as can be held in memory together, and not so many that one of ``world`` builders has none.
    """
    grid, (height, width) = job.grid, job.teacher.input_spec.size
    encoded = grid.block_rows * sum(a.row_bytes for a in job.arrays)
    pixels = 2 * job.batch * height * width * 3  # a batch at the teacher, and the next one
    most = min(_TOGETHER // (encoded + pixels), (grid.views - grid.first) * grid.blocks_per_view // world)
    views = np.arange(grid.first, grid.views)
    parts = np.array_split(views, -(-len(views) // max(1, most)))
    every = range(grid.blocks_per_view)
    return [[grid.block(v, index) for v in views.tolist()] for views in parts for index in every]


def _missing(job: Job, groups: list[list[Block]]) -> list[list[Block]]:
    """The blocks that have no receipt yet."""
    found = [[b for b in group if not job.store.exists(job.part.receipt(b))] for group in groups]
    return [group for group in found if group]


def _pass(
    job: Job, todo: list[list[Block]], readers: ThreadPoolExecutor, writer: ThreadPoolExecutor, meter: Meter
) -> None:
    waiting: deque[Future[int]] = deque()
    # Left in the opposite order: a claim is held until its block is written, whatever happens.
    with ExitStack() as claims, _finished(waiting):
        rendered = _ahead(_rendered(job, todo, readers, claims))
        while True:
            with meter.stage("decode"):
                batches = next(rendered, None)
            if batches is None:
                break
            for batch in batches:
                _refuse_unreadable(job, batch)
                with meter.stage("teacher"):
                    answer = job.teacher(batch.pixels, **batch.given)
                with meter.stage("write"):
                    waiting.append(writer.submit(keep, job, batch, answer))
                    while len(waiting) > _behind(answer) or (waiting and waiting[0].done()):
                        meter.bytes += waiting.popleft().result()
                meter.queue = len(waiting)
                meter.add(batch.rows)
        for done in waiting:
            meter.bytes += done.result()


def _behind(answer: Mapping[str, np.ndarray]) -> int:
    """Batches that may wait to be written: those of a detector take 300 MB each."""
    return min(_AHEAD, max(1, _TOGETHER // max(1, sum(values.nbytes for values in answer.values()))))


@contextmanager
def _finished(futures: deque[Future[int]]) -> Iterator[None]:
    try:
        yield
    finally:
        wait(futures)


def _ahead(rendered: Iterator[tuple[list[Batch], list[Future[None]]]]) -> Iterator[list[Batch]]:
    """The batches when they are done, with :data:`_AHEAD` of the next, or more, always being rendered meanwhile."""
    line: deque[tuple[list[Batch], list[Future[None]]]] = deque()
    for one in rendered:
        line.append(one)
        if sum(len(batches) for batches, _ in line) - len(line[0][0]) >= _AHEAD:
            yield _whole(*line.popleft())
    while line:
        yield _whole(*line.popleft())


def _whole(batches: list[Batch], parts: list[Future[None]]) -> list[Batch]:
    for part in parts:
        part.result()
    return batches


def _rendered(
    job: Job, todo: list[list[Block]], readers: ThreadPoolExecutor, claims: ExitStack
) -> Iterator[tuple[list[Batch], list[Future[None]]]]:
    """Claim group after group, and hand the same batch of each of its views to the readers."""
    for group in todo:
        works = [work for block in group if (work := _claimed(job, block, claims))]
        for start in range(0, group[0].rows, job.batch) if works else ():
            batches = [_empty(job, work, start) for work in works]
            rows = range(batches[0].rows)
            yield batches, [readers.submit(_render, job, batches, rows[i::_PARTS]) for i in range(_PARTS)]


def _claimed(job: Job, block: Block, claims: ExitStack) -> Work | None:
    """The block on its way; None where another builder has it, or had it."""
    claim = claims.enter_context(ExitStack())
    if claim.enter_context(job.store.claim(job.part.claim(block))) and not job.store.exists(
        job.part.receipt(block)
    ):
        return Work(block, job.grid.samples_of(block), claim)
    claim.close()
    return None


def _empty(job: Job, work: Work, start: int) -> Batch:
    rows = min(job.batch, work.block.rows - start)
    pixels = np.zeros((job.batch, *job.teacher.input_spec.size, 3), np.uint8)
    views = view_rows(rows, job.recipe.parameters, job.recipe.mixed, job.recipe.tiled)
    given = {"probes": np.zeros((job.batch, COUNT, 4), np.float32)} if job.probed else {}
    return Batch(work, start, rows, pixels, given, views, [NOTHING] * rows, [])


def _render(job: Job, batches: list[Batch], rows: range) -> None:
    """Fill some rows of batches that are views of the same samples: an image is decoded once."""
    first, size = batches[0], job.teacher.input_spec.size
    for row in rows:
        sample = int(first.work.samples[first.start + row])
        try:
            image = job.image(sample)
            for batch in batches:
                view, images = job.see(image, sample, batch.work.block.view)
                batch.pixels[row] = render(image, view, size, images)
                if job.probed:
                    batch.given["probes"][row] = job.probes(view, sample, batch.work.block.view)
                if job.boxed:
                    batch.objects[row] = job.objects(view, sample)
                keep_view(batch.views, row, view)
        except UnreadableImage:
            for batch in batches:
                batch.unreadable.append(sample)


def _refuse_unreadable(job: Job, batch: Batch) -> None:
    if not batch.unreadable:
        return
    if job.skip_corrupt:
        batch.work.invalid += batch.unreadable
        return
    ids = find_unreadable(job.source)
    shown = ", ".join(map(repr, ids[:10])) + (f" and {len(ids) - 10:,} more" if len(ids) > 10 else "")
    raise SourceError(
        f"{counted(len(ids), 'image')} cannot be read: {shown}. Say --skip-corrupt to keep their rows as invalid, "
        "or mend the images and build into a new folder"
    )
