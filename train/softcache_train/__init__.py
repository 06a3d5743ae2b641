"""Train students from a softcache cache, with the teacher nowhere on the machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softcache_train.checkpoint import load_student
    from softcache_train.loader import Loader
    from softcache_train.loop import train
    from softcache_train.objectives import kd
    from softcache_train.tars import TarLoader

__version__ = "0.1.0"

__all__ = ["Loader", "TarLoader", "kd", "load_student", "train"]

_HOMES = {
    "Loader": "softcache_train.loader",
    "TarLoader": "softcache_train.tars",
    "kd": "softcache_train.objectives",
    "load_student": "softcache_train.checkpoint",
    "train": "softcache_train.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
