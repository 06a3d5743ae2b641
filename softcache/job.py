"""What a build is to make: source, teacher, recipe, targets and the identity they add up to."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

import softcache
from softcache import cache as caches
from softcache import layers, probes
from softcache import manifest as m
from softcache.bases import Bases
from softcache.beginning import begin, begun, check_follows, continued, refusal
from softcache.block import Grid
from softcache.codecs import Fields, Objects, is_boxed, is_labelled
from softcache.codecs.head import WEIGHT
from softcache.errors import (
    MismatchError,
    SoftcacheError,
    SourceError,
    SpecError,
    TeacherError,
    UnreadableImage,
    nearest,
)
from softcache.identity import (
    MAX_BLOCK_ROWS,
    MAX_VIEWS,
    VERSION,
    GridId,
    Identity,
    ProbesId,
    RecipeId,
    SourceId,
    TargetId,
    differences,
    told,
)
from softcache.noise import ask, check_heard, labelling, probing, same_answer, sketch
from softcache.parts import Part, next_part
from softcache.probes import Probes
from softcache.recipe import Recipe, View, gather
from softcache.recipe.partner import Drawer, drawn
from softcache.source import Source, digest_labels
from softcache.source.kept import ROOM, Kept
from softcache.store import Store
from softcache.targets import Layout, Request, Target, is_logits
from softcache.teachers import Teacher, constants_of, layouts_of
from softcache.zarrfile import Array

_BLOCK_BYTES = 64 << 20  # encoded bytes a block holds by default
_BLOCK_ROWS = 8192  # and at most this many rows


@dataclass(frozen=True)
class Job:
    """Everything a builder needs, agreed with what the store already holds.

    ``bases``: what its views are encoded against; ``layers``: the last layers that targets are decoded with. ``cache`` is
    read for the views of a part that brings none. ``sealed`` and ``table``: what the manifest says of the part, where it is
    there already, and misses files. ``hear`` is told what the teacher said of each batch.
    """

    store: Store
    source: Source
    teacher: Teacher
    recipe: Recipe
    part: Part
    labels: np.ndarray
    skip_corrupt: bool
    image: Kept
    bases: Bases
    layers: dict[str, Fields]
    cache: caches.Cache | None = None
    sealed: m.Sealed | None = None
    table: np.ndarray | None = None
    hear: Callable[[Any, Mapping[str, np.ndarray]], None] | None = None

    @property
    def identity(self) -> Identity:
        return self.part.identity

    @property
    def grid(self) -> Grid:
        return self.part.grid

    @property
    def targets(self) -> dict[str, Target]:
        return self.part.targets

    @property
    def arrays(self) -> list[Array]:
        return self.part.arrays

    @property
    def batch(self) -> int:
        return self.identity.teacher.batch

    @property
    def probed(self) -> bool:
        """Is the teacher given boxes to answer for?"""
        return self.identity.probes is not None

    @property
    def probes(self) -> Probes:
        """Draws the boxes that it is given."""
        return Probes(self.recipe.seed, self.source.ids, self.source.boxes, self.teacher.input_spec.size)

    @property
    def labelled(self) -> bool:
        """Is the teacher given labels to answer for?"""
        return labelling(self.targets.values())

    @property
    def boxed(self) -> bool:
        """Does one of the codecs ask what a view shows, or one that may be tried on what is heard?"""
        heard = self.hear is not None and self.source.has_boxes
        return heard or any(target.boxed for target in self.targets.values())

    def objects(self, view: View, sample: int) -> Objects:
        """What a view of a sample shows."""
        return probes.visible(view, sample, self.source.boxes, self.teacher.input_spec.size)

    def see(self, image: np.ndarray, sample: int, k: int) -> tuple[View, dict[int, np.ndarray]]:
        """View number ``k`` of a sample whose image is given, and the images it is rendered from, by sample: as it stands
        in the cache, or drawn.

        Raises :class:`~softcache.errors.UnreadableImage`.
        """
        if self.cache is not None:
            view = self.cache.read_views(k, np.array([sample]), slab=False)[0]
            return view, gather(sample, view, lambda i: image if i == sample else self.image(i))
        return Drawer(self.recipe, self.source, self.image, self.skip_corrupt).see(sample, k, image)


def prepare(
    store: Store,
    source: Source,
    teacher: Teacher,
    recipe: Recipe,
    asked: tuple[Request, ...],
    views: int,
    block_rows: int | None,
    skip_corrupt: bool,
    ignore_labels: bool,
    *,
    before: tuple[Part, ...] = (),
    first: int = 0,
    named: str = "",
) -> Job:
    """Agree with the build that has begun in the store, or begin one; with parts ``before``, with the extension that is the
    next part, of the views from ``first`` on, or by a teacher that is ``named``.

    Raises:
        MismatchError: the store holds something else, or another build (the first differing field is named); or the
            teacher answers another number of classes than the source names, or cannot follow those before.
        TeacherError, CodecError: the teacher's answers do not fit the targets.
    """
    classes = None if ignore_labels else source.classes
    _check_objects(source, classes, asked)
    _check_labels(source, classes, recipe, asked)
    labels = np.full(len(source), -1) if ignore_labels else source.labels
    identity = partial(
        _identity, source, classes, labels, teacher, recipe, views, probing(asked), first, named
    )
    stored = continued(store, len(before)) if before else begun(store)
    unheard = stored is not None and stored.teacher.answer is None
    said = None if unheard else ask(teacher, asked)
    if stored is None:
        targets = _resolve(said or {}, asked, layouts_of(teacher))
        last = layers.of(teacher, targets, named)
        layers.check(last, targets, said or {})
        _check_classes(classes, targets, named, last)
        _check_views(targets, views)
        answer = sketch(said, asked) if teacher.probed else None
        _try(recipe, source)
        constants_of(teacher)  # which are written at the end, and refused now
        wanted = identity(targets, answer, block_rows)
        if before:
            check_follows(store, wanted, before)
            check_heard(store.root, said or {}, before, named)
        stored = begin(store, source.ids, wanted, before)
    if before and (stored.grid.first, stored.targets.keys()) != (first, {request.name for request in asked}):
        raise refusal(store, stored, len(before), "it was not this extension")
    answer = same_answer(stored.teacher.answer, None if said is None else sketch(said, asked))
    wanted = identity(
        _as_stored(stored, asked, layouts_of(teacher)), answer, block_rows or stored.grid.block_rows
    )
    if stored.digest != wanted.digest:
        found = differences(stored.model_dump(mode="json"), wanted.model_dump(mode="json"))
        raise refusal(store, stored, len(before), told(found))
    part = next_part(before, stored)
    # of a part of the source as large a share: a pilot then goes at the build's pace
    image = Kept(source, int(ROOM * source.share) if recipe.mixed or recipe.tiled else 0)
    seen = None if part.brings_views else caches.open(store.root)
    bases = Bases(store, part, caches.open(store.root) if part.grid.first else None)
    last = layers.of(teacher, part.targets, named)
    return Job(store, source, teacher, recipe, part, labels, skip_corrupt, image, bases, last, seen)


def _try(recipe: Recipe, source: Source) -> None:
    """Refuse a recipe that cannot be done on the first image before a folder is taken for it."""
    try:
        image = source.image(0)
    except UnreadableImage:
        return  # the build tells of all of them
    for k in recipe.starts:
        drawn(recipe, source, 0, k, image)


def _resolve(
    said: Mapping[str, np.ndarray], asked: tuple[Request, ...], layouts: Mapping[str, Layout]
) -> dict[str, Target]:
    """The targets, their shapes taken from the teacher's answer to a picture of noise."""
    for request in asked:
        if request.tap not in said:
            base, _, last = request.tap.rpartition(".")
            hint = (
                f": {request.name}=attention(0.5) is kept of the map {base!r}" if last == "attention" else ""
            )
            raise TeacherError(
                f"the teacher has no target {request.tap!r}{hint or nearest(request.tap, said)}"
            )
    targets = {r.name: r.resolve(tuple(said[r.tap].shape[1:]), layouts.get(r.name)) for r in asked}
    for target in targets.values():
        target.codec.fields(target.shape)  # refuses a shape it cannot hold
    return targets


def _check_objects(source: Source, classes: tuple[str, ...] | None, asked: tuple[Request, ...]) -> None:
    """Refuse codecs that ask what a view shows where nobody can tell. ``classes``: in whose order the teacher's are."""
    for codec in (request.codec for request in asked):
        if is_boxed(codec.codec) and not source.has_boxes:
            raise SpecError(
                f"{codec.spec!r} asks where the boxes are, and {source.describe()} has none: name a source with boxes, or "
                "another codec"
            )
        if is_labelled(codec.codec) and classes is None:
            raise SpecError(
                f"{codec.spec!r} compares the boxes' classes with the teacher's, and ignore_labels, or a source that names "
                "none, leaves open which is which: leave that out, or name another codec"
            )


def _check_labels(
    source: Source, classes: tuple[str, ...] | None, recipe: Recipe, asked: tuple[Request, ...]
) -> None:
    """Refuse what is of a view's label where it has none, or several."""
    for name in (request.name for request in asked if labelling([request])):
        if classes is None or source.labels.max(initial=-1) < 0:
            raise SpecError(
                f"the target {name!r} is of the label, and {source.describe()} has none, or ignore_labels leaves them out: "
                "name a source with labels, or leave the target out"
            )
        if recipe.mixed or recipe.tiled:
            raise SpecError(
                f"the target {name!r} is of one image with one label, and the recipe {recipe.spec!r} mixes several: leave "
                "the mix out, or the target"
            )


def _check_views(targets: Mapping[str, Target], views: int) -> None:
    """Refuse too few views for what is to be made of the first ones."""
    for target in targets.values():
        if target.anchored and views < target.anchored.views:
            raise SpecError(
                f"target {target.name!r}: {target.spec!r} makes an image's base of its first {target.anchored.views} views, "
                f"and there are {views:,}: cache more (it pays from about fifteen), or keep packed(44), which needs one"
            )


def _check_classes(
    classes: tuple[str, ...] | None, targets: dict[str, Target], named: str, last: Mapping[str, Fields]
) -> None:
    own = {name.removeprefix(f"{named}."): target for name, target in targets.items()}
    counts = [len(layer[WEIGHT]) for layer in last.values()]
    counts += [
        t.layout.classes if t.layout else t.shape[0] * is_logits(n) for n, t in own.items() if not t.layered
    ]
    answered = next((count for count in counts if count), None)
    if classes is not None and answered not in (None, len(classes)):
        raise MismatchError(
            f"the teacher answers {answered} classes and the source names {len(classes)}: its labels are not the "
            "teacher's. Is this the right teacher? If the labels do not matter, say --ignore-labels"
        )


def _identity(
    source: Source,
    classes: tuple[str, ...] | None,
    labels: np.ndarray,
    teacher: Teacher,
    recipe: Recipe,
    views: int,
    probed: bool,
    first: int,
    named: str,
    targets: dict[str, Target],
    answer: list[float] | None,
    block_rows: int | None,
) -> Identity:
    who = teacher.identity()
    rows = block_rows or default_rows(targets, len(source), who.batch)
    return Identity(
        version=VERSION,
        source=SourceId(
            layout=source.layout,
            split=source.split,
            ids=source.ids_digest,
            content=source.fingerprint,
            classes=None if classes is None else list(classes),
            labels=digest_labels(labels),
            decoder=source.decoder(),
            boxes=source.boxes_digest,
        ),
        recipe=RecipeId(**recipe.identity()),
        teacher=who.model_copy(update={"batch": min(who.batch, rows), "answer": answer}),
        targets={n: TargetId(**t.identity()) for n, t in targets.items()},
        grid=GridId(
            samples=len(source),
            views=views,
            block_rows=rows,
            permutation="feistel-6",
            key=recipe.seed,
            first=first,
        ),
        libraries=_libraries(teacher),
        probes=ProbesId(count=probes.COUNT, version=probes.VERSION) if probed else None,
        named=named,
    )


def _as_stored(
    stored: Identity, asked: tuple[Request, ...], layouts: Mapping[str, Layout]
) -> dict[str, Target]:
    """The targets that are asked for, with the shapes they have in the build that has begun."""
    shapes = {n: tuple(t.shape) for n, t in stored.targets.items()}
    try:
        return {r.name: r.resolve(shapes.get(r.name, (1,)), layouts.get(r.name)) for r in asked}
    except SoftcacheError as e:
        raise MismatchError(f"the build that has begun has other targets: {e}") from e


def default_rows(targets: dict[str, Target], samples: int, batch: int) -> int:
    """Whole batches, about 64 MiB and at most 8,192 rows; the blocks of a view alike, so that little is padding."""
    row = sum(target.row_bytes for target in targets.values())
    most = min(_BLOCK_ROWS, max(batch, _BLOCK_BYTES // max(row, 1)))
    even = -(-samples // -(-samples // most))
    return even if even <= batch else -(-even // batch) * batch


def _libraries(teacher: Teacher) -> dict[str, str]:
    ours = {"softcache": softcache.__version__, "numpy": np.__version__, "numcodecs": version("numcodecs")}
    return ours | {"machine": platform.machine()} | teacher.libraries()


def check(source: Source, views: int, block_rows: int | None, recipe: Recipe) -> None:
    """Refuse what cannot be a cache before a teacher is loaded."""
    if not len(source):
        raise SourceError(f"{source.describe()} is empty")
    if not 1 <= views <= MAX_VIEWS:
        raise SpecError(f"views is {views:,}: from 1 to {MAX_VIEWS:,}")
    if block_rows is not None and not 1 <= block_rows <= MAX_BLOCK_ROWS:
        raise SpecError(f"block_rows is {block_rows:,}: from 1 to {MAX_BLOCK_ROWS:,}")
    if (recipe.mixed or recipe.tiled) and len(source) < 2:
        what = "mixes every sample with another" if recipe.mixed else "shows every sample with others"
        raise SpecError(
            f"recipe {recipe.spec!r} {what}, and {source.describe()} is all there is: leave out the "
            f"{'mix' if recipe.mixed else 'mosaic'}, or give more samples"
        )
    if recipe.boxed and not source.has_boxes:
        raise SpecError(
            f"recipe {recipe.spec!r} asks where the boxes are, and {source.describe()} has none: leave out the op, or name "
            "a source with boxes"
        )
    if views <= recipe.starts[-1]:
        raise SpecError(
            f"recipe {recipe.spec!r} has {recipe.starts[-1]} views before its last phase, and views={views:,} leaves none "
            "for that: cache more views, or shorten the phases"
        )
