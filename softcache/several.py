"""Several caches of the same views, read as one: teachers that were cached one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from softcache import cache as caches
from softcache import spec
from softcache.cache import Cache
from softcache.errors import MismatchError, NotBuilt, SpecError
from softcache.indices import integers


@overload
def open(path: str | Path) -> Cache: ...
@overload
def open(path: Sequence[str | Path]) -> Several: ...
def open(path: str | Path | Sequence[str | Path]) -> Cache:
    """Open the cache in a folder; or those in several folders as one, see :class:`Several`.

    Raises:
        NoCache: there is none.
        DamageError: its manifest is not what was written.
        MismatchError: it was written by a newer major version; or several do not belong together.
    """
    return caches.open(path) if isinstance(path, str | Path) else Several([caches.open(p) for p in path])


class Several(Cache):
    """Caches of the same samples and views, each of another teacher; targets are ``0.logits``, ``1.logits``, ….

    All else (ids and their order, views, class names, canaries, the input spec) is the first one's. The others may hold
    the ids in another order.

    Raises:
        MismatchError: naming what they disagree in: ids, classes, the recipe, its seed, views, the images.
        NotBuilt: one is unfinished.
    """

    def __init__(self, members: Sequence[Cache]):
        if not members:
            raise SpecError("no cache: name one at least")
        first, self.members = members[0], tuple(members)
        if unfinished := [c for c in members if not c.complete]:
            raise NotBuilt(f"{unfinished[0].path} is not finished: run the same build-cache command again")
        super().__init__(first.store, first.parts[0].identity, first.manifest, first.pulled)
        self._where = " + ".join(str(c.path) for c in members)
        for other in members[1:]:
            _check(first, other)
        self._places = [_places(first, other) for other in members]
        self.targets = {
            f"{i}.{name}": replace(target, name=f"{i}.{name}")
            for i, one in enumerate(members)
            for name, target in one.targets.items()
        }

    @property
    def digest(self) -> str:
        """sha256 over the members' names."""
        return spec.digest(spec.canonical_json([c.digest for c in self.members]))

    @property
    def equivariance(self) -> dict[str, dict[str, float]]:
        return {
            f"{i}.{name}": f for i, one in enumerate(self.members) for name, f in one.equivariance.items()
        }

    @cached_property
    def invalid(self) -> np.ndarray:
        """Samples that one of them could not read."""
        refused = [
            np.flatnonzero(np.isin(p, c.invalid)) for p, c in zip(self._places, self.members, strict=True)
        ]
        return np.unique(np.concatenate(refused))

    def pulled_samples(self, targets: str | Iterable[str] | None = None) -> np.ndarray:
        """Those of which the targets are here in every one of them."""
        found = np.arange(self.samples)
        for number, names in self._own(targets).items():
            here = np.isin(self._places[number], self.members[number].pulled_samples(names))
            found = np.intersect1d(found, np.flatnonzero(here))
        return found

    def pulled_views(self, targets: str | Iterable[str] | None = None) -> int:
        """The least of theirs."""
        return min(self.members[number].pulled_views(names) for number, names in self._own(targets).items())

    def _own(self, targets: str | Iterable[str] | None) -> dict[int, list[str]]:
        """Each one's own names of its targets."""
        found: dict[int, list[str]] = {}
        for name in self.names(targets):
            number, _, target = name.partition(".")
            found.setdefault(int(number), []).append(target)
        return found

    def read(
        self,
        view: int,
        samples: np.ndarray,
        names: str | Iterable[str] | None = None,
        *,
        slab: bool = True,
    ) -> dict[str, Any]:
        """As :meth:`softcache.Cache.read`; ``samples`` are indices into the first one's ids."""
        samples = integers(samples)
        self._check(view, samples)
        return {name: self._read(name, view, samples, slab) for name in self.names(names)}

    def _read(self, name: str, view: int, samples: np.ndarray, slab: bool) -> Any:
        self._require(name)
        number, _, own = name.partition(".")
        return self.members[int(number)]._read(own, view, self._places[int(number)][samples], slab)

    def teacher(self, target: str) -> dict[str, Any]:
        self._require(target)
        number, _, own = target.partition(".")
        return self.members[int(number)].teacher(own)

    def table(self, part: int) -> np.ndarray:
        raise SpecError(f"{len(self.members)} caches are open as one: verify each by itself")


def _check(a: Cache, b: Cache) -> None:
    """Refuse two caches that are not of the same views of the same samples, naming the difference."""
    for one in (a, b):
        one.require_replayable("several caches as one")
    ours, theirs = set(a.ids), set(b.ids)
    if ours != theirs:
        one = next(iter(sorted(ours ^ theirs)))
        raise _refusal(a, b, "ids", f"{len(ours):,} and {len(theirs):,}; {one!r} is in one of them only")
    if a.classes != b.classes:
        raise _refusal(a, b, "classes or their order", f"{_first(a.classes)} and {_first(b.classes)}")
    for key in ("spec", "seed", "ops", "render"):
        one, other = a.identity["recipe"][key], b.identity["recipe"][key]
        if one != other:
            raise _refusal(a, b, f"recipe.{key}", f"{one} and {other}")
    if (a.mixed or a.tiled) and a.ids != b.ids:
        what = "mixes" if a.mixed else "makes mosaics of"
        raise _refusal(
            a, b, "order of the ids", f"their recipe {what} samples, and draws partners by their number"
        )
    if a.views != b.views:
        raise _refusal(a, b, "views", f"{a.views} and {b.views}")
    if a.ids == b.ids and a.identity["source"]["content"] != b.identity["source"]["content"]:
        raise _refusal(a, b, "images", "an image has other bytes")


def _first(classes: tuple[str, ...] | None) -> str:
    return "none" if classes is None else ", ".join(classes[:10]) + ("…" if len(classes) > 10 else "")


def _refusal(a: Cache, b: Cache, what: str, told: str) -> MismatchError:
    return MismatchError(
        f"{a.path} and {b.path} cannot be opened together, their {what} differ: {told}. Build both from one source with "
        "the same --recipe, --views and --seed"
    )


def _places(first: Cache, other: Cache) -> np.ndarray:
    """int64 (samples,): where each of the first one's samples is in the other."""
    if first.ids == other.ids:
        return np.arange(first.samples)
    return np.array([other.index(id) for id in first.ids], np.int64)
