"""A cache from arrays that somebody has: a row a sample, from a teacher that ran elsewhere.

The arrays are looked at once and laid aside on the disk; then a block after another is encoded, measured and committed as a
build does it. Which image a row is of, which class a column is, and how the teacher saw the image is said, never guessed.
Where it is not known how (``recipe="unknown"``), or was drawn by somebody else's random numbers, the cache is not
*replayable*: nobody can show a student what the teacher saw, and nothing of ours pretends to.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from softcache import cache as caches
from softcache import loop, measure, spec
from softcache.anchoring import Turn
from softcache.arrays import keep_view, view_rows
from softcache.cache import Cache
from softcache.codecs import NOTHING, is_boxed
from softcache.commission import open_source
from softcache.errors import MismatchError, SpecError, StoreError, UnreadableImage, nearest
from softcache.exchange import arrayfile
from softcache.exchange.arrayfile import Arrays, Stored
from softcache.exchange.kept import FORMS, Kept
from softcache.finish import finish
from softcache.identity import IMPORTED, InputSpec, TeacherId
from softcache.job import Job, check, prepare
from softcache.recipe import Recipe
from softcache.rows import Batch, Work, keep
from softcache.source import Source
from softcache.store import Store
from softcache.targets import Request, is_logits, requests
from softcache.teachers import Options, input_spec
from softcache.teachers.classes import aligned
from softcache.teachers.classes import read as read_classes

UNKNOWN, ORDER = "unknown", "order"
SAME = ("center_crop", "identity", "letterbox", "resize")  # ops that draw nothing
_BATCH = 1024
_NAMED = 5


def import_arrays(
    out: str | Path,
    file: str | Path,
    *,
    source: Any,
    arrays: Mapping[str, str],
    ids: str,
    recipe: str,
    targets: Mapping[str, str] | Sequence[str] = ("logits=full(f16)",),
    views: int = 1,
    form: str = "logits",
    split: str | None = None,
    layout: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: str | Path | Sequence[str] | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    color: str | None = None,
    label_smoothing: float | None = None,
    block_rows: int | None = None,
    ignore_missing: bool = False,
    skip_corrupt: bool = False,
    ignore_labels: bool = False,
    progress: bool = True,
) -> Cache:
    """Make a cache of arrays in an HDF5, NPZ or NPY file, or go on with one.

    Args:
        out: the cache's folder.
        file: what holds the arrays.
        source: the images that the teacher saw: a path, a map-style dataset, or a :class:`~softcache.Source`.
        arrays: target → array: ``{"logits": "/train/logits"}``, rows ``(samples, …)``, or ``(samples, views, …)``.
        ids: the array that names the sample of each row; or ``"order"``: rows follow the source's order.
        recipe: how the teacher saw the images, such as ``"resize(256)|center_crop(224)"``; of ops that draw nothing, since
            what others drew is not known here. ``"unknown"``: the cache is not replayable.
        targets: what to keep, and how, as for :func:`softcache.build`.
        views: rows of each sample; more than one only where the recipe is unknown.
        form: what the numbers of logits are: ``logits``, ``log_probabilities`` or ``probabilities``.
        split, layout, image_column, label_column: see :class:`~softcache.Source`.
        classes: the class names of the columns, in their order, or a file of them: they are put into the source's order.
        input_size, mean, std, color: what the teacher saw, and how it was normalised; the size where the recipe does not
            end with one.
        label_smoothing: ε of the teacher's training.
        block_rows: rows a block; about 64 MiB by default.
        ignore_missing: keep the rows of samples that the file has none of as invalid, instead of refusing.
        skip_corrupt: keep those of unreadable images as invalid.
        ignore_labels: the source's labels are not the teacher's classes; keep neither.
        progress: print what is going on on stderr.

    Raises:
        MismatchError: arrays, ids or classes that are not those of the source; or the folder holds something else.
        SpecError: what cannot be understood. DamageError: a file that is cut or was made to harm.
        SourceError: rows that no teacher says: not finite, or probabilities where logits were announced.
    """
    say: Callable[[str], None] = _say if progress else _silent
    asked, made = requests(targets), _recipe(recipe, views)
    if form not in FORMS:
        raise SpecError(f"from {form!r}{nearest(form, FORMS)}")
    if blind := [r for r in asked if recipe == UNKNOWN and is_boxed(r.codec.codec)]:
        raise SpecError(
            f"{blind[0].codec.spec!r} asks what a view shows, and with --recipe {UNKNOWN} nobody knows"
        )
    samples = open_source(source, split, None, layout, image_column, label_column)
    check(samples, views, block_rows, made)
    say(samples.describe())
    store, size = Store(out), (input_size, input_size) if isinstance(input_size, int) else input_size
    options = Options(
        batch=_BATCH,
        input_size=size or made.size,
        mean=mean,
        std=std,
        color=color,
        label_smoothing=label_smoothing,
    )
    seen = input_spec(options, {"mean": (0, 0, 0), "std": (1, 1, 1)}, "a file of arrays")
    with arrayfile.opened(file) as found:
        mapped = _mapped(found, arrays, asked)
        rows, named = _placed(found, ids, samples, ignore_missing, next(iter(mapped.values())))
        kept = {tap: Kept.of(one, tap, asked, form, views, named, store, say) for tap, one in mapped.items()}
    imported = Imported(_name(kept, named, form), seen, options, {tap: one.row for tap, one in kept.items()})
    wanted = samples.classes if not ignore_labels and any(is_logits(r.name) for r in asked) else None
    who = aligned(imported, read_classes(classes), wanted, say)
    job = prepare(store, samples, who, made, asked, views, block_rows, skip_corrupt, ignore_labels)
    with store.claim("import") as mine:
        if not mine:
            raise StoreError(f"another process imports into {store.root}: wait for it")
        _commit(job, imported, kept, rows)
        finish(job)
    store.drop_claims()
    cache = caches.open(store.root)
    say(measure.tell(cache))
    return cache


# -- what is said ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unknown(Recipe):
    """Nobody knows what the teacher saw. Whole images stand in for its views, so that their sizes are known."""

    spec: str = field(default="identity", init=False)
    seed: int = field(default=0, init=False)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"spec": UNKNOWN, "ops": {}, "replayable": False}


def _recipe(said: str, views: int) -> Recipe:
    if said == UNKNOWN:
        return _Unknown()
    made = Recipe(said, 0)
    drawing = [op for op in made.identity()["ops"] if op not in SAME]
    if drawing:
        raise SpecError(
            f"recipe {said!r}: what {drawing[0]!r} drew for the teacher is not in the file, and here it would draw "
            f"something else: say --recipe {UNKNOWN}, or one of {', '.join(SAME)} where the teacher saw that"
        )
    if views > 1:
        raise SpecError(
            f"recipe {said!r} shows every image in one way, and there are {views} views: say --recipe {UNKNOWN}"
        )
    return made


def _mapped(found: Arrays, arrays: Mapping[str, str], asked: Sequence[Request]) -> dict[str, Stored]:
    """The array of every target that is asked for, by what the teacher is asked for."""
    there = ", ".join(found.names) or "nothing"
    taps = dict.fromkeys(r.tap for r in asked)
    for tap in taps:
        if tap not in arrays:
            raise SpecError(
                f"which array is {tap!r}? Say --map {tap}=ARRAY; in {found.where} there are {there}"
            )
    for name in arrays:
        if name not in taps:
            raise SpecError(
                f"--map {name}={arrays[name]}: no --target keeps {name!r}, only {', '.join(taps)}"
            )
    mapped = {tap: found.find(arrays[tap]) for tap in taps}
    for tap, stored in mapped.items():
        if stored.text:
            raise MismatchError(f"{found.where}: {stored.name!r} holds text, and {tap!r} is numbers")
    return mapped


def _placed(
    found: Arrays, ids: str, source: Source, ignore_missing: bool, stored: Stored
) -> tuple[np.ndarray, Sequence[str]]:
    """The row of every sample, int64 ``(samples,)``, −1 where there is none; and the id of every row."""
    count = stored.shape[0] if stored.shape else 0
    if ids == ORDER:
        if count != len(source):
            raise MismatchError(
                f"{found.where}: {stored.name!r} is {stored.shape}, and the source has {len(source):,} samples: rows that "
                "follow its order are as many. Name the array of their ids with --ids"
            )
        return np.arange(count), source.ids
    named = arrayfile.texts(found.find(ids), found.where)
    if len(named) != count:
        raise MismatchError(
            f"{found.where}: there are {len(named):,} ids in {ids!r}, and {stored.name!r} is {stored.shape}: "
            "its first axis is samples"
        )
    twice = [id for id, n in Counter(named).items() if n > 1]
    _refuse_ids(twice, f"stand in {ids!r} more than once", "keep one row of each", source)
    known, rows = set(source.ids), {id: i for i, id in enumerate(named)}
    extra = [id for id in named if id not in known]
    _refuse_ids(
        extra,
        "are not in the source",
        "is this the split, and are ids written as the source has them?",
        source,
    )
    missing = [id for id in source.ids if id not in rows]
    if not ignore_missing:
        hint = f"name them in {ids!r}, or say --ignore-missing to keep their rows as invalid"
        _refuse_ids(missing, f"of the source are not in {ids!r}", hint, source)
    return np.array([rows.get(id, -1) for id in source.ids], np.int64), named


def _refuse_ids(ids: list[str], what: str, hint: str, source: Source) -> None:
    if ids:
        told = ", ".join(map(repr, ids[:_NAMED])) + (
            f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else ""
        )
        raise MismatchError(
            f"{len(ids):,} ids {what}: {told} (the source's are like {source.ids[0]!r}); {hint}"
        )


def _name(kept: Mapping[str, Kept], ids: Sequence[str], form: str) -> str:
    """Who spoke is not known; what was said is."""
    told = {tap: [one.rows.dtype.name, list(one.rows.shape), one.digest] for tap, one in kept.items()}
    return IMPORTED + spec.digest(
        spec.canonical_json({"arrays": told, "ids": spec.digest_ids(ids), "from": form})
    )


class Imported:
    """A teacher that has spoken: it says what was put into ``said``, and zeros of the right shape before.

    ``probed``, ``classes``, ``layouts``: see :class:`softcache.teachers.Teacher`.
    """

    probed = False
    classes: tuple[str, ...] | None = None

    def __init__(self, name: str, seen: InputSpec, options: Options, rows: Mapping[str, tuple[int, ...]]):
        self.input_spec, self.said = seen, dict[str, np.ndarray]()
        self._name, self._options, self._rows = name, options, rows

    def __call__(self, pixels: np.ndarray, **given: np.ndarray) -> dict[str, np.ndarray]:
        return self.said or {n: np.zeros((len(pixels), *row), np.float32) for n, row in self._rows.items()}

    def identity(self) -> TeacherId:
        return TeacherId(
            name=self._name,
            weights=None,
            weights_format=None,
            input_spec=self.input_spec,
            precision="unknown",
            processor="unknown",
            batch=self._options.batch,
            label_smoothing=self._options.label_smoothing,
        )

    def libraries(self) -> dict[str, str]:
        return {}


# -- the blocks --------------------------------------------------------------------------------------------


def _commit(job: Job, imported: Imported, kept: Mapping[str, Kept], rows: np.ndarray) -> None:
    """Encode and commit every block that has no receipt."""
    shapes = np.zeros((job.grid.samples, 2), np.int32)  # of the images; -1 where one cannot be read
    with ThreadPoolExecutor(2) as readers, ExitStack() as claims:
        for blocks in loop.missing(job, loop.groups(job, world=1)):
            works, anchoring = loop.taken(job, blocks, claims)
            for start in range(0, blocks[0].rows, job.batch):
                samples = works[0].samples[start : start + job.batch]
                new = samples[(shapes[samples] == 0).any(axis=1)]
                shapes[new] = list(readers.map(lambda i: _shape(job, int(i)), new)) or shapes[new]
                turn = anchoring.turn() if anchoring else None
                for work in works:
                    imported.said = {
                        tap: _answer(one, rows[samples], work.block.view, job.batch)
                        for tap, one in kept.items()
                    }
                    batch = _batch(job, work, start, samples, shapes, rows, turn)
                    keep(job, batch, job.teacher(np.zeros((job.batch, 0))))


def _shape(job: Job, sample: int) -> tuple[int, int]:
    try:
        height, width = job.source.image(sample).shape[:2]
    except UnreadableImage:
        if not job.skip_corrupt:
            raise
        return -1, -1
    return height, width


def _answer(kept: Kept, rows: np.ndarray, view: int, batch: int) -> np.ndarray:
    """As a teacher answers a batch: float32 ``(batch, *row)``, zeros where there is nothing."""
    said = np.zeros((batch, *kept.row), np.float32)
    there = np.flatnonzero(rows >= 0)
    said[there] = kept.take(rows[there], view)
    return said


def _batch(
    job: Job,
    work: Work,
    start: int,
    samples: np.ndarray,
    shapes: np.ndarray,
    rows: np.ndarray,
    turn: Turn | None,
) -> Batch:
    views = view_rows(len(samples), job.recipe.parameters, False, False)
    invalid, objects = [], [NOTHING] * len(samples)
    for i, sample in enumerate(samples.tolist()):
        height, width = shapes[sample].tolist()
        if height > 0:
            view = job.recipe.view(job.source.ids[sample], work.block.view, width, height)
            keep_view(views, i, view)
            if job.boxed:
                objects[i] = job.objects(view, sample)
        if height < 0 or rows[sample] < 0:
            invalid.append(sample)
    work.invalid += invalid
    return Batch(work, start, len(samples), np.zeros(0, np.uint8), {}, views, objects, invalid, turn)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass
