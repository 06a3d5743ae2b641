"""A teacher under a name: one of several that a cache is extended by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from softcache.errors import MismatchError
from softcache.identity import IMPORTED, InputSpec, TeacherId
from softcache.parts import Part
from softcache.teachers import Options, Teacher, constants_of, layouts_of


class Named:
    """A teacher whose answers are called after it: ``big.logits``."""

    def __init__(self, teacher: Teacher, name: str):
        self.teacher, self.name = teacher, name
        self.input_spec: InputSpec = teacher.input_spec
        self.classes, self.probed = teacher.classes, teacher.probed
        self.layouts = {f"{name}.{target}": one for target, one in layouts_of(teacher).items()}

    def __call__(self, pixels: np.ndarray, **given: np.ndarray) -> dict[str, np.ndarray]:
        return {f"{self.name}.{target}": said for target, said in self.teacher(pixels, **given).items()}

    def identity(self) -> TeacherId:
        return self.teacher.identity()

    def libraries(self) -> dict[str, str]:
        return self.teacher.libraries()

    def constants(self) -> dict[str, np.ndarray]:
        return constants_of(self.teacher)


def called(teacher: Teacher, name: str) -> Teacher:
    """The teacher under that name; itself for an empty one."""
    return Named(teacher, name) if name else teacher


def require_living(who: TeacherId) -> None:
    """Refuse a teacher that cannot be asked again."""
    if who.name.startswith(IMPORTED):
        raise MismatchError(
            "the targets were imported from arrays, and nobody has the teacher that said them: nothing can be made by it, "
            "or compared with it. Another teacher's are added with extend --as NAME"
        )


def options_like(parts: Iterable[Part], taps: Iterable[str] | None = None, **said: Any) -> Options:
    """Those that the teacher of these parts was built with, but for what is said anew; ``taps`` are those of all their
    targets, unless they are said. :class:`MismatchError` where nobody has that teacher."""
    known = tuple(parts)
    who = known[0].identity.teacher
    require_living(who)
    asked = dict.fromkeys(tap for part in known for tap in part.taps) if taps is None else taps
    digest = None if who.members else who.weights
    return Options.like(who.model_dump(mode="json"), taps=tuple(asked), expected=digest, **said)
