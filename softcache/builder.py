"""``build``: run the teacher over a source once, and keep what it said.

One visible loop: claim a block, render its batches, run the teacher, encode, write the shards, then the receipt.
Run again after a crash it resumes: a block with a receipt is never computed again.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from softcache import cache as caches
from softcache import manifest as m
from softcache import measure
from softcache.block import Block
from softcache.cache import Cache
from softcache.checker import FOREIGN, verify
from softcache.errors import SourceError, SpecError, UnreadableImage
from softcache.finish import finish
from softcache.job import Job, check_sizes, prepare
from softcache.meter import Meter
from softcache.recipe import Recipe, render
from softcache.rows import Batch, Work, keep
from softcache.source import Source, find_unreadable
from softcache.store import Store
from softcache.targets import requests
from softcache.teachers import Options
from softcache.teachers.ensemble import assemble

_AHEAD = 4  # batches rendered ahead, and batches that may wait to be written


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
        teacher: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``, a module or any callable; or a
            list of those, which run as one: see :mod:`softcache.teachers.ensemble`.
        recipe: how views are made, e.g. ``"crop(32, pad=4)|flip"``.
        targets: what to keep: ``{"logits": "full(u8)", "layer3": "int8"}``; a name other than ``logits`` is a module.
        views: views of each image. seed: keys the views and the order on disk.
        split, limit, layout, image_column, label_column: see :class:`~softcache.Source`.
        weights: the teacher's weights, safetensors (or a pickle, with ``allow_pickle``); of several, a list.
        precision: ``fp32``, ``bf16`` or ``fp16``. device: a torch device; CUDA where there is one.
        input_size, mean, std, color: what the teacher wants to see, where it does not say so itself.
        flip_tta: logits are the mean over an image and its mirror image.
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
    if world < 1 or not 0 <= rank < world:
        raise SpecError(f"rank {rank} of world {world}: ranks go from 0 to world - 1")
    if batch < 1 or workers < 1 or (block_rows is not None and block_rows < 1):
        raise SpecError("batch, block_rows and workers are at least 1")
    asked, made = requests(targets), Recipe(recipe, seed)
    samples = open_source(source, split, limit, layout, image_column, label_column)
    check_sizes(samples, views)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    options = Options(
        allow_pickle=allow_pickle,
        taps=tuple(r.name for r in asked if r.name != "logits"),
        precision=precision,
        device=device,
        batch=batch,
        input_size=size,
        mean=mean,
        std=std,
        color=color,
        flip_tta=flip_tta,
    )
    say: Callable[[str], None] = _say if progress else _silent
    say(samples.describe())
    store = out if isinstance(out, Store) else Store(out)
    who = assemble(teacher, weights, options)
    job = prepare(store, samples, who, made, asked, views, block_rows, skip_corrupt, ignore_labels)
    if samples.rotation:
        say(samples.rotation)
    meter = Meter(0, show=False)
    _reopen(job, say)
    if not store.exists(m.MANIFEST):
        meter = _build_blocks(job, rank / world, workers, progress, say)
    else:
        say(f"{store.root} is complete: 0 rows through the teacher")
    pace = meter.pace()
    finish(job)
    cache = caches.open(store.root)
    cache.teacher_rows, cache.pace = meter.rows, pace
    say(measure.tell(cache))
    return cache


def _reopen(job: Job, say: Callable[[str], None]) -> None:
    """Take back the receipts of a finished cache's blocks that miss a file, so that they are made anew."""
    if not job.store.exists(m.MANIFEST):
        return
    found = verify(caches.open(job.store.root))
    damaged = [d for d in found if d.problem != FOREIGN and not d.file.endswith("zarr.json")]
    if not damaged:
        return
    say(
        f"{len(damaged):,} files of the cache are missing or cut, for example {damaged[0].file}: making them anew"
    )
    job.store.path(m.MANIFEST).unlink()
    blocks = {(d.view, d.shard) for d in damaged if d.view is not None and d.shard is not None}
    receipts = {m.Receipt.path(job.grid.block(view, shard)) for view, shard in blocks}
    for name in receipts | {d.file for d in damaged if d.file.startswith("receipts/v")}:
        job.store.path(name).unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


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


def _build_blocks(job: Job, share: float, workers: int, progress: bool, say: Callable[[str], None]) -> Meter:
    """Claim, compute and commit every block that has no receipt, with other builders at work or not.

    Returns the meter of what this builder did.
    """
    blocks = list(job.grid.blocks())
    first = int(share * len(blocks))
    blocks = blocks[first:] + blocks[:first]
    todo = [b for b in blocks if not job.store.exists(m.Receipt.path(b))]
    if len(todo) < len(blocks):
        say(f"{len(blocks) - len(todo):,} of {len(blocks):,} blocks are committed; going on with the rest")
    meter = Meter(sum(b.rows for b in todo), progress)
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer:
        while todo:
            try:
                _pass(job, todo, readers, writer, meter)
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                raise
            held = [b for b in todo if not job.store.exists(m.Receipt.path(b))]
            if held == todo:
                time.sleep(0.1)  # other builders hold all that is left
            todo = held
    say(meter.summary())
    return meter


def _pass(
    job: Job, todo: list[Block], readers: ThreadPoolExecutor, writer: ThreadPoolExecutor, meter: Meter
) -> None:
    waiting: deque[Future[int]] = deque()
    # Left in the opposite order: a claim is held until its block is written, whatever happens.
    with ExitStack() as claims, _finished(waiting):
        batches = _ahead(_rendered(job, todo, readers, claims), _AHEAD)
        while True:
            with meter.stage("decode"):
                future = next(batches, None)
                batch = None if future is None else future.result()
            if batch is None:
                break
            _refuse_unreadable(job, batch)
            with meter.stage("teacher"):
                answer = job.teacher(batch.pixels)
            with meter.stage("write"):
                waiting.append(writer.submit(keep, job, batch, answer))
                while len(waiting) > _AHEAD or (waiting and waiting[0].done()):
                    meter.bytes += waiting.popleft().result()
            meter.queue = len(waiting)
            meter.add(batch.rows)
        for done in waiting:
            meter.bytes += done.result()


@contextmanager
def _finished(futures: deque[Future[int]]) -> Iterator[None]:
    try:
        yield
    finally:
        wait(futures)


def _ahead(futures: Iterator[Future[Batch]], count: int) -> Iterator[Future[Batch]]:
    """The same futures, with ``count`` of them always submitted before they are asked for."""
    line: deque[Future[Batch]] = deque()
    for future in futures:
        line.append(future)
        if len(line) > count:
            yield line.popleft()
    yield from line


def _rendered(
    job: Job, todo: list[Block], readers: ThreadPoolExecutor, claims: ExitStack
) -> Iterator[Future[Batch]]:
    """Claim block after block, and hand their batches to the readers."""
    for block in todo:
        claim = claims.enter_context(ExitStack())
        if not claim.enter_context(job.store.claim(block.name)) or job.store.exists(m.Receipt.path(block)):
            claim.close()
            continue
        work = Work(block, job.grid.samples_of(block), claim)
        for start in range(0, block.rows, job.batch):
            yield readers.submit(_render, job, work, start)


def _render(job: Job, work: Work, start: int) -> Batch:
    samples = work.samples[start : start + job.batch].tolist()
    size = job.teacher.input_spec.size
    pixels = np.zeros((job.batch, *size, 3), np.uint8)
    views = m.view_rows(len(samples), job.recipe.parameters)
    unreadable = []
    for row, sample in enumerate(samples):
        try:
            image = job.source.image(sample)
        except UnreadableImage:
            unreadable.append(sample)
            continue
        view = job.recipe.view(job.source.ids[sample], work.block.view, image.shape[1], image.shape[0])
        pixels[row] = render(image, view, size)
        for name, numbers in view.fields().items():
            views[name][row] = numbers
    return Batch(work, start, len(samples), pixels, views, unreadable)


def _refuse_unreadable(job: Job, batch: Batch) -> None:
    if not batch.unreadable:
        return
    if job.skip_corrupt:
        batch.work.invalid += batch.unreadable
        return
    ids = find_unreadable(job.source)
    shown = ", ".join(map(repr, ids[:10])) + (f" and {len(ids) - 10:,} more" if len(ids) > 10 else "")
    raise SourceError(
        f"{len(ids):,} images cannot be read: {shown}. Say --skip-corrupt to keep their rows as invalid, "
        "or mend the images and build into a new folder"
    )
