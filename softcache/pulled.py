"""What is here of a cache that was pulled in part: :data:`FILE`, beside its manifest and no part of it.

Files are missing from such a folder on purpose. A sample is the first blocks of every view: positions are a keyed
permutation of the samples, so that the first are as good as any.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from itertools import groupby, takewhile, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from softcache import manifest as m
from softcache.block import Block
from softcache.errors import NotPulled
from softcache.identity import Count, Many, Model, Sha
from softcache.reader import Files
from softcache.store import Store
from softcache.zarrfile import Array

if TYPE_CHECKING:
    from softcache.cache import Cache
    from softcache.inventory import File

FILE = ".pulled.json"
VIEWS = (
    "view"  # what the views themselves are called where targets are, as in :class:`softcache.inventory.File`
)

Line = Annotated[str, Field(max_length=4096)]


class Pulled(Model):
    """What was asked for, and is here.

    Attributes:
        remote, tag: where from, without user info. digest: of the cache.
        blocks: of each target, and of the views as ``view``, how many of the first blocks of every view are here.
    """

    remote: Line
    tag: Line
    digest: Sha
    blocks: dict[str, Many[Count]]

    def covers(self, target: str, view: int, shard: int) -> bool:
        """Is this shard of a target's fields here?"""
        counts = self.blocks.get(target, [])
        return view < len(counts) and shard < counts[view]

    def has(self, file: File) -> bool:
        """Is this file here?

        Identities, tables and constants always are. No ``zarr.json`` is: plain Zarr would read what is missing as zeros.
        """
        if file.view is None or file.shard is None:
            return file.content is None
        return self.covers(file.target or VIEWS, file.view, file.shard)

    def add(self, other: Pulled) -> Pulled:
        """This and the other, which is the newer."""
        names = sorted(self.blocks.keys() | other.blocks.keys())
        both = {name: _larger(self.blocks.get(name, []), other.blocks.get(name, [])) for name in names}
        return other.model_copy(update={"blocks": both})

    @property
    def targets(self) -> list[str]:
        """Those of which something is here."""
        return [name for name, counts in self.blocks.items() if any(counts) and name != VIEWS]

    def least(self, targets: Iterable[str]) -> int:
        """Of how many of the first blocks all is here of those of these targets that were pulled at all, in the first view
        that has all of them: a later pull adds to it, and takes nothing away."""
        each = self._each_view(targets)
        return next(filter(None, each), 0)

    def views(self, targets: Iterable[str]) -> int:
        """How many of the first views have at least as much of those targets as the first one."""
        each = self._each_view(targets)
        return sum(1 for _ in takewhile(lambda n: 0 < each[0] <= n, each))

    def unused(self, targets: Iterable[str]) -> Iterator[str]:
        """In words, what is here of those targets and is none of the rows that all of them have in :meth:`views`."""
        names = list(targets)
        first, least = self.views(names), self.least(names)
        more = [name for name in names if name != VIEWS and self.blocks.get(name, [0])[0] > least]
        if more:
            yield (
                f"{', '.join(more)} have more samples here than other targets: name those you want, or pull more of the "
                "others"
            )
        left = [view for view, n in enumerate(self._each_view(names)) if n and view >= first]
        if left:
            yield (
                f"the views {', '.join(map(str, left))} are left out: they have fewer samples than view 0 or come "
                f"after one that has: pull more of the views 0:{max(left) + 1} to use them"
            )

    def _each_view(self, targets: Iterable[str]) -> list[int]:
        """Of every view, of how many blocks all those targets are here that were pulled at all."""
        lines = [counts for name in targets if any(counts := self.blocks.get(name, []))]
        return [min(counts) for counts in zip_longest(*lines, fillvalue=0)]

    def command(self, folder: Path, target: str | None = None, view: int | None = None) -> str:
        """What fetches a target in a view; with no target, what goes on with an interrupted pull."""
        words = ["softcache", "pull", self.remote, self.tag, "-o", str(folder)]
        if target is not None:
            words += ["--targets", ",".join(self.targets if target == VIEWS else [target])]
        views = self.blocks.get(VIEWS, [])
        if view is not None and not all(views):
            words += ["--views", f"{view}:{view + 1}"]
        return shlex.join(words)

    def to_file(self, store: Store) -> None:
        store.put(FILE, self.to_bytes())


def _larger(a: list[int], b: list[int]) -> list[int]:
    size = max(len(a), len(b))
    return [max(pair) for pair in zip(*(x + [0] * (size - len(x)) for x in (a, b)), strict=True)]


def told(here: Pulled, cache: Cache) -> str:
    """``here are logits, map of 8 of 20 samples in view 0; vector of 20 of 20 samples in views 0-3``."""
    names: dict[str, list[str]] = {}
    for name in cache.targets:
        if what := _amounts(here.blocks.get(name, []), cache):
            names.setdefault(what, []).append(name)
    if names:
        return "here are " + "; ".join(f"{', '.join(who)} of {what}" for what, who in names.items())
    views = _amounts(here.blocks.get(VIEWS, []), cache)
    return f"here are no targets, and the views of {views}" if views else "no row of it is here"


def _amounts(blocks: list[int], cache: Cache) -> str:
    """Of how many samples something is here in which views; nothing where it is in none."""
    found = []
    for count, run in groupby(enumerate(blocks), key=lambda one: one[1]):
        views = [view for view, _ in run]
        if count:
            samples = min(count * cache.grid.block_rows, cache.samples)
            which = f"view {views[0]}" if len(views) == 1 else f"views {views[0]}-{views[-1]}"
            found.append(f"{samples:,} of {cache.samples:,} samples in {which}")
    return " and ".join(found) + (f" of {cache.views}" if found else "")


def read(store: Store) -> Pulled | None:
    """What was pulled into a folder; None where nothing was, or all."""
    if not store.exists(FILE):
        return None
    hint = "delete it, and the folder is a cache with files missing: pull them again"
    return m.read(Pulled, store.get(FILE, m.MAX_JSON), str(store.path(FILE)), hint)


def unfinished(store: Store, pulled: Pulled) -> NotPulled:
    """The refusal of a folder into which a first pull has not come to its end."""
    return NotPulled(
        f"{store.root} is no cache yet, its pull was interrupted: {pulled.command(store.root)} goes on with it"
    )


class Some(Files):
    """The shards that are here: asked for another, it says so. See :class:`softcache.reader.Shards`."""

    def __init__(self, store: Store, here: Pulled):
        super().__init__(store)
        self._here = here

    def open(self, array: Array, block: Block) -> Any:
        target, name = (
            array.path.removeprefix("targets/").partition("/")[0],
            array.file(block.view, block.index),
        )
        if not self._here.covers(target, block.view, block.index) and not self._store.exists(name):
            raise missing(self._store, self._here, target, block.view, block.index)
        return super().open(array, block)


def missing(store: Store, pulled: Pulled, target: str, view: int, shard: int) -> NotPulled:
    """The refusal of a shard that is not here."""
    what = "the views" if target == VIEWS else f"the target {target!r}"
    here = pulled.targets
    others = (
        f"; say targets={here} to read what is here, or fetch it"
        if here and target not in (VIEWS, *here)
        else ""
    )
    return NotPulled(
        f"block {shard} of view {view} of {what} was not pulled into {store.root}{others}: "
        f"{pulled.command(store.root, target, view)}"
    )
