"""The live teacher behind the same protocol as the cache, for comparison.

This file alone reaches for the teacher's side of softcache, and only when it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from softcache.errors import SpecError
from softcache.parts import by
from softcache.several import Combined
from softcache.targets import Target, taps
from softcache_train.targets import BatchTarget, to_tensors

if TYPE_CHECKING:
    from softcache.cache import Cache
    from softcache.teachers import Teacher


class LiveTeacher:
    """Runs ``teacher`` on the views of every batch, rendered at its own size, for ``targets``: what
    it says is what their cache holds, with nothing left out or rounded."""

    def __init__(self, teacher: Teacher, targets: Iterable[Target]):
        self.teacher, self.targets = teacher, tuple(targets)
        height, width = teacher.input_spec.size
        self.size = (height, width)
        self.probed = any(target.kind == "probes" for target in self.targets)
        self.labelled = any(target.kind == "attribution" for target in self.targets)

    def __call__(
        self, view: int, samples: np.ndarray, pixels: np.ndarray | None, **given: np.ndarray
    ) -> dict[str, BatchTarget]:
        assert pixels is not None
        said = self.teacher(pixels, **given)
        return {target.name: to_tensors(target.wrap(said[target.said])) for target in self.targets}


def load(
    cache: Cache,
    teacher: str | list[str],
    weights: str | list[str | None] | None,
    targets: list[str],
    device: str,
) -> LiveTeacher:
    """The teacher, or several as one, that ``build-cache --teacher`` would load, fed as the cache's teacher was.

    Raises :class:`TeacherError`; :class:`SpecError` for several caches, and where there are no ``targets``.
    """
    if not targets:
        raise SpecError("no objective of this config learns from a teacher: leave --teacher out")
    if isinstance(cache, Combined):
        raise SpecError("a live teacher stands in for one cache: name one --cache, or leave --teacher out")
    from softcache.teachers.ensemble import assemble
    from softcache.teachers.named import called, options_like

    asked = [cache.targets[name] for name in cache.names(targets)]
    whose = {part.named for part in cache.parts for target in asked if target.name in part.targets}
    if len(whose) > 1:
        raise SpecError("a live teacher stands in for one: name targets of one of the cache's teachers")
    name = whose.pop()
    own = [tap.removeprefix(f"{name}.") for tap in taps(asked)] if name else taps(asked)
    options = options_like(by(cache.parts, name), [tap for tap in own if tap != "logits"], device=device)
    return LiveTeacher(called(assemble(teacher, weights, options), name), asked)
