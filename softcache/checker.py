"""Verify a cache, against its manifest or a living teacher; compare two caches."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache import cache as caches
from softcache import canary, inventory, measure, pulled, tars
from softcache import manifest as m
from softcache.bases import digest as bases_digest
from softcache.cache import Cache
from softcache.codecs import NOTHING, Objects
from softcache.codecs.fixed import HIGH, LOW
from softcache.documents import read_receipt
from softcache.errors import DamageError, MismatchError, NotBuilt
from softcache.identity import differences
from softcache.keyed import draws
from softcache.noise import labelling
from softcache.parts import Part, by
from softcache.probe import answers
from softcache.probes import Probes, visible
from softcache.recipe import View, gather, render
from softcache.source import Boxes, Source
from softcache.targets import Items, Target
from softcache.teachers import Teacher
from softcache.teachers.named import called, require_living

FOREIGN = "is no file of this cache"
_DECIDING = ("members", "weights", "input_spec", "flip_tta", "columns")  # what tells teachers from each other
# of measures, by how their names end: more is wrong of any teacher, and less is what processors differ by
_TOLERATED = {"boxes": (0.02, 1e-4), "reference": (0.02, 1e-4), "_l2": (0.25, 1e-3)}


@dataclass(frozen=True)
class Damage:
    """A file that is not what the manifest says.

    Attributes:
        file: inside the cache. problem: what is wrong, in words.
        target, field, view, shard: where its values stand; of a receipt view and shard alone; None for files of the cache
            as a whole.
    """

    file: str
    problem: str
    target: str | None = None
    field: str | None = None
    view: int | None = None
    shard: int | None = None

    def __str__(self) -> str:
        where = (
            f" (target {self.target}, {self.field}, view {self.view}, shard {self.shard})"
            if self.target
            else ""
        )
        return f"{self.file}{where}: {self.problem}"


def verify(cache: Cache | str | Path, *, read_data: bool = False) -> list[Damage]:
    """Everything that is wrong with a cache; an empty list when nothing is.

    Every file the manifest names must be there with its size, and no other file; of a cache that was pulled in part, every
    file that was asked for. With ``read_data`` every byte is read and every file's sha256 compared: one flipped bit anywhere
    is found. Of an export to tars this holds of its tars, and with ``read_data`` what they hold is compared with the cache's
    own manifest, too.

    Raises:
        DamageError: the manifest itself is missing or damaged, so that nothing can be told of the rest.
        NotBuilt: the build is not finished.
    """
    cache = cache if isinstance(cache, Cache) else caches.open(cache)
    if cache.manifest is None:
        raise NotBuilt(f"{cache.path} is not finished: run the same build-cache command again, then verify")
    if lost := list(_lost_tables(cache)):
        return lost  # nothing can be told of the rest
    expected, found = list(inventory.files(cache)), []
    known = {m.MANIFEST, pulled.FILE, *(one.file for one in expected)}
    if cache.tars:
        whole = {one.file: one.entry for one in expected if one.shard is not None}
        expected = [one for one in expected if one.shard is None and one.content is None]
        known = {m.MANIFEST, *(one.file for one in expected)} | tars.names(cache.grid)
        found = [Damage(*told) for told in cache.tars.problems(whole if read_data else None)]
    here = cache.pulled or pulled.read(cache.store)  # a cache that is streamed is a part, too
    for one in expected:
        if here and not here.has(one) and not cache.store.exists(one.file):
            continue
        problem = inventory.problem(cache, one, read_data)
        if problem:
            found.append(Damage(one.file, problem, one.target, one.field, one.view, one.shard))
    found += _other_bases(cache) if read_data and not found and not cache.tars else ()
    foreign = [name for name in cache.store.names() if name not in known]
    return found + [Damage(name, FOREIGN) for name in inventory.unexpected(cache, foreign)]


def _lost_tables(cache: Cache) -> Iterator[Damage]:
    for part in cache.parts:
        try:
            cache.table(part.number)
        except DamageError as e:
            yield Damage(part.table_file, str(e))


def _other_bases(cache: Cache) -> Iterator[Damage]:
    """Bases that are others than those that a block's rows were encoded against, as its receipt says."""
    for part in cache.parts:
        names, grid = [name for name, target in part.targets.items() if target.shared], part.grid
        for index in range(grid.blocks_per_view if names else 0):
            first = grid.block(0, index)
            positions = np.arange(first.start, first.start + first.rows)
            bases = {name: bases_digest(cache.beside(name, positions)) for name in names}
            for view in range(grid.first, grid.views):
                block = grid.block(view, index)
                if not cache.store.exists(name := part.receipt(block)):
                    continue  # it was not pulled
                for target, digest in read_receipt(cache.store, part, block)[0].anchors.items():
                    if bases.get(target) != digest:
                        problem = (
                            "its rows were encoded against other bases than the constants in anchors/ are"
                        )
                        yield Damage(name, problem, target, None, view, index)


# -- against a living teacher ------------------------------------------------------------------------------


def verify_live(
    cache: Cache,
    source: Source,
    teacher: Teacher,
    rows: int,
    seed: int | None = None,
    name: str | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Run the teacher again on ``rows`` rows of the cache.

    Args:
        rows: how many, drawn anew each time, so that nobody can know which will be looked at; with a ``seed`` by that.
        name: which teacher it is, of a cache that has several; the first that it may be, by default.

    Returns:
        target → ``{"cache": {...}, "control": {...}}``: the number of rows that are ``wrong``, not what the teacher says of
        these views (see :func:`_wrong`), and the mean fidelity (see :func:`softcache.measure.fidelity`; of
        logits also how often the class agrees, and the cosine) of the cached values to what the teacher says now, and
        beside it of the teacher to itself when the same rows come in other batches: what no cache can beat. Of an extended
        cache those targets alone that this teacher made.

    Raises:
        MismatchError: the source is not that of the cache, or the teacher none of its teachers.
    """
    cache.require_replayable("verify --live")
    pairing = canary.pair(cache, source)
    parts = _parts_of(cache, teacher, name)
    ours, teacher = parts[0].identity.teacher, called(teacher, parts[0].named)
    chosen = _choose(cache, rows, secrets.randbits(64) if seed is None else seed)
    probing = next((p.identity for p in parts if p.identity.probes), parts[0].identity)
    targets = {n: t for part in parts for n, t in part.targets.items()}
    boxed, size = any(target.boxed for target in targets.values()), teacher.input_spec.size

    def boxes(sample: int) -> Boxes | None:
        return source.boxes(int(pairing.index[sample]))

    asked = Probes.of(probing.model_dump(mode="json"), cache.ids, boxes)
    views = [cache.read_views(k, np.array([sample]))[0] for sample, k in chosen]
    pixels, given = _seen(source, pairing.index, chosen, views, size, asked)
    if labelling(targets.values()):
        labels = canary.class_labels(cache, source, pairing.index)
        given["labels"] = labels[[sample for sample, _ in chosen]].astype(np.int64)
    objects = [
        visible(view, sample, boxes, size) if boxed else NOTHING
        for view, (sample, _) in zip(views, chosen, strict=True)
    ]
    live = answers(teacher, pixels, ours.batch, **given)
    turned = {name: values[::-1] for name, values in given.items()}
    control = answers(teacher, pixels[::-1], max(1, ours.batch // 2 + 1), **turned)
    found = {}
    for name, target in targets.items():
        if target.tap not in live or live[target.tap].shape[1:] != target.shape:
            gives = live[target.tap].shape[1:] if target.tap in live else "nothing"
            raise MismatchError(
                f"target {name!r} of the cache is {target.shape}, and the teacher gives {gives}"
            )
        said = [target.wrap(row[None]) for row in live[target.said]]
        again = [target.wrap(row[None]) for row in control[target.said][::-1]]
        kept = [cache.read(v, np.array([s]), [name])[name] for s, v in chosen]
        again = [a.take(k.index) if isinstance(a, Items) else a for a, k in zip(again, kept, strict=True)]
        lost = [
            _lost(cache, target, row[None], shown, sample)
            for row, shown, (sample, _) in zip(live[target.tap], objects, chosen, strict=True)
        ]
        found[name] = {"cache": _means(said, kept), "control": _means(said, again)}
        for side, values, noise in (("cache", kept, again), ("control", again, said)):
            found[name][side]["wrong"] = float(_wrong(said, values, noise, lost).sum())
    return found


def _lost(cache: Cache, target: Target, said: np.ndarray, shown: Objects, sample: int) -> Any:
    """What is left of a row that was said of a sample."""
    beside = cache.beside(target.name, cache.grid.positions(np.array([sample])))
    return target.decode(target.encode(said, [shown], beside) | beside)


def _parts_of(cache: Cache, teacher: Teacher, name: str | None) -> tuple[Part, ...]:
    """The parts of a cache that this teacher made, all under one name."""
    asked = cache.parts if name is None else by(cache.parts, name)
    if len({part.named for part in asked}) == 1:
        require_living(asked[0].identity.teacher)
    theirs, refusals = teacher.identity(), {}
    for part in asked:
        ours = part.identity.teacher
        # a file may have another name; code that names no weights has nothing else
        deciding = _DECIDING if ours.weights else ("name", *_DECIDING)
        differing = (k for k in deciding if getattr(ours, k) != getattr(theirs, k))
        key = next(differing, None)
        if key is None:
            return by(cache.parts, part.named)
        refusals[part.named] = f"its {key} is {getattr(theirs, key)} and was {getattr(ours, key)}"
    whose = "; ".join(f"{why} of {named!r}" if named else why for named, why in refusals.items())
    several = " (say which one is meant with --as NAME)" if len(refusals) > 1 else ""
    raise MismatchError(f"the teacher is not the one of the cache: {whose}{several}")


def _wrong(said: list[Any], kept: list[Any], again: list[Any], lost: list[Any]) -> np.ndarray:
    """Which rows are not what the teacher says of them, bool ``(n,)``: those of which a part is not.

    A part is not that is further from it than half the way to what is kept of another view, the median of them, or than
    what no processor makes of it, and much further than what the codec leaves of it, or the teacher itself in other
    batches: one that was exchanged with another's, or made up, is.
    """
    own, best, control = (
        [_far(a, b) for a, b in zip(said, them, strict=True)] for them in (kept, lost, again)
    )
    others = [_far(a, b) for a, b in zip(said, [*kept[1:], *kept[:1]], strict=True)]
    wrong = np.zeros(len(said), bool)
    for part in own[0] if own else ():
        mine, left, noise = (np.array([row.get(part, 0.0) for row in rows]) for rows in (own, best, control))
        most, least = next((two for end, two in _TOLERATED.items() if part.endswith(end)), (np.inf, 1e-6))
        far = min(float(np.median([row[part] for row in others])) / 2, most)
        wrong |= (mine > far) & (mine > 4 * np.maximum(left, noise) + least)
    return wrong


def _far(said: Any, kept: Any) -> dict[str, float]:
    """How far a row is from another, part by part, in every measure that there is of it; of boxes after their cut."""
    if isinstance(said, Items):
        cut = {n: np.clip(said.parts[n], LOW, HIGH) for n in ("boxes", "reference") if n in said.parts}
        said = replace(said, parts={**said.parts, **cut})
    found = {key: float(np.mean(values)) for key, values in measure.fidelity(said, kept).items()}
    if "agreement" in found:
        return {"disagreement": 1 - found["agreement"]}
    return {key: v for key, v in found.items() if not key.endswith(("cosine", "_max", "_clipped"))}


def least_share(rows: int) -> float:
    """The share of wrong rows of which one is among so many with 95 %: the rule of three."""
    return min(1.0, 3 / rows)


def _choose(cache: Cache, rows: int, seed: int) -> list[tuple[int, int]]:
    draw, refused = draws("live", cache.digest, seed), set(cache.invalid.tolist())
    valid = (cache.samples - len(refused)) * cache.views
    chosen: dict[tuple[int, int], None] = {}
    while len(chosen) < min(rows, valid):
        row = draw.integer(cache.samples), draw.integer(cache.views)
        if row[0] not in refused:
            chosen[row] = None
    return list(chosen)


def _seen(
    source: Source,
    index: np.ndarray,
    chosen: list[tuple[int, int]],
    views: list[View],
    size: tuple[int, int],
    asked: Probes | None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the teacher saw, and what it was given besides."""
    pixels, boxes = np.empty((len(chosen), *size, 3), np.uint8), []
    for i, ((sample, k), view) in enumerate(zip(chosen, views, strict=True)):
        images = gather(sample, view, lambda i: source.image(int(index[i])))
        pixels[i] = render(images[sample], view, size, images)
        if asked:
            boxes.append(asked(view, sample, k))
    return pixels, {"probes": np.stack(boxes)} if boxes else {}


def _means(said: list[Any], kept: list[Any]) -> dict[str, float]:
    """The mean fidelity of decoded targets of a row each."""
    rows = [_compare(a, b) for a, b in zip(said, kept, strict=True)]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _compare(said: Any, kept: Any) -> dict[str, np.ndarray]:
    found = measure.fidelity(said, kept)
    if isinstance(said, Items):
        found["shared"] = np.isin(kept.index, said.index).mean(axis=-1)
    elif hasattr(said, "top1"):
        found["agreement"] = said.top1() == kept.top1()
        if hasattr(said, "values") and hasattr(kept, "values"):
            found["cosine"] = measure.cosine(said.values, kept.values)
    return found


# -- two caches --------------------------------------------------------------------------------------------


def diff(a: Cache, b: Cache, rows: int = 64) -> dict[str, Any]:
    """Where two caches differ.

    Returns:
        ``{"same": bool, "identity": [(field, in a, in b), …], "licences": likewise, "ids": {"only_a", "only_b",
        "both"}, "values": {target: fidelity of b to a}}``; the values are of up to ``rows`` keyed rows
        that both hold, of caches that are not the same.
    """
    identity = differences(a.identity, b.identity)
    for name in (n for n in a.targets if n in b.targets):
        ours, theirs = (one.teacher(name) for one in (a, b))
        if ours != a.identity["teacher"] or theirs != b.identity["teacher"]:
            identity += differences(ours, theirs, f"teacher of {name}")
    theirs, ours = set(b.ids), set(a.ids)
    both = [i for i in a.ids if i in theirs]
    found = {
        "same": a.digest == b.digest,
        "digests": [a.digest, b.digest],
        "identity": identity,
        "licences": differences(a.licences, b.licences),
        "ids": {"only_a": len(ours - theirs), "only_b": len(theirs - ours), "both": len(both)},
        "values": {},
    }
    invalid = {c.ids[i] for c in (a, b) for i in c.invalid}
    usable, views = [i for i in both if i not in invalid], min(a.views, b.views)
    draw = draws("diff", a.digest, b.digest)
    rows = rows if usable and not found["same"] else 0
    chosen = [(usable[draw.integer(len(usable))], draw.integer(views)) for _ in range(rows)]
    for name, target in a.targets.items():
        if chosen and name in b.targets and b.targets[name].shape == target.shape:
            said, kept = (
                [c.read(v, np.array([c.index(id)]), [name])[name] for id, v in chosen] for c in (a, b)
            )
            found["values"][name] = _means(said, kept)
    return found
