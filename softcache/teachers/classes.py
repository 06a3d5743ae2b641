"""A teacher's classes and a source's, matched by name: logits are cached in the source's order.

A detector often has more logits than classes: COCO's numbers go to 90 with holes (``N/A``), and one may mean that there
is nothing (``__background__``, or the one that its layout calls the background, named or not). Holes are left out, the
background that the layout names comes last. A constant of the teacher whose name begins with ``class_`` goes along.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import MismatchError, SpecError, counted, nearest
from softcache.identity import InputSpec, TeacherId
from softcache.targets import Layout, is_logits
from softcache.teachers import Teacher, constants_of, layouts_of

_SHOWN = 20
_NONE = ("N/A", "__background__", "background", "")  # what is no class, in the lists of detectors


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
    if wanted is None:
        return teacher
    if ours is None:
        say(
            f"the teacher names no classes: its {len(wanted)} are taken to be the source's, in the source's order "
            "(--classes FILE names them)"
        )
        return teacher
    nameless = () if said else getattr(teacher, "nameless", ())
    heads = [one for one in layouts_of(teacher).values() if one.classes]
    names = _named(ours, heads)
    kept = [(name, i) for i, name in enumerate(names) if not heads or name in wanted or name not in _NONE]
    found = dict(kept)
    if len(found) < len(kept):
        twice = next(name for n, (name, _) in enumerate(kept) if name in dict(kept[:n]))
        raise SpecError(f"the teacher's class {twice!r} is named twice: every class needs a name of its own")
    _check(tuple(found), wanted)
    columns = tuple(found[name] for name in wanted)
    moved = any(one.background not in (None, one.classes) for one in heads)
    if columns == tuple(range(len(names))) and not moved:
        say(f"{counted(len(wanted), 'class')}, the teacher's names in the source's order")
        if nameless:
            say(
                f"{_those(nameless)} no classes: taken to be the source's too, in that order (--classes FILE names them)"
            )
        return teacher
    if nameless:
        raise MismatchError(
            f"{_those(nameless)} no classes, and the others' have another order than the source's: are these of the "
            "same order as theirs? Say so with --classes FILE, which names the classes of all in their order"
        )
    told = [_moves(wanted, columns) or "in the same order"]
    told += [f"{len(names) - len(columns)} that are none are left out"] * (len(names) > len(columns))
    told += ["the background comes last"] * moved
    say(f"{counted(len(wanted), 'class')} matched by name, the teacher's → the source's: {'; '.join(told)}")
    return Permuted(teacher, columns)


def _those(members: Sequence[str]) -> str:
    return f"of the teachers {', '.join(members)} name{'s' * (len(members) == 1)}"


def _named(ours: tuple[str, ...], heads: list[Layout]) -> tuple[str, ...]:
    """The names of a detector's class logits, the background of its layouts left out; of any other teacher all."""
    counts = {one.classes for one in heads} or {len(ours)}
    backgrounds = {one.background for one in heads} - {None}
    if len(counts) == 1 and len(ours) == max(counts) + 1 and len(backgrounds) == 1:
        return tuple(name for i, name in enumerate(ours) if i not in backgrounds)
    if counts != {len(ours)}:
        told = " and ".join(map(str, sorted(counts)))
        raise MismatchError(
            f"the teacher answers {told} classes and {len(ours)} are named: are these its classes? "
            "Name them with --classes FILE, or keep them as they are with --ignore-labels"
        )
    return ours


def _moves(wanted: tuple[str, ...], columns: tuple[int, ...]) -> str:
    """Every class that moves, neighbours that stay so together: ``bee 3→1, cow … eel 5 … 7→2 … 4``."""
    runs: list[tuple[int, int]] = []
    for i, column in enumerate(columns):
        if column == i:
            continue
        if runs and runs[-1][1] == i - 1 and columns[i - 1] == column - 1:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    spans = [
        f"{wanted[a]} {columns[a]}→{a}"
        if a == b
        else f"{wanted[a]} … {wanted[b]} {columns[a]} … {columns[b]}→{a} … {b}"
        for a, b in runs
    ]
    return ", ".join(spans[:_SHOWN]) + (f", and {len(spans) - _SHOWN} more" if len(spans) > _SHOWN else "")


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
    """A teacher whose logits are put in another order: class i is its column ``columns[i]``, not counting the background
    that a detector's layout names; that comes last. Other logits of its items are left out."""

    def __init__(self, teacher: Teacher, columns: Sequence[int]):
        self.teacher, self.columns = teacher, list(columns)
        self.probed = teacher.probed
        self.input_spec: InputSpec = teacher.input_spec
        self.classes: tuple[str, ...] | None = None  # those of the source
        found = {name: _ordered(one, self.columns) for name, one in layouts_of(teacher).items()}
        self.layouts = {name: one for name, (one, _) in found.items()}
        self._of_items = {name: take for name, (_, take) in found.items()}

    def __call__(self, pixels: np.ndarray, **given: np.ndarray) -> dict[str, np.ndarray]:
        if "labels" in given:  # of the source's classes; the teacher has its own numbers for them
            known = given["labels"] >= 0
            given["labels"] = np.where(known, np.array(self.columns)[given["labels"]], -1)
        said = dict(self.teacher(pixels, **given))
        for name, value in said.items():
            if name in self._of_items:
                said[name] = value[..., self._of_items[name]]
            elif is_logits(name):
                said[name] = self._logits(value)
        return said

    def _logits(self, logits: np.ndarray) -> np.ndarray:
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

    def constants(self) -> dict[str, np.ndarray]:
        """As the teacher has them; those of a name ``class_…`` with their first axis in the order of the logits."""
        found = constants_of(self.teacher)
        of_classes = {name for name in found if name.rpartition("/")[2].startswith("class_")}
        return {n: v[self._rows(n, len(v))] if n in of_classes else v for n, v in found.items()}

    def _rows(self, name: str, count: int) -> np.ndarray:
        """Where the classes stand in a constant of so many, which may count the background of the layouts or not."""
        heads = [one for one in layouts_of(self.teacher).values() if one.classes]
        classes = heads[0].classes if heads else len(self.columns)
        backgrounds = {one.background for one in heads} - {None}
        background = backgrounds.pop() if len(backgrounds) == 1 and count == classes + 1 else None
        if count - (background is not None) != classes:
            raise MismatchError(
                f"the teacher's constant {name!r} is of {count} classes, by its name, and the teacher answers {classes}: "
                "call it something else, or give one number a class along its first axis"
            )
        return _kept(count, background, self.columns)


def _kept(count: int, background: int | None, columns: list[int]) -> np.ndarray:
    """Where the classes are among so many logits, in order, and after them the background, where there is one."""
    last = [] if background is None else [background]
    places = [i for i in range(count) if i not in last]
    if max(columns) >= len(places):
        raise MismatchError(
            f"the teacher answers {len(places)} classes, and there should be one number {max(columns)}"
        )
    return np.array([*(places[c] for c in columns), *last])


def _ordered(layout: Layout, columns: list[int]) -> tuple[Layout, np.ndarray]:
    """A layout with its classes in this order, and where its columns were. Boxes of every class follow their class."""
    if not layout.classes:
        return layout, np.arange(layout.width)
    logits = layout.columns["logits"]
    kept = _kept(logits, layout.background, columns)
    take: dict[str, np.ndarray] = {}
    for name, at in layout.parts(np.arange(layout.width)):
        if name == "logits":
            at = at[kept]
        elif name == "deltas" and len(at) == 4 * logits:
            at = at.reshape(logits, 4)[kept].ravel()
        take[name] = at
    counts = {name: len(at) for name, at in take.items()}
    background = None if layout.background is None else len(columns)
    return replace(layout, columns=counts, background=background), np.concatenate(list(take.values()))
