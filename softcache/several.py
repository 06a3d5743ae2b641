"""Several caches, read as one: teachers that were cached one by one, or samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np

from softcache import cache as caches
from softcache import spec
from softcache.block import Grid
from softcache.cache import Cache
from softcache.codecs import Fields
from softcache.errors import MismatchError, NotBuilt, SpecError
from softcache.identity import TeacherId, differences, told
from softcache.indices import integers
from softcache.manifest import Report, together


@overload
def open(path: str | Path) -> Cache: ...
@overload
def open(path: Sequence[str | Path]) -> Combined: ...
def open(path: str | Path | Sequence[str | Path]) -> Cache:
    """Open the cache in a folder; or those in several folders as one: of the same samples see :class:`Several`, of others
    :class:`Joined`.

    Raises:
        NoCache: there is none.
        DamageError: its manifest is not what was written.
        MismatchError: it was written by a newer major version; or several do not belong together.
    """
    if isinstance(path, str | Path):
        return caches.open(path)
    members = [caches.open(p) for p in path]
    apart = len(members) > 1 and set(members[0].ids).isdisjoint(members[1].ids)
    return Joined(members) if apart else Several(members)


class Combined(Cache):
    """Caches that are read as one. What is not said otherwise is the first one's."""

    def __init__(self, members: Sequence[Cache]):
        if not members:
            raise SpecError("no cache: name one at least")
        first, self.members = members[0], tuple(members)
        if unfinished := [c for c in members if not c.complete]:
            raise NotBuilt(f"{unfinished[0].path} is not finished: run the same build-cache command again")
        super().__init__(first.store, first.parts[0].identity, first.manifest, first.pulled)
        self._where = " + ".join(str(c.path) for c in members)

    @property
    def digest(self) -> str:
        """sha256 over the members' names."""
        return spec.digest(spec.canonical_json([c.digest for c in self.members]))

    def table(self, part: int) -> np.ndarray:
        raise SpecError(f"{len(self.members)} caches are open as one: verify each by itself")


class Several(Combined):
    """Caches of the same samples and views, each of another teacher; targets are ``0.logits``, ``1.logits``, ….

    All else (ids and their order, views, class names, canaries, the input spec) is the first one's. The others may hold
    the ids in another order.

    Raises:
        MismatchError: naming what they disagree in: ids, classes, the recipe, its seed, views, the images.
        NotBuilt: one is unfinished.
    """

    def __init__(self, members: Sequence[Cache]):
        super().__init__(members)
        first = self.members[0]
        for other in members[1:]:
            _check(first, other)
        self._places = [_places(first, other) for other in members]
        self.targets = {
            f"{i}.{name}": replace(target, name=f"{i}.{name}")
            for i, one in enumerate(members)
            for name, target in one.targets.items()
        }

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

    def beside(self, name: str, positions: np.ndarray) -> Fields:
        number, _, own = name.partition(".")
        return self.members[int(number)].beside(own, positions)

    def teacher_id(self, target: str) -> TeacherId:
        self._require(target)
        number, _, own = target.partition(".")
        return self.members[int(number)].teacher_id(own)


def _check(a: Cache, b: Cache) -> None:
    """Refuse two caches that are not of the same views of the same samples, naming the difference."""
    for one in (a, b):
        one.require_replayable("several caches as one")
    ours, theirs = set(a.ids), set(b.ids)
    if ours != theirs:
        one = next(iter(sorted(ours ^ theirs)))
        raise _refusal(a, b, "ids", f"{len(ours):,} and {len(theirs):,}; {one!r} is in one of them only")
    _check_views(a, b)
    if (a.mixed or a.tiled) and a.ids != b.ids:
        what = "mixes" if a.mixed else "makes mosaics of"
        raise _refusal(
            a, b, "order of the ids", f"their recipe {what} samples, and draws partners by their number"
        )
    if a.ids == b.ids and a.identity["source"]["content"] != b.identity["source"]["content"]:
        raise _refusal(a, b, "images", "an image has other bytes")


def _check_views(a: Cache, b: Cache) -> None:
    """Refuse two caches whose views were not made alike."""
    if a.classes != b.classes:
        raise _refusal(a, b, "classes or their order", f"{_first(a.classes)} and {_first(b.classes)}")
    for key in ("spec", "seed", "ops", "render"):
        one, other = a.identity["recipe"][key], b.identity["recipe"][key]
        if one != other:
            raise _refusal(a, b, f"recipe.{key}", f"{one} and {other}")
    if a.views != b.views:
        raise _refusal(a, b, "views", f"{a.views} and {b.views}")


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


# -- of other samples --------------------------------------------------------------------------------------


class Joined(Combined):
    """Caches of different samples, with the same targets of the same views by the same teachers: new samples are a cache of
    their own. Samples are those of the first, then those of the second, and so on; a mixed view's partners are of its own
    cache.

    Raises:
        MismatchError: naming what they disagree in: targets, teachers, classes, the recipe, its seed, views; or a sample
            that two of them hold.
        NotBuilt: one is unfinished.
    """

    def __init__(self, members: Sequence[Cache]):
        super().__init__(members)
        first = self.members[0]
        for other in members[1:]:
            _check_alike(first, other)
        self.ids = tuple(id for one in members for id in one.ids)
        if len(set(self.ids)) < len(self.ids):
            raise MismatchError(
                f"{self._where} cannot be opened together: some samples are in two of them, and not all. Caches are of the "
                "same samples, or have none in common"
            )
        self.starts = np.cumsum([0, *(one.samples for one in members)])
        self.samples = int(self.starts[-1])
        self.grid = _AsTheyAre(self.samples, self.views, self.samples, 0)
        self.reader: Any = _Readers(self.members, self.starts)

    @cached_property
    def invalid(self) -> np.ndarray:
        return self._numbered(one.invalid for one in self.members)

    @property
    def equivariance(self) -> dict[str, dict[str, float]]:
        """The least of theirs, of targets that all have measured alike."""
        first, *others = (one.equivariance for one in self.members)
        return {
            name: {k: min(f, *(o[name][k] for o in others)) for k, f in found.items()}
            for name, found in first.items()
            if all(o.get(name, {}).keys() == found.keys() for o in others)
        }

    @cached_property
    def report(self) -> Report:
        return together([(one.samples, "", one.report) for one in self.members])

    def pulled_samples(self, targets: str | Iterable[str] | None = None) -> np.ndarray:
        return self._numbered(one.pulled_samples(targets) for one in self.members)

    def pulled_views(self, targets: str | Iterable[str] | None = None) -> int:
        return min(one.pulled_views(targets) for one in self.members)

    def beside(self, name: str, positions: np.ndarray) -> Fields:
        # teachers are the same, and so their last layers
        if not self.targets[name].shared:
            return self.members[0].beside(name, positions)
        return self.reader.gathered(positions, lambda number, own: self.members[number].beside(name, own))

    def whole_view(self, target: str, view: int) -> bool:
        return all(one.whole_view(target, view) for one in self.members)

    def _numbered(self, samples: Iterable[np.ndarray]) -> np.ndarray:
        """Samples of each, by their numbers here."""
        return np.concatenate([some + start for some, start in zip(samples, self.starts[:-1], strict=True)])


class _AsTheyAre(Grid):
    """Samples stand where their numbers say; what is on a disk has its own order."""

    def positions(self, samples: np.ndarray) -> np.ndarray:
        return samples


class _Readers:
    """The rows of several caches, by the samples' numbers in all of them; as :class:`softcache.reader.Reader`."""

    NUMBERS: ClassVar[dict[str, slice]] = {
        "partner": slice(0, 1),
        "tiles": slice(0, None, 2),
    }  # that name samples

    def __init__(self, members: Sequence[Cache], starts: np.ndarray):
        self._members, self._starts = members, starts

    def fields(self, path: str, view: int, positions: np.ndarray, slab: bool = True) -> Fields:
        def read(number: int, own: np.ndarray) -> Fields:
            found = self._members[number].reader.fields(path, view, own, slab)
            for name in self.NUMBERS.keys() & found.keys() if path == "view" else ():
                found[name] = found[name].copy()
                samples = found[name][:, self.NUMBERS[name]]
                samples[...] = self._here(number, samples)
            return found

        return self.gathered(positions, read)

    def gathered(self, positions: np.ndarray, read: Callable[[int, np.ndarray], Fields]) -> Fields:
        """What is read of each member at its own positions, put together."""
        whose, out = np.searchsorted(self._starts, positions, "right") - 1, {}
        for number in np.unique(whose).tolist() or [0]:
            here = np.flatnonzero(whose == number)
            own = self._members[number].grid.positions(positions[here] - self._starts[number])
            for name, values in read(number, own).items():
                if name not in out:
                    out[name] = np.empty((len(positions), *values.shape[1:]), values.dtype)
                out[name][here] = values
        return out

    def _here(self, number: int, samples: np.ndarray) -> np.ndarray:
        """A member's samples by their numbers here; none stays none, and what is none of its is none of ours."""
        outside = samples >= self._members[number].samples
        moved = np.where(outside, self._starts[-1], samples + self._starts[number])
        return np.where(samples < 0, samples, moved)


def _check_alike(a: Cache, b: Cache) -> None:
    """Refuse two caches that are not of the same targets of views made alike, naming the difference."""
    for one in (a, b):
        one.require_replayable("several caches as one")
    _check_views(a, b)
    if found := differences(a.identity["targets"], b.identity["targets"]):
        raise _refusal(a, b, "targets", told(found))
    for name in a.targets:
        if found := a.teacher_id(name).unlike(b.teacher_id(name)):
            raise _refusal(a, b, f"teachers of {name}", told(found))
