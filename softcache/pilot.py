"""A pilot: a few hundred samples, built by the very builder in a temporary folder, measured and deleted.

What the teacher said of some of its rows is kept, in bounded memory, so that other codecs can be tried on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from softcache import cache as caches
from softcache import loop
from softcache.codecs import Objects
from softcache.codecs.anchored import Anchored
from softcache.commission import Commission
from softcache.errors import SpecError, UnreadableImage
from softcache.finish import finish
from softcache.job import Job
from softcache.measure import answers
from softcache.memorised import Answers
from softcache.recipe import render
from softcache.reckoning import Reckoning
from softcache.rows import Batch
from softcache.store import Store
from softcache.targets import is_logits

SAMPLES = 256
VIEWS = 2  # of each of the pilot's samples, or more where there are phases
ROWS = 256  # whose answers are kept, of each output of the teacher
BYTES = 32 << 20  # which they take at most
ANCHORED, MANY = 15, 100  # views and classes from which on a base may pay, so that more views are tried
_LOOKED_AT = 32  # samples whose decoding is timed


@dataclass(frozen=True)
class Heard:
    """What the teacher said of some rows: ``values`` float32 ``(n, *shape)``, of which ``samples`` and ``views``, int64
    ``(n,)``, and the ``objects`` that each shows (of sources that have boxes)."""

    values: np.ndarray
    samples: np.ndarray
    views: np.ndarray
    objects: list[Objects]


@dataclass(frozen=True)
class Pilot:
    """What was measured.

    Attributes:
        of: the whole build.
        samples, views: of the pilot. seconds: it took, without loading the teacher.
        reading: seconds to read a sample, for the source's fingerprint.
        pace: rows a second of the whole loop (``rows``), and of the teacher alone (``teacher_rows``), once under way.
        decoding: rows a second that the threads decode and render alone.
        heard: what the teacher said of some rows, by the name of its output.
        reckoning: the bytes of the whole. said: how right and how certain the teacher is, where that is known.
    """

    of: Commission
    samples: int
    views: int
    seconds: float
    reading: float
    pace: dict[str, float]
    decoding: float
    heard: Mapping[str, Heard]
    reckoning: Reckoning
    said: Answers | None


def try_out(whole: Commission, samples: int = SAMPLES) -> Pilot:
    """Try a build on about so many samples (whole batches of them), two views of each; fewer samples and more views where
    the phases of the recipe, or a base, need them. Raises as :func:`softcache.build` does."""
    if samples < 1:
        raise SpecError("a pilot is of at least one sample")
    began = time.monotonic()
    views = min(
        whole.views, max(VIEWS, whole.recipe.starts[-1] + 1, *_of_bases(whole))
    )  # some of every phase
    some = min(samples, max(2, samples * VIEWS // views))
    part = whole.source.sample(some + -some % whole.batch)
    looked = time.monotonic()
    _ = part.fingerprint
    reading = (time.monotonic() - looked) / len(part)
    rows = None if whole.block_rows is None else min(whole.block_rows, len(part))
    tried = replace(whole, source=part, views=views, block_rows=rows)
    with TemporaryDirectory(prefix="softcache-plan-") as folder:
        job = tried.job(Store(Path(folder) / "pilot"))
        ears = _Ears.of(job)
        meter = loop.run(replace(job, hear=ears), 0, 1, whole.workers, False, lambda text: None)
        finish(job)
        cache = caches.open(job.store.root)
        reckoning = Reckoning.of(cache, whole.source, whole.views, whole.block_rows)
        return Pilot(
            of=whole,
            samples=cache.samples,
            views=cache.views,
            seconds=time.monotonic() - began,
            reading=reading,
            pace=meter.pace(),
            decoding=_decoding(job, whole.workers),
            heard=ears.heard(),
            reckoning=reckoning,
            said=answers(cache, 0),
        )


def _of_bases(whole: Commission) -> Iterator[int]:
    """Views that tell something of codecs whose base is made of some: as many again."""
    for one in whole.asked:
        if isinstance(one.codec.codec, Anchored):
            yield 2 * one.codec.codec.views
        elif is_logits(one.name) and whole.views >= ANCHORED and len(whole.source.classes or ()) > MANY:
            yield 2 * Anchored().views


@dataclass
class _Ears:
    """Hear the teacher of a job: of each batch some rows, so that they are of all views."""

    taps: tuple[str, ...]
    batches: int
    kept: dict[str, list[Heard]] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> _Ears:
        batches = sum(-(-block.rows // job.batch) for block in job.grid.blocks())
        taps = (tap for target in job.targets.values() for tap in (target.tap, target.said))
        return cls(tuple(dict.fromkeys(taps)), batches)

    def __call__(self, batch: Batch, answer: Mapping[str, np.ndarray]) -> None:
        samples, valid = batch.samples, np.flatnonzero(batch.valid)
        for tap in self.taps:
            said, before = answer[tap], self.kept.setdefault(tap, [])
            most = min(ROWS, max(1, BYTES // max(said[0].nbytes, 1)))
            left = most - sum(len(one.samples) for one in before)
            some = valid[: min(left, -(-most // self.batches))]
            views = np.full(len(some), batch.work.block.view, np.int64)
            objects = [batch.objects[row] for row in some]
            before.append(Heard(said[some], samples[some], views, objects))

    def heard(self) -> dict[str, Heard]:
        return {tap: _together(parts) for tap, parts in self.kept.items()}


def _together(parts: list[Heard]) -> Heard:
    return Heard(
        values=np.concatenate([part.values for part in parts]),
        samples=np.concatenate([part.samples for part in parts]),
        views=np.concatenate([part.views for part in parts]),
        objects=[one for part in parts for one in part.objects],
    )


def _decoding(job: Job, workers: int) -> float:
    """Rows a second that so many threads decode and render, an image once for all of the pilot's views."""
    size, views = job.teacher.input_spec.size, range(job.grid.views)

    def look(sample: int) -> int:
        try:
            image = job.image(sample)
            for k in views:
                view, images = job.see(image, sample, k)
                render(image, view, size, images)
        except UnreadableImage:
            return 0
        return len(views)

    start = time.monotonic()
    with ThreadPoolExecutor(workers) as readers:
        rows = sum(readers.map(look, range(min(_LOOKED_AT, job.grid.samples))))
    return max(rows, 1) / max(time.monotonic() - start, 1e-9)
