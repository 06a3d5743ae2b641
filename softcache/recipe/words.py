"""What the sentences of the ops share; each op's own is its ``words``."""

from __future__ import annotations

from collections.abc import Iterable

from softcache.recipe.canvas import Size
from softcache.recipe.options import height_width


def pixels(size: int | Size) -> str:
    """``224×224 pixels``, width first."""
    height, width = height_width("size", size)
    return f"{width}×{height} pixels"


def often(p: float) -> str:
    """How a sentence begins: ``Always`` or ``With probability 0.5``."""
    return "Always" if p == 1 else f"With probability {p:g}"


def span(low: float, high: float) -> str:
    """``0.08 to 1``."""
    return f"{low:g} to {high:g}"


def listed(numbers: Iterable[float]) -> str:
    """``0.1, 0.3 or 0.5``."""
    *before, last = (f"{n:g}" for n in numbers)
    return f"{', '.join(before)} or {last}" if before else last
