"""A cache grows by parts: what was built first is part 0, and each extension adds one.

Shards of all parts lie in the arrays of the whole cache. What is a part's own (identity, receipts, table, constants) lies
in ``parts/NUMBER/``; part 0's lies where it lay before there were others. Every target has every view.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from softcache.arrays import block_arrays, view_rows
from softcache.block import Block, Grid
from softcache.errors import DamageError, MismatchError, nearest
from softcache.identity import Identity, differences, told
from softcache.targets import Target, taps
from softcache.zarrfile import Array

MAX_PARTS = 1000


@dataclass(frozen=True)
class Part:
    """Some targets in some views, by one teacher.

    Attributes:
        number: 0 for what was built first.
        identity: what it is of; ``identity.grid.views`` is how many views there are with it.
        brings_views: does it hold the views themselves, or are they in an earlier part?
    """

    number: int
    identity: Identity
    brings_views: bool = True

    @property
    def named(self) -> str:
        """What its teacher is called; empty for the cache's first."""
        return self.identity.named

    @property
    def taps(self) -> tuple[str, ...]:
        """What its teacher is asked for besides its logits, in the teacher's own words."""
        return tuple(
            t
            for t in (t.removeprefix(f"{self.named}.") for t in taps(self.targets.values()))
            if t != "logits"
        )

    @property
    def logits(self) -> str:
        """What its teacher's logits are called, of which top-1 is counted."""
        return f"{self.named}.logits" if self.named else "logits"

    @property
    def identity_file(self) -> str:
        return identity_file(self.number)

    @property
    def table_file(self) -> str:
        return f"parts/{self.number}/files.bin" if self.number else "files.bin"

    def claim(self, block: Block) -> str:
        """What is claimed by who computes a block."""
        return f"part{self.number}-{block.name}" if self.number else block.name

    def claim_of_bases(self, index: int) -> str:
        """What is claimed by who makes the bases of the blocks of this index."""
        return f"part{self.number}-anchors-b{index:06d}"

    def receipt(self, block: Block) -> str:
        """The name of a block's receipt."""
        return f"{f'parts/{self.number}' if self.number else 'receipts'}/{block.name}.json"

    def constant(self, name: str) -> str:
        """The path of a constant array of its own."""
        return f"parts/{self.number}/{name}" if self.number else name

    @cached_property
    def grid(self) -> Grid:
        return self.identity.make_grid()

    @cached_property
    def targets(self) -> dict[str, Target]:
        return self.identity.make_targets()

    @cached_property
    def arrays(self) -> list[Array]:
        """Those it has shards of, in the order of its receipts' files."""
        recipe = self.identity.recipe
        views = view_rows(0, recipe.parameters, recipe.mixed, recipe.tiled) if self.brings_views else None
        return block_arrays(self.grid, self.targets, views)


def identity_file(number: int) -> str:
    """Where the identity of a part lies: the first file that is written of it."""
    return f"parts/{number}/identity.json" if number else "receipts/identity.json"


def follow(identities: Iterable[Identity]) -> tuple[Part, ...]:
    """The parts of a cache, by the identities in its manifest.

    Raises :class:`~softcache.errors.DamageError` where one cannot follow those before it.
    """
    found: list[Part] = []
    for number, identity in enumerate(identities):
        if why := refuses(found, identity):
            raise DamageError(f"part {number} of the manifest does not follow from those before it: {why}")
        found.append(next_part(found, identity))
    return tuple(found)


def by(parts: Iterable[Part], name: str) -> tuple[Part, ...]:
    """Those of the teacher of that name, the first teacher's being empty. :class:`MismatchError` where there is none."""
    known = tuple(parts)
    if found := tuple(part for part in known if part.named == name):
        return found
    names = sorted({part.named for part in known} - {""})
    told = (
        f"its other teachers are called {', '.join(names)}"
        if names
        else "it has one teacher, which has no name"
    )
    raise MismatchError(f"the cache has no teacher {name!r}{nearest(name, names)}: {told}")


def next_part(parts: Iterable[Part], identity: Identity) -> Part:
    """The part with this identity, after those."""
    before = tuple(parts)
    return Part(len(before), identity, not before or identity.grid.first > 0)


def refuses(parts: Iterable[Part], identity: Identity) -> str:
    """Why no part of this identity can come after those; empty when it can."""
    before, ours, name = tuple(parts), identity.grid, identity.named
    if not before:
        return "it is the first one, and says that it follows on others" if ours.first or name else ""
    if len(before) > MAX_PARTS:
        return f"there are {MAX_PARTS:,} already"
    first = before[0].identity
    for key in ("source", "recipe"):
        a, b = getattr(first, key), getattr(identity, key)
        if a != b:
            return told(differences(a.model_dump(), b.model_dump(), key))
    theirs = first.grid
    if (ours.samples, ours.block_rows, ours.key) != (theirs.samples, theirs.block_rows, theirs.key):
        return "its grid is another"
    same = next((part.identity.teacher for part in before if part.named == name), identity.teacher)
    if found := same.unlike(identity.teacher):
        return f"its teacher is another: {told(found)}"
    probes = [part.identity.probes for part in before if part.identity.probes]
    if probes and identity.probes not in (None, probes[0]):
        return "its probes are drawn by another rule"
    return _other_views(before, identity) if ours.first else _other_targets(before, identity)


def _other_targets(before: tuple[Part, ...], identity: Identity) -> str:
    views, held = before[-1].grid.views, {name for part in before for name in part.identity.targets}
    if both := sorted(held & identity.targets.keys()):
        return f"the target {both[0]!r} is there already"
    for name in identity.targets:
        if identity.named and not name.startswith(f"{identity.named}."):
            return f"the target {name!r} is not named after the teacher {identity.named!r}"
    name, names = identity.named, {part.named for part in before}
    others = {target for part in before if part.named != name for target in part.identity.targets}
    if taken := (_owners(identity.targets) & (names - {name})) | (_owners(others) & {name}):
        return f"the teacher {min(taken)!r} has the name of another one's targets"
    if identity.grid.views != views:
        return f"it has {identity.grid.views:,} of {views:,} views"
    return ""


def _owners(targets: Iterable[str]) -> set[str]:
    """The teachers that these targets seem to be of, by their names."""
    return {owner for owner, dot, _ in (target.partition(".") for target in targets) if dot}


def _other_views(before: tuple[Part, ...], identity: Identity) -> str:
    grid, views = identity.grid, before[-1].grid.views
    held = {name: target for part in before for name, target in part.identity.targets.items()}
    if identity.named or any(part.named for part in before):
        return "more views are of all targets, and several teachers made them"
    if grid.first != views or grid.views <= grid.first:
        return f"its views are {grid.first:,} to {grid.views - 1:,}, after {views:,}"
    if held != identity.targets:
        return "more views are of all targets, and its targets are others"
    if next((p.identity.probes for p in before if p.identity.probes), None) != identity.probes:
        return "its probes are drawn by another rule"
    return ""


def together(parts: tuple[Part, ...]) -> Identity:
    """What the parts are together: part 0, with the targets and the views of all."""
    first, last = parts[0].identity, parts[-1].identity
    if len(parts) == 1:
        return first
    targets = {name: target for part in parts for name, target in part.identity.targets.items()}
    grid = first.grid.model_copy(update={"views": last.grid.views})
    probes = next((part.identity.probes for part in parts if part.identity.probes), None)
    return first.model_copy(update={"targets": targets, "grid": grid, "probes": probes})
