"""The live teacher behind the same protocol as the cache, for comparison.

This file alone reaches for the teacher's side of softcache, and only when it is asked to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from softcache.errors import SpecError
from softcache.several import Several
from softcache_train.targets import BatchTarget, Dense

if TYPE_CHECKING:
    from softcache.cache import Cache
    from softcache.teachers import Teacher


class LiveTeacher:
    """Runs ``teacher`` on the views of every batch, rendered at its own size; keeps ``names``."""

    def __init__(self, teacher: Teacher, names: tuple[str, ...] = ("logits",)):
        self.teacher, self.names = teacher, names
        height, width = teacher.input_spec.size
        self.size = (height, width)

    def __call__(self, view: int, samples: np.ndarray, pixels: np.ndarray | None) -> dict[str, BatchTarget]:
        assert pixels is not None
        said = self.teacher(pixels)
        return {name: Dense(torch.from_numpy(said[name])) for name in self.names}


def load(
    cache: Cache,
    teacher: str | list[str],
    weights: str | list[str | None] | None,
    targets: list[str],
    device: str,
) -> LiveTeacher:
    """The teacher, or several as one, that ``build-cache --teacher`` would load, fed as the cache's teacher was.

    Raises :class:`TeacherError`; :class:`SpecError` for several caches.
    """
    if isinstance(cache, Several):
        raise SpecError("a live teacher stands in for one cache: name one --cache, or leave --teacher out")
    from softcache.teachers import Options
    from softcache.teachers.ensemble import assemble

    options = Options.like(
        cache.identity["teacher"],
        taps=tuple(name for name in targets if name != "logits"),
        device=device,
    )
    return LiveTeacher(assemble(teacher, weights, options), tuple(targets))
