"""A teacher's classes and a source's, matched by name: logits are cached in the source's order."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import MismatchError, SpecError, nearest
from softcache.manifest import InputSpec, TeacherId
from softcache.targets import is_logits
from softcache.teachers import Teacher

_SHOWN = 20


def names_of(value: Any) -> tuple[str, ...] | None:
    """Class names as somebody's model carries them: a sequence of words, or ``{0: word, …}``; else None."""
    if isinstance(value, dict) and sorted(value, key=str) == sorted(range(len(value)), key=str):
        value = [value[i] for i in range(len(value))]
    listed = isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value)
    return tuple(value) if listed else None


def names_in(text: str) -> tuple[str, ...] | None:
    """Class names written as JSON, as a Python literal, or one a line."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return names_of(parse(text))
        except (ValueError, SyntaxError):
            continue
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    return lines or None


def read(said: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """What ``--classes`` says: a file of names, or the names themselves. Raises :class:`SpecError`."""
    if said is None:
        return None
    if isinstance(said, str | Path):
        try:
            names, where = names_in(Path(said).read_text(encoding="utf-8-sig")), f"the file {said}"
        except (OSError, UnicodeDecodeError) as e:
            raise SpecError(f"cannot read the class names in {said}: {e}") from None
    else:
        names, where = names_of(list(said)), "classes"
    if names is None:
        raise SpecError(
            f"{where} holds no class names: write one a line, or a JSON list, in the teacher's order"
        )
    return names


def aligned(
    teacher: Teacher,
    said: tuple[str, ...] | None,
    wanted: tuple[str, ...] | None,
    say: Callable[[str], None],
) -> Teacher:
    """The teacher with its logits in the order of ``wanted``; itself where that is its order, or nothing is named.

    Args:
        said: the names that the user gave; by default those that the teacher carries.
        wanted: the source's class names.
        say: is told the table.

    Raises:
        MismatchError: a name that only one of them has.
        SpecError: names that nothing can be matched with, or one that comes twice.
    """
    if said is not None and wanted is None:
        raise SpecError(
            "--classes matches the teacher's logits with the source's class names, and one of them is not here"
        )
    ours = said or names_of(teacher.classes)
    if ours is None or wanted is None:
        return teacher
    if len(set(ours)) < len(ours):
        twice = next(name for i, name in enumerate(ours) if name in ours[:i])
        raise SpecError(f"the teacher's class {twice!r} is named twice: every class needs a name of its own")
    _check(ours, wanted)
    if ours == wanted:
        say(f"{len(ours)} classes, the teacher's names in the source's order")
        return teacher
    columns = tuple(ours.index(name) for name in wanted)
    moved = [f"{name} {c}→{i}" for i, (name, c) in enumerate(zip(wanted, columns, strict=True)) if c != i]
    more = f", and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
    say(
        f"{len(ours)} classes matched by name, the teacher's → the source's: {', '.join(moved[:_SHOWN])}{more}"
    )
    return Permuted(teacher, columns)


def _check(ours: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    lacking, extra = (_lack(a, b) for a, b in ((wanted, ours), (ours, wanted)))
    if lacking:
        raise MismatchError(
            f"the teacher has no class {_told(lacking)}, which the source has{nearest(lacking[0], extra)}: name its "
            "classes as the source does with --classes FILE, or take a teacher of these classes; if the labels do "
            "not matter, say --ignore-labels"
        )
    if extra:
        raise MismatchError(
            f"the teacher has the class {_told(extra)}, which the source has not: a student of the source's classes "
            "cannot learn it. Take a teacher of these classes, or keep all of its with --ignore-labels"
        )


def _lack(a: tuple[str, ...], b: tuple[str, ...]) -> list[str]:
    known = set(b)
    return [name for name in a if name not in known]


def _told(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


class Permuted:
    """A teacher whose logits are put in another order: class i is its column ``columns[i]``."""

    def __init__(self, teacher: Teacher, columns: Sequence[int]):
        self.teacher, self.columns = teacher, list(columns)
        self.probed = teacher.probed
        self.input_spec: InputSpec = teacher.input_spec
        self.classes: tuple[str, ...] | None = None  # those of the source

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {n: self._ordered(v) if is_logits(n) else v for n, v in self.teacher(pixels).items()}

    def _ordered(self, logits: np.ndarray) -> np.ndarray:
        if logits.shape[1:] != (len(self.columns),):
            raise MismatchError(
                f"the teacher answers {logits.shape[1:]} logits and {len(self.columns)} classes are named: "
                "are these its classes?"
            )
        return logits[:, self.columns]

    def identity(self) -> TeacherId:
        return self.teacher.identity().model_copy(update={"columns": self.columns})

    def libraries(self) -> dict[str, str]:
        return self.teacher.libraries()
