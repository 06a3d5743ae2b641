"""The end of a build: canaries, the table of files, the manifest, and the Zarr metadata that follow from it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from softcache import cache as caches
from softcache import canary, measure, probe, shown
from softcache import manifest as m
from softcache.arrays import constant
from softcache.beginning import ids_arrays
from softcache.block import Block
from softcache.documents import read_choice, read_receipt
from softcache.errors import DamageError, SourceError, SpecError
from softcache.inventory import derived
from softcache.job import Job
from softcache.mend import put_again
from softcache.recipe import render
from softcache.teachers import constants_of
from softcache.zarrfile import Array


def finish(job: Job, licences: Mapping[str, str] | None = None) -> None:
    """All receipts are there: write what follows from them. One builder at a time; another waits, and finds it done.

    ``licences`` that were stated go into a manifest that is written.
    """
    while True:
        with job.store.claim("manifest") as mine:
            if mine:
                if not _written(job):
                    _write_manifest(job, licences or {})
                elif job.sealed:
                    _mend(job, job.sealed)
                _write_metadata(job)
                break
        time.sleep(0.05)
    job.bases.drop()
    job.store.drop_claims()


def _written(job: Job) -> bool:
    """Is this part in the manifest?"""
    if job.part.number == 0:
        return job.store.exists(m.MANIFEST)
    return len(caches.open(job.store.root).parts) > job.part.number


def _write_manifest(job: Job, licences: Mapping[str, str]) -> None:
    """The manifest of a new cache, or of one that has a part more. What was stated of the teacher does not hold for another
    one."""
    receipts = [_whole(job, block) for block in job.grid.blocks()]
    invalid = sorted({i for receipt, _ in receipts for i in receipt.invalid})
    if job.part.number == 0:
        sealed = dict(_seal(job, receipts, invalid))
        said = {"licences": {**licences}, "choice": read_choice(job.store)}
        manifest = m.Manifest.model_validate({"format": "softcache", "invalid": invalid, **said, **sealed})
    else:
        before = caches.open(job.store.root).manifest
        assert before is not None
        if invalid != before.invalid:
            one = job.source.ids[min({*invalid} ^ {*before.invalid})]
            raise SourceError(
                f"the image {one!r} can be read now and could not when the cache was built, or the other way round: "
                "extend it from the images it was built from"
            )
        parts = [*before.parts, _seal(job, receipts, invalid)]
        another = job.part.named not in {part.identity.named for part in (before, *before.parts)}
        kept = {what: one for what, one in before.licences.items() if what != "teacher" or not another}
        manifest = before.model_copy(update={"parts": parts, "licences": kept | dict(licences)})
    data = manifest.signed().to_bytes()
    if len(data) > m.MAX_JSON:
        raise SpecError(
            f"the manifest of {job.store.root} would have {len(data):,} bytes, and at most {m.MAX_JSON:,} are read: it has "
            "too many parts, or class names; build a new cache"
        )
    job.store.put(m.MANIFEST, data)


def _seal(job: Job, receipts: list[tuple[m.Receipt, bytes]], invalid: list[int]) -> m.Sealed:
    """Write what follows from a part's receipts. Returns its place in the manifest."""
    constants = {}
    for array, pieces in _constants(job, invalid):
        entry = _entry(pieces())
        if not _holds(job, array.file(), entry):
            job.store.put(array.file(), pieces())
        constants[array.path] = m.Constant(**entry.model_dump(), dtype=array.dtype, shape=list(array.shape))
    bases = [constants[a.path].bytes for fields in job.bases.made.values() for a in fields.values()]
    table = m.pack_table(receipts)
    job.store.put(job.part.table_file, table)
    return m.Sealed(
        identity=job.identity,
        constants=constants,
        identity_file=m.Entry.of(job.identity.to_bytes()),
        files=m.Entry.of(table),
        report=measure.report(
            [r for r, _ in receipts], job.targets, probe.equivariance(job, invalid), sum(bases)
        ),
    )


def _mend(job: Job, sealed: m.Sealed) -> None:
    """Put again what is missing of a part's files, but for those of its blocks."""
    store, names = job.store, {c.array(path).file(): c for path, c in sealed.constants.items()}
    if any(store.size(name) != entry.bytes for name, entry in names.items()):
        invalid = caches.open(store.root).invalid.tolist()
        for array, pieces in _constants(job, invalid):
            if array.file() in names:
                put_again(job, array.file(), _entry(pieces()), pieces, names[array.file()])
    if job.table is None:
        table = m.pack_table([_whole(job, block) for block in job.grid.blocks()])
        put_again(job, job.part.table_file, m.Entry.of(table), lambda: table, sealed.files)
    identity = job.identity.to_bytes()
    put_again(job, job.part.identity_file, m.Entry.of(identity), lambda: identity, sealed.identity_file)


def _whole(job: Job, block: Block) -> tuple[m.Receipt, bytes]:
    """A block's receipt, its shards being there: what was lost since must not be sealed in."""
    receipt, raw = read_receipt(job.store, job.part, block)
    for array, entry in zip(job.arrays, receipt.files, strict=True):
        name = array.file(block.view, block.index)
        if job.store.size(name) != entry.bytes:
            raise DamageError(
                f"{job.store.path(name)} is missing or was cut since it was written: delete "
                f"{job.store.path(job.part.receipt(block))} and run the same command again, to make its block anew"
            )
    if receipt.anchors != job.bases.digests(block):
        raise DamageError(
            f"{job.store.path(job.part.receipt(block))}: its rows were encoded against other bases than there are: delete "
            "it, and run the same command again, to make its block anew"
        )
    return receipt, raw


def _canaries(job: Job, invalid: list[int]) -> list[tuple[Array, np.ndarray]]:
    if len(invalid) == job.grid.samples:
        raise SourceError(f"none of the {len(invalid):,} images of {job.source.describe()} can be read")
    rows = canary.choose(job.grid.samples, job.grid.views, invalid, job.recipe.seed)
    size = job.teacher.input_spec.size
    pixels = np.zeros((len(rows), *size, 3), np.uint8)
    kept = shown.room(len(rows), job.recipe.parameters, job.recipe.mixed, job.recipe.tiled)
    for i, (sample, k) in enumerate(rows):
        image = job.image(sample)
        view, images = job.see(image, sample, k)
        pixels[i] = render(image, view, size, images)
        shown.keep(kept, i, view)
    named = kept | {"pixels": pixels, "sample": np.array([s for s, _ in rows], np.int64)}
    return [(constant(f"canary/{n}", v.shape, v.dtype.name), v) for n, v in named.items()]


Pieces = Callable[[], Iterable[bytes]]  # the bytes of a file, made anew


def _entry(pieces: Iterable[bytes]) -> m.Entry:
    """Digest and size of what may be larger than memory."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return m.Entry(sha256=digest.hexdigest(), bytes=size)


def _holds(job: Job, name: str, entry: m.Entry) -> bool:
    return job.store.size(name) == entry.bytes and job.store.digest(name) == entry.sha256


def _constants(job: Job, invalid: list[int]) -> list[tuple[Array, Pieces]]:
    """Ids and canaries, of the first part; what the teacher has that is the same for every image; and bases."""
    path, first = job.part.constant, job.part.number == 0
    offered = [
        (constant(path(f"constants/{n}"), v.shape, v.dtype.name), v)
        for n, v in constants_of(job.teacher).items()
    ]
    small = [*ids_arrays(job.source.ids), *_canaries(job, invalid), *offered] if first else offered
    return [
        *((array, lambda array=array, values=values: [array.encode(values)]) for array, values in small),
        *(
            (array, lambda array=array, name=name, field=field: array.pieces(job.bases.pieces(name, field)))
            for name, fields in job.bases.made.items()
            for field, array in fields.items()
        ),
    ]


def _write_metadata(job: Job) -> None:
    """Write what follows from the manifest, and is missing or differs."""
    cache = caches.open(job.store.root)
    for name, data in derived(cache).items():
        if not job.store.exists(name) or job.store.get(name) != data:
            job.store.put(name, data)
