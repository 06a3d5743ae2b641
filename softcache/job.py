"""What a build is to make: source, teacher, recipe, targets and the identity they add up to."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

import softcache
from softcache import cache as caches
from softcache import manifest as m
from softcache import probes, tars
from softcache.arrays import constant
from softcache.block import Grid
from softcache.codecs import Objects, is_boxed, is_labelled
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
)
from softcache.parts import Part, identity_file
from softcache.probes import Probes
from softcache.recipe import Recipe, View
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
    """Everything a builder needs, agreed with what the store already holds."""

    store: Store
    source: Source
    teacher: Teacher
    recipe: Recipe
    part: Part
    labels: np.ndarray
    skip_corrupt: bool
    image: Kept

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
    def boxed(self) -> bool:
        """Does one of the codecs ask what a view shows?"""
        return any(target.boxed for target in self.targets.values())

    def objects(self, view: View, sample: int) -> Objects:
        """What a view of a sample shows."""
        return probes.visible(view, sample, self.source.boxes, self.teacher.input_spec.size)

    def see(self, image: np.ndarray, sample: int, k: int) -> tuple[View, dict[int, np.ndarray]]:
        """View number ``k`` of a sample whose image is given, and the images it is rendered from, by sample.

        Raises :class:`~softcache.errors.UnreadableImage`.
        """
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
) -> Job:
    """Agree with the build that has begun in the store, or begin one.

    Raises:
        MismatchError: the store holds something else, or another build (the first differing field is named); or the
            teacher answers another number of classes than the source names.
        TeacherError, CodecError: the teacher's answers do not fit the targets.
    """
    classes = None if ignore_labels else source.classes
    _check_objects(source, classes, asked)
    labels = np.full(len(source), -1) if ignore_labels else source.labels
    identity = partial(_identity, source, classes, labels, teacher, recipe, views, probing(asked))
    stored = begun(store)
    unheard = stored is not None and stored.teacher.answer is None
    said = None if unheard else teacher(_noise(teacher), **_anywhere(asked))
    if stored is None:
        targets = _resolve(said or {}, asked, layouts_of(teacher))
        _check_classes(classes, targets)
        answer = _sketch(said, asked) if teacher.probed else None
        _try(recipe, source)
        constants_of(teacher)  # which are written at the end, and refused now
        stored = _begin(store, source, identity(targets, answer, block_rows))
    answer = _same_answer(stored.teacher.answer, None if said is None else _sketch(said, asked))
    wanted = identity(
        _as_stored(stored, asked, layouts_of(teacher)), answer, block_rows or stored.grid.block_rows
    )
    if stored.digest != wanted.digest:
        raise _refusal(store, stored, wanted)
    # of a part of the source as large a share: a pilot then goes at the build's pace
    image = Kept(source, int(ROOM * source.share) if recipe.mixed or recipe.tiled else 0)
    return Job(store, source, teacher, recipe, Part(0, stored), labels, skip_corrupt, image)


def _try(recipe: Recipe, source: Source) -> None:
    """Refuse a recipe that cannot be done on the first image before a folder is taken for it."""
    try:
        image = source.image(0)
    except UnreadableImage:
        return  # the build tells of all of them
    for k in recipe.starts:
        drawn(recipe, source, 0, k, image)


def begun(store: Store) -> Identity | None:
    """The identity of the build in the store, None for a new one; :class:`MismatchError` where something else lies."""
    if store.exists(tars.NAME):
        raise MismatchError(
            f"{store.root} is an export to tars, not a cache to be built: name another folder for it"
        )
    started = store.exists(identity_file(0))
    foreign = [] if started else [n for n in store.names() if not n.startswith("ids/")]
    if started or store.exists(
        identity_file(0)
    ):  # asked again: another builder may have begun while we looked
        if store.exists(m.MANIFEST):
            caches.open(store.root)  # an edited manifest is damage, not something to build over
        return caches.read_identity(store)
    if store.root.exists() and not store.root.is_dir():
        raise SpecError(f"{store.root} is a file: name a folder for the cache")
    if foreign:
        raise MismatchError(
            f"{store.root} holds something else, for example {foreign[0]!r}: name an empty or a new folder for the cache"
        )
    return None


def _begin(store: Store, source: Source, identity: Identity) -> Identity:
    """Write the ids and the identity once; whoever comes second takes the first one's."""
    while True:
        with store.claim("identity") as mine:
            if store.exists(identity_file(0)):
                return caches.read_identity(store)
            if mine:
                for array, values in ids_arrays(source.ids):
                    store.put(array.file(), array.encode(values))
                store.put(identity_file(0), identity.to_bytes())
                return identity
        time.sleep(0.05)


def ids_arrays(ids: tuple[str, ...]) -> list[tuple[Array, np.ndarray]]:
    """The constants ``ids/offsets`` and ``ids/bytes``."""
    raw = [i.encode() for i in ids]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in raw])]).astype(np.int64)
    text = np.frombuffer(b"".join(raw), np.uint8)
    return [
        (constant(f"ids/{n}", v.shape, v.dtype.name), v) for n, v in (("offsets", offsets), ("bytes", text))
    ]


def probing(asked: tuple[Request, ...]) -> bool:
    """Is one of the targets what the teacher says at boxes that it is given?"""
    return any("probes" in (r.kind, r.name.rpartition(".")[2]) for r in asked)


def _anywhere(asked: tuple[Request, ...]) -> dict[str, np.ndarray]:
    """Boxes for the picture of noise, where they are needed."""
    return {"probes": probes.points(0, "noise", 0, np.zeros((0, 4)))[None]} if probing(asked) else {}


def _noise(teacher: Teacher) -> np.ndarray:
    """One picture, the same for ever: uint8 ``(1, H, W, 3)``."""
    shape = (1, *teacher.input_spec.size, 3)
    numbers = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(2654435761)
    return (numbers >> np.uint64(16)).astype(np.uint8).reshape(shape)


def _sketch(said: Mapping[str, np.ndarray] | None, asked: tuple[Request, ...]) -> list[float]:
    taps = dict.fromkeys(r.tap for r in asked)
    answers = [said[tap].astype(np.float64) for tap in taps if said and tap in said]
    if not all(np.isfinite(a).all() for a in answers):
        raise TeacherError(
            "the teacher answers a picture of noise with values that are not finite: do its weights fit?"
        )
    return [float(x) for a in answers for x in (a.mean(), a.std())]


def _same_answer(stored: list[float] | None, found: list[float] | None) -> list[float] | None:
    """The stored answer where the teacher's is the same but for rounding."""
    if stored is None or found is None:
        return stored
    same = len(stored) == len(found) and np.allclose(stored, found, rtol=1e-3, atol=1e-5)
    return stored if same else found


def _resolve(
    said: Mapping[str, np.ndarray], asked: tuple[Request, ...], layouts: Mapping[str, Layout]
) -> dict[str, Target]:
    """The targets, their shapes taken from the teacher's answer to a picture of noise."""
    for request in asked:
        if request.tap not in said:
            raise TeacherError(f"the teacher has no target {request.tap!r}{nearest(request.tap, said)}")
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


def _check_classes(classes: tuple[str, ...] | None, targets: dict[str, Target]) -> None:
    counts = [t.layout.classes if t.layout else t.shape[0] * is_logits(n) for n, t in targets.items()]
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
            samples=len(source), views=views, block_rows=rows, permutation="feistel-6", key=recipe.seed
        ),
        libraries=_libraries(teacher),
        probes=ProbesId(count=probes.COUNT, version=probes.VERSION) if probed else None,
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


def _refusal(store: Store, stored: Identity, wanted: Identity) -> MismatchError:
    found = differences(stored.model_dump(mode="json"), wanted.model_dump(mode="json"))
    told = "; ".join(f"{path} is {_short(a)} there and {_short(b)} here" for path, a, b in found[:4])
    more = f" (and {len(found) - 4} more)" if len(found) > 4 else ""
    return MismatchError(
        f"{store.root} was begun as another build: {told}{more}. Repeat its settings to go on with it, "
        "or name another folder, or delete this one"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def default_rows(targets: dict[str, Target], samples: int, batch: int) -> int:
    """Whole batches, about 64 MiB and at most 8,192 rows; the blocks of a view alike, so that little is padding."""
    row = sum(int(np.prod(f.shape)) * np.dtype(f.dtype).itemsize for t in targets.values() for f in t.fields)
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
