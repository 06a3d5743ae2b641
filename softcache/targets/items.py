"""Items of a detector: what it says of each anchor, query, probe or proposal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from softcache.codecs.items import Items

if TYPE_CHECKING:
    from softcache.targets.layout import Layout

__all__ = ["ITEMS", "Items", "ItemsKind"]


@dataclass(frozen=True)
class ItemsKind:
    """Rows of ``(items, columns)``, whose :class:`~softcache.targets.layout.Layout` comes from the teacher.

    All of it is said of the exact view. Under law ``box`` an item's boxes move with the view exactly, and its class scores
    with them; its cell, its embedding and the distribution of its sides do not.

    ``needs`` are the columns without which it is none.
    """

    name: str
    law: str
    needs: tuple[str, ...] = ()

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2

    def refuses(self, layout: Layout, shape: tuple[int, ...]) -> str | None:
        """Why rows of ``shape`` with this layout are none of the kind, in words; None where they are."""
        if lacking := [name for name in self.needs if name not in layout.columns]:
            return f"{self.name} have {' and '.join(self.needs)}, and its layout has no {lacking[0]}"
        if shape[1] != layout.width:
            return f"its layout names {layout.width} columns"
        if layout.cells not in (None, shape[0]):
            return f"the levels of its layout have {layout.cells} cells"
        if shape[0] % layout.layers:
            return f"its layout names {layout.layers} layers of as many items each"
        return None

    def wrap(self, values: Items) -> Items:
        return values


ITEMS = (
    ItemsKind("detections", "box", ("logits", "boxes")),
    ItemsKind("proposals", "box", ("boxes",)),
    ItemsKind("queries", "view-locked"),
    ItemsKind("probes", "view-locked"),
)
