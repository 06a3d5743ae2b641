"""Attention maps: where a layer is strong, and in which channels."""

from __future__ import annotations

from softcache.codecs.attention import AttentionMap
from softcache.codecs.strength import StrengthMap


class AttentionMapKind:
    """Of the exact view: its weights are shares of the whole map. Rows are the shape of the map it is made of."""

    name = "attention_map"
    law = "view-locked"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3

    def wrap(self, values: AttentionMap | StrengthMap) -> AttentionMap | StrengthMap:
        return values
