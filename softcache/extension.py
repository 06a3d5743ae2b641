"""``extend``: more views, another target or another teacher for a cache that is there, and whose files nobody touches.

It is a build of the cache's next part: the same loop, the same receipts, and the manifest put in place last. Until then the
cache is what it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softcache import cache as caches
from softcache import canary
from softcache.builder import complete
from softcache.cache import Cache
from softcache.choice import outgrown
from softcache.commission import check_numbers, in_order, open_source, teller
from softcache.errors import MismatchError, NotBuilt, SpecError
from softcache.job import check, prepare
from softcache.licences import read as read_licences
from softcache.mend import require_undamaged, require_whole
from softcache.parts import Part
from softcache.recipe import Recipe
from softcache.source import Source
from softcache.store import Store
from softcache.targets import Request, is_logits, requests, taps
from softcache.teachers import Options
from softcache.teachers.ensemble import assemble
from softcache.teachers.named import called, options_like

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")


def extend(
    cache: str | Path | Store,
    *,
    source: Any,
    teacher: str | Callable[..., Any] | Sequence[str | Callable[..., Any]],
    targets: Mapping[str, str] | Sequence[str] | None = None,
    views: int | None = None,
    name: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    layout: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    weights: str | Path | Sequence[str | Path | None] | None = None,
    allow_pickle: bool = False,
    precision: str | None = None,
    device: str | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    color: str | None = None,
    flip_tta: bool = False,
    classes: str | Path | Sequence[str] | None = None,
    label_smoothing: float | None = None,
    head: str | None = None,
    batch: int | None = None,
    licences: Mapping[str, str] | Sequence[str] = (),
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    progress: bool = True,
) -> Cache:
    """Add to a finished cache, or go on with that. Recipe, seed and unreadable images are those of the cache.

    Args:
        cache: its folder.
        source: what it was built from; split and layout are the cache's where they are not said.
        views: so many views of each image there shall be. Everything that the cache holds is made of the new ones, by its
            one teacher.
        targets: or: what to keep besides, of all views, as :func:`softcache.build` takes it.
        name: what another teacher is called, if it is another: its targets then are ``NAME.logits`` and so on. Without it
            ``teacher`` is the cache's own, and everything about it (weights, precision, batch) is as it was; so it is for
            a name that the cache knows.
        licences: as for :func:`softcache.build`. What was stated of the teacher is forgotten when there is another one.

    The rest is as for :func:`softcache.build`.

    Returns:
        The open cache. Where everything was there already, no row went through the teacher.

    Raises:
        DamageError: a file of the cache is missing or cut.
        MismatchError: source or teacher are not those of the cache, a target is there already, another extension has
            begun, or there are several teachers, so that nobody can make more views of all.
        SoftcacheError: of the other kinds in :mod:`softcache.errors`; what was committed stays committed.
    """
    check_numbers(rank, world, batch, workers, label_smoothing)
    if (views is None) == (targets is None):
        raise SpecError("say views, how many there shall be, or targets, what to keep of all: one of the two")
    if name is not None and not _NAME.fullmatch(name):
        raise SpecError(f"the teacher's name {name!r}: up to 32 letters, digits, '_' and '-', a letter first")
    say, stated = teller(progress), {what: one for what, one in read_licences(licences).items() if one}
    store = cache if isinstance(cache, Store) else Store(cache)
    held = caches.open(store.root)
    if not held.complete:
        raise NotBuilt(f"{held.path} is not finished: run the same build-cache command again, then extend it")
    held.require_replayable("extend")
    require_whole(held)
    if held.tars:
        raise MismatchError(
            f"{held.path} is an export to tars: extend the cache it was made of, and export that"
        )
    if targets is not None:
        added = _more_targets(held, requests(targets), name or "")
    elif name is not None:
        raise SpecError("more views are by the cache's own teacher: leave its name out")
    else:
        added = _more_views(held, views or 0)
        if added.first == added.views:
            say(f"{held.path} has {views:,} views: nothing is to be done")
            return held

    require_undamaged(held, added.before)
    samples = _source(held, source, split, limit, layout, image_column, label_column)
    recipe = Recipe(held.identity["recipe"]["spec"], held.identity["recipe"]["seed"])
    say(samples.describe())
    if held.samples < len(samples) and set(held.ids) < set(samples.ids):
        raise MismatchError(
            f"{samples.describe()} has all {held.samples:,} samples of {held.path}, and more: was it built with a limit? "
            f"Say --limit {held.samples} (limit={held.samples}); new samples are a cache of their own"
        )
    check(samples, added.views, None, recipe)
    say(canary.pair(held, samples, tolerance=0).message)
    options = added.options(
        allow_pickle=allow_pickle or None,
        precision=precision,
        device=device,
        batch=batch,
        input_size=(input_size, input_size) if isinstance(input_size, int) else input_size,
        mean=mean,
        std=std,
        color=color,
        flip_tta=flip_tta or None,
        label_smoothing=label_smoothing,
        head=head,
    )
    who = assemble(teacher, weights, options)
    if options.columns is None:
        who = in_order(who, added.asked, classes, held.classes, say)
    job = prepare(
        store,
        samples,
        called(who, added.name),
        recipe,
        added.called,
        added.views,
        held.grid.block_rows,
        skip_corrupt=bool(held.invalid.size),
        ignore_labels=held.classes is None and held.identity["source"]["labels"] is None,
        before=added.before,
        first=added.first,
        named=added.name,
    )
    grown = complete(job, stated, rank, world, workers, progress)
    if note := outgrown(grown):
        say(note)
    return grown


@dataclass(frozen=True)
class _Addition:
    """What is asked for: the part after ``before``, of the views from ``first`` to before ``views``, by the teacher that is
    called ``name``, with the targets ``asked`` as the teacher calls them."""

    before: tuple[Part, ...]
    first: int
    views: int
    asked: tuple[Request, ...]
    name: str = ""

    @property
    def called(self) -> tuple[Request, ...]:
        """The targets as the cache calls them."""
        return tuple(_called(request, self.name) for request in self.asked)

    def options(self, **said: Any) -> Options:
        """Those of the teacher where the cache knows it, but for what is said (not None)."""
        asked, known = taps(self.asked), [part for part in self.before if part.named == self.name]
        if known:
            return options_like(known, asked, **said)
        return Options(taps=asked, **{key: value for key, value in said.items() if value is not None})


def _more_views(held: Cache, views: int) -> _Addition:
    number = next((p.number for p in held.parts if p.grid.first and p.grid.views == views), len(held.parts))
    before = held.parts[:number]
    have = before[-1].grid.views
    if views < have:
        raise SpecError(f"{held.path} has {have:,} views, and views={views:,} is how many there shall be")
    if several := sorted({part.named for part in before} - {""}):
        raise MismatchError(
            f"more views are of all targets, and several teachers made those of {held.path} ({', '.join(several)} and "
            "the first): add views before other teachers, or build a cache of each and open them together"
        )
    kept = [f"{n}:{t.kind}={t.spec}" for part in before for n, t in part.targets.items()]
    return _Addition(before, have, views, requests(list(dict.fromkeys(kept))))


def _more_targets(held: Cache, asked: tuple[Request, ...], name: str) -> _Addition:
    names = {_called(request, name).name for request in asked}
    _refuse_alike({name}, {part.named for part in held.parts}, "teacher")
    _refuse_alike(names, names | set(held.targets), "target")
    same = (p.number for p in held.parts[1:] if not p.grid.first and names == p.targets.keys())
    before = held.parts[: next(same, len(held.parts))]
    return _Addition(before, 0, before[-1].grid.views, asked, name)


def _refuse_alike(names: set[str], known: set[str], what: str) -> None:
    """Refuse names that differ in their case alone: a folder of many systems holds one of them."""
    for name, other in ((a, b) for a in sorted(names) for b in sorted(known)):
        if name != other and name.casefold() == other.casefold():
            raise SpecError(
                f"the {what} {name!r} differs from {other!r} in its case alone: give it another name"
            )


def _called(request: Request, name: str) -> Request:
    """A target of the teacher of that name."""
    if not name:
        return request
    kind = request.kind or ("logits" if is_logits(request.name) else None)
    return replace(request, name=f"{name}.{request.name}", kind=kind)


def _source(
    held: Cache, source: Any, split: str | None, limit: int | None, layout: str | None, *columns: Any
) -> Source:
    """The source; split and layout of files as the cache's, where they are not said."""
    if isinstance(source, str | Path):
        built = held.identity["source"]
        split, layout = split or built["split"], layout or built["layout"]
    return open_source(source, split, limit, layout, *columns)
