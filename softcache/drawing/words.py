"""A view in words, for the person who looks at it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from softcache.recipe import View
from softcache.recipe.opcodes import Op, filled
from softcache.recipe.replay import INSTRUCTIONS


def tell(view: View, ids: Sequence[str]) -> str:
    """What is shown of the image, what was done to it, what it is a mosaic of and mixed with; ``ids`` are the cache's."""
    words = [_rectangle(view), *_done(view)]
    if mosaic := view.mosaic:
        tiles = [
            f"view {tile.number} of {ids[tile.sample]} ({tell(tile.view, ids)})" for tile in mosaic.tiles
        ]
        words.append(f"in a mosaic with {', '.join(tiles)}")
    if mix := view.mix:
        how = "cutmix" if mix.blend.width else "mixed"
        words.append(
            f"{how}, {mix.blend.share:.2f} its own, with view {mix.number} of {ids[mix.partner]}: {tell(mix.view, ids)}"
        )
    return ", ".join(words)


def _rectangle(view: View) -> str:
    right, bottom = view.x + view.width, view.y + view.height
    inside = view.x >= 0 and view.y >= 0 and right <= view.image_width and bottom <= view.image_height
    whole = view.x <= 0 and view.y <= 0 and right >= view.image_width and bottom >= view.image_height
    size = f"{view.image_width}x{view.image_height}"
    shown = f"the whole {size}" if whole else f"x {view.x} to {right}, y {view.y} to {bottom} of {size}"
    return shown if inside else f"{shown}, bordered"


def _done(view: View) -> Iterator[str]:
    """What was done to the pixels; a view that was rendered has ops that there are."""
    if view.flip:
        yield "mirrored"
    at, (_, ops) = 0, filled(view.ops)
    while at < len(ops):
        if ops[at] != Op.NOTHING:
            yield Op(ops[at]).name.lower().replace("_", " ")
        at += 1 + len(INSTRUCTIONS[ops[at]].limits)
