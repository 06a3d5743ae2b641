"""One picture of noise: what a teacher answers to it tells the shapes of its targets, and whether it is who it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from softcache import probes
from softcache.errors import MismatchError, TeacherError
from softcache.identity import Identity
from softcache.parts import Part
from softcache.targets import Request, Target, is_attribution
from softcache.teachers import Teacher


def probing(asked: tuple[Request, ...]) -> bool:
    """Is one of the targets what the teacher says at boxes that it is given?"""
    return any("probes" in (r.kind, r.name.rpartition(".")[2]) for r in asked)


def labelling(asked: Iterable[Request | Target]) -> bool:
    """Is one of the targets of the label?"""
    return any(is_attribution(one.tap) for one in asked)


def ask(teacher: Teacher, asked: tuple[Request, ...]) -> dict[str, np.ndarray]:
    """Its answer; boxes anywhere and the first class are given with the picture, where they are needed.

    Raises :class:`TeacherError` where something that is asked for is not finite.
    """
    given: dict[str, np.ndarray] = {}
    if probing(asked):
        given["probes"] = probes.points(0, "noise", 0, np.zeros((0, 4)))[None]
    if labelling(asked):
        given["labels"] = np.zeros(1, np.int64)
    said = teacher(_noise(teacher), **given)
    for name in dict.fromkeys(name for one in asked for name in (one.tap, one.name)):
        if name in said and not np.isfinite(said[name]).all():
            raise TeacherError(
                f"the teacher answers a picture of noise with values that are not finite, in {name!r}: do its weights fit, "
                "or is the precision too low?"
            )
    return said


def _noise(teacher: Teacher) -> np.ndarray:
    """One picture, the same for ever: uint8 ``(1, H, W, 3)``."""
    shape = (1, *teacher.input_spec.size, 3)
    numbers = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(2654435761)
    return (numbers >> np.uint64(16)).astype(np.uint8).reshape(shape)


def sketch(said: Mapping[str, np.ndarray] | None, asked: tuple[Request, ...]) -> list[float]:
    """Mean and standard deviation of each answer that a target is made of."""
    taps = dict.fromkeys(r.tap for r in asked)
    return [x for tap in taps if said and tap in said for x in _figures(said[tap])]


def _figures(answer: np.ndarray) -> list[float]:
    numbers = answer.astype(np.float64)
    return [float(numbers.mean()), float(numbers.std())]


def same_answer(stored: list[float] | None, found: list[float] | None) -> list[float] | None:
    """The stored answer where the teacher's is the same but for rounding."""
    if stored is None or found is None:
        return stored
    same = len(stored) == len(found) and np.allclose(stored, found, rtol=1e-3, atol=1e-5)
    return stored if same else found


def check_heard(where: Path, said: Mapping[str, np.ndarray], before: tuple[Part, ...], named: str) -> None:
    """Refuse a teacher that answers the picture of noise otherwise than under the same name before."""
    for part in before:
        for tap, known in _heard(part.identity).items() if part.named == named else ():
            if tap in said and same_answer(known, _figures(said[tap])) is not known:
                raise MismatchError(
                    f"the teacher's {tap} of a picture of noise is not what it was when {where} was built: changed "
                    "code under an unchanged name is another teacher; give it a name of its own with --as NAME"
                )


def _heard(identity: Identity) -> dict[str, list[float]]:
    """What the teacher answered to the picture of noise, of each output that its targets are made of."""
    taps = dict.fromkeys(target.tap for target in identity.make_targets().values())
    said = identity.teacher.answer or []
    return {tap: said[2 * i : 2 * i + 2] for i, tap in enumerate(taps) if 2 * i + 1 < len(said)}
