"""softcache: run the teacher once.

``build`` runs a teacher over a source and writes what it said as a verified, compressed cache; ``open`` reads it,
with the teacher nowhere on the machine. Names are loaded when they are first used: opening a cache needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Cache": "cache",
    "Layout": "targets",
    "Recipe": "recipe",
    "SoftcacheError": "errors",
    "Source": "source",
    "View": "recipe",
    "build": "builder",
    "diff": "checker",
    "extend": "extension",
    "gc": "sharing",
    "import_arrays": "exchange.foreign",
    "open": "several",
    "overlay": "drawing",
    "pair": "canary",
    "plan": "forecast",
    "pull": "sharing",
    "push": "sharing",
    "render": "recipe",
    "repair": "sharing",
    "stream": "sharing",
    "verify": "checker",
    "verify_live": "checker",
    "with_targets": "adapter",
}

if TYPE_CHECKING:
    from softcache.adapter import with_targets as with_targets
    from softcache.builder import build as build
    from softcache.cache import Cache as Cache
    from softcache.canary import pair as pair
    from softcache.checker import diff as diff
    from softcache.checker import verify as verify
    from softcache.checker import verify_live as verify_live
    from softcache.drawing import overlay as overlay
    from softcache.errors import SoftcacheError as SoftcacheError
    from softcache.exchange.foreign import import_arrays as import_arrays
    from softcache.extension import extend as extend
    from softcache.forecast import plan as plan
    from softcache.recipe import Recipe as Recipe
    from softcache.recipe import View as View
    from softcache.recipe import render as render
    from softcache.several import open as open
    from softcache.sharing import gc as gc
    from softcache.sharing import pull as pull
    from softcache.sharing import push as push
    from softcache.sharing import repair as repair
    from softcache.sharing import stream as stream
    from softcache.source import Source as Source
    from softcache.targets import Layout as Layout


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'softcache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"softcache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
