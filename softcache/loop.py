"""One visible loop: claim a block in several views, decode an image once for all of them, render, run the teacher, encode,
write the shards, then the receipt.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager

import numpy as np

from softcache.anchoring import Anchoring, Turn
from softcache.arrays import keep_view, view_rows
from softcache.block import Block
from softcache.codecs import NOTHING
from softcache.errors import DamageError, SourceError, UnreadableImage, counted
from softcache.job import Job
from softcache.meter import Meter
from softcache.probes import COUNT
from softcache.recipe import render
from softcache.rows import Batch, Work, keep
from softcache.source import find_unreadable

_AHEAD = 4  # batches rendered ahead, and batches that may wait to be written
_PARTS = 8  # of a batch, rendered by threads
_TOGETHER = 256 << 20  # bytes of encoded rows and of pixels, of the views for which an image is decoded once


def run(job: Job, rank: int, world: int, workers: int, progress: bool, say: Callable[[str], None]) -> Meter:
    """Claim, compute and commit every block that has no receipt, with other builders at work or not.

    Returns what was measured; ``rows`` is the rows that this builder's teacher answered.
    """
    whole = groups(job, world)
    first = rank * len(whole) // world
    todo = missing(job, whole[first:] + whole[:first])
    every, left = sum(map(len, whole)), sum(map(len, todo))
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
            held = missing(job, todo)
            if held == todo:
                time.sleep(0.1)  # other builders hold all that is left
            todo = held
    say(meter.summary())
    return meter


def groups(job: Job, world: int) -> list[list[Block]]:
    """All blocks; those in one list are views of the same samples, which are decoded once for all of them.

    They are as many as can be held in memory together, and not so many that one of ``world`` builders has none; but those
    that bases are made of are in one.
    """
    grid, (height, width) = job.grid, job.teacher.input_spec.size
    encoded = grid.block_rows * sum(a.row_bytes for a in job.arrays)
    pixels = 2 * job.batch * height * width * 3  # a batch at the teacher, and the next one
    most = max(
        1, min(_TOGETHER // (encoded + pixels), (grid.views - grid.first) * grid.blocks_per_view // world)
    )
    views, first = np.arange(grid.first, grid.views), max(most, job.bases.views) if job.bases.views else 0
    parts = [views[:first], *np.array_split(views[first:], -(-len(views[first:]) // most) or 1)]
    every = range(grid.blocks_per_view)
    return [[grid.block(v, index) for v in some.tolist()] for some in parts if some.size for index in every]


def missing(job: Job, whole: list[list[Block]]) -> list[list[Block]]:
    """The blocks that have no receipt yet."""
    found = [[b for b in group if not job.store.exists(job.part.receipt(b))] for group in whole]
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
        works, anchoring = taken(job, group, claims)
        for start in range(0, group[0].rows, job.batch) if works else ():
            turn = anchoring.turn() if anchoring else None
            batches = [_empty(job, work, start, turn) for work in works]
            rows = range(batches[0].rows)
            yield batches, [readers.submit(_render, job, batches, rows[i::_PARTS]) for i in range(_PARTS)]


def taken(job: Job, group: list[Block], claims: ExitStack) -> tuple[list[Work], Anchoring | None]:
    """What is not with another builder of a group. Of blocks whose bases are not made yet all that they are made of, or
    nothing."""
    index, first = group[0].index, job.bases.views
    if job.bases.there(index):
        return _all_claimed(job, group, claims), None
    _refuse_lost(job, group)
    claim = claims.enter_context(ExitStack())
    if group[0].view < first and claim.enter_context(job.store.claim(job.part.claim_of_bases(index))):
        works = _all_claimed(job, group, claims)
        if job.bases.there(index):
            claim.close()
            return works, None
        if sum(work.block.view < first for work in works) == first:
            return works, Anchoring(works, claim)
        for work in works:
            work.claim.close()
    claim.close()
    return [], None


def _refuse_lost(job: Job, group: list[Block]) -> None:
    """Bases are there before the first receipt: unless all is done, and they were put into the cache, one that is there
    without them tells that they were deleted."""
    index, done = group[0].index, (lambda block: job.store.exists(job.part.receipt(block)))
    first = [job.grid.block(view, index) for view in range(job.bases.views)]
    if any(map(done, first)) and not job.bases.there(index) and not all(map(done, group)):
        receipts = f"{job.store.path(job.part.receipt(first[0]))} to {first[-1].name}.json"
        raise DamageError(
            f"{job.bases.where(index)} is missing, against which these views were encoded: delete the receipts {receipts}, "
            "and run the same command again"
        )


def _all_claimed(job: Job, group: list[Block], claims: ExitStack) -> list[Work]:
    return [work for block in group if (work := _claimed(job, block, claims))]


def _claimed(job: Job, block: Block, claims: ExitStack) -> Work | None:
    """The block on its way; None where another builder has it, or had it."""
    claim = claims.enter_context(ExitStack())
    if claim.enter_context(job.store.claim(job.part.claim(block))) and not job.store.exists(
        job.part.receipt(block)
    ):
        return Work(block, job.grid.samples_of(block), claim)
    claim.close()
    return None


def _empty(job: Job, work: Work, start: int, turn: Turn | None) -> Batch:
    rows = min(job.batch, work.block.rows - start)
    pixels = np.zeros((job.batch, *job.teacher.input_spec.size, 3), np.uint8)
    views = view_rows(rows, job.recipe.parameters, job.recipe.mixed, job.recipe.tiled)
    given: dict[str, np.ndarray] = {}
    if job.probed:
        given["probes"] = np.zeros((job.batch, COUNT, 4), np.float32)
    if job.labelled:
        given["labels"] = np.full(job.batch, -1, np.int64)
        given["labels"][:rows] = job.labels[work.samples[start : start + rows]]
    return Batch(work, start, rows, pixels, given, views, [NOTHING] * rows, [], turn)


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
