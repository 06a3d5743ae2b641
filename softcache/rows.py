"""A block on its way: its batches are encoded and measured, then its shards are written, and its receipt, last."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from softcache import manifest as m
from softcache import measure
from softcache.block import Block
from softcache.codecs import NOTHING, Fields, Objects
from softcache.errors import TeacherError
from softcache.job import Job
from softcache.mend import require_same
from softcache.recipe.mix import ONE
from softcache.targets import Target, gap_of

if TYPE_CHECKING:
    from softcache.anchoring import Turn

_FAR = 16  # sides of the view: boxes lie in it, or not far; those of random weights anywhere near


@dataclass
class Work:
    """A claimed block on its way."""

    block: Block
    samples: np.ndarray
    claim: ExitStack
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)
    invalid: list[int] = field(default_factory=list)
    broken: bool = False
    tally: measure.Tally = field(default_factory=measure.Tally)


@dataclass(frozen=True)
class Batch:
    """Rendered rows ``start … start+rows-1`` of a block; ``pixels`` is padded to the full batch, as are the arrays
    ``given`` with them to the teacher; ``views`` are the rows of the arrays below ``view/``, and ``objects`` what each row
    shows, where a codec asks. Where the bases of its images are yet to be made, it is kept in ``turn`` with their first
    views.
    """

    work: Work
    start: int
    rows: int
    pixels: np.ndarray
    given: dict[str, np.ndarray]
    views: dict[str, np.ndarray]
    objects: list[Objects]
    unreadable: list[int]
    turn: Turn | None = None

    @property
    def samples(self) -> np.ndarray:
        return self.work.samples[self.start : self.start + self.rows]

    @property
    def valid(self) -> np.ndarray:
        """Which rows have an image that can be read, bool."""
        return ~np.isin(self.samples, self.unreadable)

    @property
    def last(self) -> bool:
        return self.start + self.rows == self.work.block.rows


def keep(job: Job, batch: Batch, answer: dict[str, np.ndarray]) -> int:
    """Encode a batch, or several that waited for this one; with a block's last one, write its shards and its receipt.
    Returns the bytes written."""
    ready = batch.turn.take(job, batch, answer) if batch.turn else [(batch, answer)]
    try:
        return sum(_keep(job, *one) for one in ready)
    except BaseException:
        for other, _ in ready:  # of which rows are lost
            other.work.broken = True
        raise


def _keep(job: Job, batch: Batch, answer: dict[str, np.ndarray]) -> int:
    work = batch.work
    if work.broken:  # an earlier batch of this block failed: it must not be committed without it
        return 0
    try:
        _encode(job, batch, answer)
        if job.hear:
            job.hear(batch, answer)
        return _commit(job, work) if batch.last else 0
    except BaseException:
        work.broken = True
        raise
    finally:
        if batch.last:
            work.claim.close()


def _encode(job: Job, batch: Batch, answer: dict[str, np.ndarray]) -> None:
    work, samples, valid, bases = batch.work, batch.samples, batch.valid, _bases(job, batch)
    labels = np.where(valid, _labels(job, batch, samples), -1)
    objects = [one if there else NOTHING for one, there in zip(batch.objects, valid, strict=True)]
    for name, views in batch.views.items():
        work.rows.setdefault(f"view/{name}", []).append(views)
    for name, target in job.targets.items():
        values, beside = checked(job, name, answer, batch), bases.get(name, {})
        fields = target.encode(values, objects, beside)
        for f, encoded in fields.items():
            work.rows.setdefault(f"targets/{name}/{f}", []).append(encoded)
        told = _compared(job, target, answer, batch) if target.layered else values
        gap = answer.get(gap_of(target.tap))
        _measure(job, work, name, told, fields | beside, labels, valid, gap, first=batch.start == 0)


def _bases(job: Job, batch: Batch) -> dict[str, Fields]:
    """What its rows are encoded against, of the targets that are."""
    if batch.turn is not None:
        return batch.turn.bases or {}
    rows = slice(batch.start, batch.start + batch.rows)
    found = job.bases.of(batch.work.block) if job.bases.names else {}
    return {name: {f: values[rows] for f, values in fields.items()} for name, fields in found.items()}


def _labels(job: Job, batch: Batch, samples: np.ndarray) -> np.ndarray:
    """Those of the samples, or of the partner of which a mixed view shows more; -1 where there may be a mosaic, which
    has no one label."""
    views, most_shown, known = batch.views, samples, np.ones(len(samples), bool)
    if "mix" in views:
        lam, partners = views["mix"][:, 0].astype(np.int32), views["partner"][:, 0]
        most_shown = np.where(2 * lam < ONE, partners, samples)
    if "tiles" in views:
        known = (views["tiles"][:, 0] < 0) & (most_shown == samples)
    return np.where(known, job.labels[most_shown], -1)


def checked(job: Job, name: str, answer: dict[str, np.ndarray], batch: Batch) -> np.ndarray:
    """The teacher's rows without the padding, finite and within the codec's reach; invalid rows are zero."""
    target, rows, valid = job.targets[name], batch.rows, batch.valid
    said = answer.get(target.tap)
    if said is None or said.shape != (job.batch, *target.shape):
        found = "nothing" if said is None else said.shape
        raise TeacherError(
            f"target {name!r}: the teacher gave {found} for a batch of {job.batch} rows of {target.shape}"
        )
    values = said[:rows]
    if not valid.all():
        values = np.where(valid.reshape(-1, *[1] * len(target.shape)), values, np.float32(0))
    flat = values.reshape(rows, -1)
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))  # without a second array: it may be 300 MB
    bad = np.flatnonzero(~(largest <= target.codec.limit))
    if bad.size:
        raise _cannot_hold(job, target, batch, bad[0], largest[bad[0]])
    return values


def _compared(job: Job, target: Target, answer: dict[str, np.ndarray], batch: Batch) -> np.ndarray:
    """The logits that are not kept themselves, but what they are made of: finite of valid rows."""
    logits = answer[target.said][: batch.rows]
    bad = np.flatnonzero(batch.valid & ~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise _cannot_hold(job, target, batch, bad[0], np.nan)
    return logits


def _cannot_hold(job: Job, target: Target, batch: Batch, row: int, largest: float) -> TeacherError:
    id = job.source.ids[batch.samples[row]]
    what = (
        "is not finite" if not np.isfinite(largest) else f"reaches {largest:.4g}, past {target.codec.limit:g}"
    )
    return TeacherError(
        f"target {target.name!r} of the image {id!r} {what}: {target.spec!r} cannot hold it. "
        "Is the precision too low, or the normalisation wrong?"
    )


def _refuse_pixels(target: Target, values: np.ndarray) -> None:
    """Boxes that are anywhere but in the view would be cut at its surroundings, one like the other."""
    if target.layout is None or "boxes" not in target.layout.columns:
        return
    typical = float(np.median(np.abs(target.layout.part(values, "boxes"))))
    if typical > _FAR:
        raise TeacherError(
            f"target {target.name!r}: the boxes' coordinates are {typical:.4g} or so, and they are to be shares of the "
            "view's sides, 0 to 1: does the teacher answer in pixels? Divide them by its input's size"
        )


def _measure(
    job: Job,
    work: Work,
    name: str,
    values: np.ndarray,
    fields: Fields,
    labels: np.ndarray,
    valid: np.ndarray,
    gap: np.ndarray | None,
    first: bool,
) -> None:
    """Top-1 of what is kept on every row; fidelity on the first few of each block (it costs a decode)."""
    target, layer = job.targets[name], job.layers.get(name, {})
    if name == job.part.logits and target.kind == "logits":
        kept = target.decode(fields | layer)
        work.tally.count(values, kept.top1(), labels)
    if first:
        _refuse_pixels(target, values)
        few = np.flatnonzero(valid)[: measure.ROWS]
        kept = target.decode({f: encoded[few] for f, encoded in fields.items()} | layer)
        work.tally.add(target, values[few], kept, None if gap is None else gap[few])


def _commit(job: Job, work: Work) -> int:
    """Shards first, the receipt last."""
    block, entries = work.block, []
    for array in job.arrays:
        data = array.encode(np.concatenate(work.rows[array.path]))
        entries.append(m.Entry.of(data))
        require_same(job, block, len(entries) - 1, entries[-1])
        job.store.put(array.file(block.view, block.index), data)
    receipt = m.Receipt(
        block=(block.view, block.index),
        identity=job.identity.digest,
        rows=block.rows,
        files=entries,
        invalid=sorted(work.invalid),
        anchors=job.bases.digests(block),
        **vars(work.tally),
    )
    signed = receipt.signed().to_bytes()
    require_same(job, block, len(entries), m.Entry.of(signed))
    job.store.put(job.part.receipt(block), signed)
    return sum(entry.bytes for entry in entries)
