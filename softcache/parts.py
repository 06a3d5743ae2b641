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
from softcache.errors import DamageError
from softcache.identity import Identity
from softcache.targets import Target
from softcache.zarrfile import Array


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
    def identity_file(self) -> str:
        return identity_file(self.number)

    @property
    def table_file(self) -> str:
        return f"parts/{self.number}/files.bin" if self.number else "files.bin"

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
        if not found and identity.grid.first:
            raise DamageError(
                f"part 0 of the manifest begins at view {identity.grid.first:,}, and not at the first"
            )
        if why := found and refuses(found, identity):
            raise DamageError(f"part {number} of the manifest does not follow from those before it: {why}")
        found.append(next_part(found, identity))
    return tuple(found)


def next_part(parts: Iterable[Part], identity: Identity) -> Part:
    """The part with this identity, after those."""
    before = tuple(parts)
    return Part(len(before), identity, not before or identity.grid.first == before[-1].grid.views)


def refuses(parts: Iterable[Part], identity: Identity) -> str:
    """Why no part of this identity can come after those; empty when it can."""
    before = tuple(parts)
    first, last = before[0].identity, before[-1].identity
    held = {name: target for part in before for name, target in part.identity.targets.items()}
    for key in ("source", "recipe"):
        if getattr(first, key) != getattr(identity, key):
            return f"its {key} is another"
    ours, theirs = first.grid, identity.grid
    if (ours.samples, ours.block_rows, ours.key) != (theirs.samples, theirs.block_rows, theirs.key):
        return "its grid is another"
    if theirs.first == 0:
        both = sorted(held.keys() & identity.targets.keys())
        if both:
            return f"the target {both[0]!r} is there already"
        return (
            "" if theirs.views == last.grid.views else f"it has {theirs.views:,} of {last.grid.views:,} views"
        )
    if theirs.first != last.grid.views or theirs.views <= theirs.first:
        return f"its views are {theirs.first:,} to {theirs.views - 1:,}, after {last.grid.views:,}"
    return "" if held == identity.targets else "more views are of all targets, and its targets are others"
