"""The end of a build: canaries, the table of files, the manifest, and the Zarr metadata that follow from it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from softcache import cache as caches
from softcache import canary, measure, probe, shown, spec
from softcache import manifest as m
from softcache.arrays import constant
from softcache.block import Block
from softcache.errors import DamageError, SourceError
from softcache.inventory import metadata
from softcache.job import Job, ids_arrays
from softcache.recipe import render
from softcache.teachers import constants_of
from softcache.zarrfile import Array


def finish(job: Job, licences: Mapping[str, str] | None = None) -> None:
    """All receipts are there: write what follows from them. One builder at a time; another waits, and finds it done.

    ``licences`` go into the manifest of a new cache.
    """
    while True:
        with job.store.claim("manifest") as mine:
            if mine:
                if not _written(job):
                    _write_manifest(job, licences)
                _write_metadata(job)
                break
        time.sleep(0.05)
    job.store.drop_claims()


def _write_manifest(job: Job, licences: Mapping[str, str] | None) -> None:
    """The manifest of a new cache, or of one that has a part more."""
    if job.part.number == 0:
        invalid, sealed = _seal(job)
        manifest = m.Manifest.model_validate(
            {"format": "softcache", "invalid": invalid, "licences": licences or {}, **dict(sealed)}
        )
    else:
        manifest = caches.open(job.store.root).manifest
        assert manifest is not None
        invalid, sealed = _seal(job)
        if invalid != manifest.invalid:
            one = job.source.ids[min({*invalid} ^ {*manifest.invalid})]
            raise SourceError(
                f"the image {one!r} can be read now and could not when the cache was built, or the other way round: "
                "extend it from the images it was built from"
            )
        manifest = manifest.model_copy(update={"parts": [*manifest.parts, sealed]})
    job.store.put(m.MANIFEST, manifest.signed().to_bytes())


def _written(job: Job) -> bool:
    """Is this part in the manifest?"""
    if job.part.number == 0:
        return job.store.exists(m.MANIFEST)
    return len(caches.open(job.store.root).parts) > job.part.number


def _seal(job: Job) -> tuple[list[int], m.Sealed]:
    """Write what follows from a part's receipts. Returns the samples that are invalid, and its place in the manifest."""
    part = job.part
    receipts = [_whole(job, block) for block in part.grid.blocks()]
    invalid = sorted({i for receipt, _ in receipts for i in receipt.invalid})
    first = [*ids_arrays(job.source.ids), *_canaries(job, invalid)] if part.number == 0 else []
    constants = {}
    for array, values in [*first, *_constants(job)]:
        data = array.encode(values)
        if not job.store.exists(array.file()) or job.store.get(array.file()) != data:
            job.store.put(array.file(), data)
        constants[array.path] = m.Constant(
            sha256=spec.digest(data), bytes=len(data), dtype=array.dtype, shape=list(array.shape)
        )
    table = m.pack_table(receipts)
    job.store.put(part.table_file, table)
    identity = part.identity.to_bytes()
    return invalid, m.Sealed(
        identity=part.identity,
        constants=constants,
        identity_file=m.Entry(sha256=spec.digest(identity), bytes=len(identity)),
        files=m.Entry(sha256=spec.digest(table), bytes=len(table)),
        report=measure.report([r for r, _ in receipts], part.targets, probe.equivariance(job, invalid)),
    )


def _whole(job: Job, block: Block) -> tuple[m.Receipt, bytes]:
    """A block's receipt, its shards being there: what was lost since must not be sealed in."""
    receipt, raw = caches.load_receipt(job.store, job.part, block)
    for array, entry in zip(job.arrays, receipt.files, strict=True):
        name = array.file(block.view, block.index)
        if job.store.size(name) != entry.bytes:
            raise DamageError(
                f"{job.store.path(name)} is missing or was cut since it was written: delete "
                f"{job.store.path(job.part.receipt(block))} and run the same command again, to make its block anew"
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


def _constants(job: Job) -> list[tuple[Array, np.ndarray]]:
    """What the teacher has that is the same for every image."""
    offered = constants_of(job.teacher).items()
    path = job.part.constant
    return [(constant(path(f"constants/{n}"), v.shape, v.dtype.name), v) for n, v in offered]


def _write_metadata(job: Job) -> None:
    """Write the ``zarr.json`` files that are missing or differ."""
    cache = caches.open(job.store.root)
    for name, data in metadata(cache.arrays.values(), cache.constants).items():
        if not job.store.exists(name) or job.store.get(name) != data:
            job.store.put(name, data)
