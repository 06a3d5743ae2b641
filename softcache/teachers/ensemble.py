"""Several teachers as one, and the mean over an image and its mirror.

The mean of the members' logits is, up to a constant, the logarithm of the geometric mean of their probabilities: one
array that is valid at every temperature. An arithmetic mean is not, so it needs each member's logits: ``0.logits``, ….
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache import spec
from softcache.errors import MismatchError, SpecError, TeacherError, counted
from softcache.identity import InputSpec, MemberId, TeacherId
from softcache.targets import gap_of, is_attribution, is_logits
from softcache.teachers import Options, Teacher, constants_of, layouts_of, load
from softcache.teachers.classes import Permuted

Asked = str | Callable[..., Any]


def assemble(
    teacher: Asked | Sequence[Asked],
    weights: str | Path | Sequence[str | Path | None] | None,
    options: Options,
) -> Teacher:
    """The teacher, or several as one, with ``flip_tta`` and ``columns`` around it; what a build, a check and a trainer run.

    Args:
        teacher: what :func:`softcache.teachers.load` takes, or several of it.
        weights: a file for each teacher that takes one.
        options: said of every member, but for the taps: ``1.layer3`` is of the second.

    Raises:
        SpecError: another number of weights than of teachers.
        MismatchError: members that see another size, or name other classes.
        TeacherError: a teacher that cannot be loaded; a target that is nobody's.
    """
    files = [Path(w) if isinstance(w, str | Path) else w for w in _listed(weights)]
    asked = _listed(teacher)
    if not asked:
        raise SpecError("no teacher: name one at least")
    if len(files) not in (0, len(asked)):
        raise SpecError(
            f"{counted(len(asked), 'teacher')} and {counted(len(files), 'file')} of weights: name one for each, in the "
            "same order (in Python and YAML, null for a teacher that needs none)"
        )
    files = files or [None] * len(asked)
    if options.flip_tta and (others := [t for t in options.taps if not is_logits(t)]):
        raise SpecError(
            f"the target {others[0]!r} has no mean over an image and its mirror: leave it or --flip-tta out"
        )
    if len(asked) > 1:
        taps = _taps(options.taps, len(asked))
        members = [
            load(who, replace(options, weights=file, taps=tap))
            for who, file, tap in zip(asked, files, taps, strict=True)
        ]
        made: Teacher = Ensemble(members, options)
    else:
        made = load(asked[0], replace(options, weights=files[0]))
    made = FlipTta(made) if options.flip_tta else made
    return made if options.columns is None else Permuted(made, options.columns)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _taps(taps: tuple[str, ...], members: int) -> list[tuple[str, ...]]:
    """Each member's own targets besides its logits."""
    found: list[list[str]] = [[] for _ in range(members)]
    for name in taps:
        match = re.fullmatch(r"(\d+)\.(.+)", name)
        if not match or int(match[1]) >= members:
            raise TeacherError(
                f"{members} teachers have no target {name!r}: it is logits, their mean, or a member's own, "
                f"such as '0.logits' or '{members - 1}.layer3'"
            )
        if match[2] != "logits":
            found[int(match[1])].append(match[2])
    return [tuple(own) for own in found]


class Ensemble:
    """``logits``, the mean of the members'; and what each says, under ``0.``, ``1.``, …, where it is asked for.

    Each member normalises the same pixels by itself. ``input_spec`` is the first member's. Detectors have no mean: of
    them there are ``0.detections``, ….
    """

    def __init__(self, members: Sequence[Teacher], options: Options):
        self.members, self._options = tuple(members), options
        self._names = [m.identity().name for m in self.members]
        self.probed = any(m.probed for m in self.members)
        self.input_spec: InputSpec = self.members[0].input_spec
        self.classes = next((m.classes for m in self.members if m.classes is not None), None)
        # those whose order nobody knows, of several of which one names its classes
        self.nameless = [
            f"{i} ({name})"
            for i, (name, m) in enumerate(zip(self._names, self.members, strict=True))
            if self.classes is not None and m.classes is None
        ]
        self.layouts = {
            f"{i}.{name}": one for i, m in enumerate(self.members) for name, one in layouts_of(m).items()
        }
        for number, member in enumerate(self.members):
            self._check(number, member)

    def _check(self, number: int, member: Teacher) -> None:
        first = f"the teachers 0 ({self._names[0]}) and {number} ({self._names[number]})"
        size, other = ("x".join(map(str, m.input_spec.size)) for m in (self.members[0], member))
        if size != other:
            raise MismatchError(
                f"{first} see {size} and {other} pixels, and a view is rendered once for all: say --input-size N for "
                "all of them, or build a cache of each and open them together"
            )
        if member.classes is not None and tuple(member.classes) != tuple(self.classes or ()):
            raise MismatchError(
                f"{first} name other classes, or in another order, so that their mean would be of different things: "
                "build a cache of each and open them together"
            )

    def __call__(self, pixels: np.ndarray, **given: np.ndarray) -> dict[str, np.ndarray]:
        said = [
            member(pixels, **{n: v for n, v in given.items() if self._concerns(i, n)})
            for i, member in enumerate(self.members)
        ]
        named = {f"{i}.{name}": value for i, answer in enumerate(said) for name, value in answer.items()}
        asked = {name for tap in self._options.taps for name in (tap, gap_of(tap))}
        own = {n: v for n, v in named.items() if n in asked}
        if not any("logits" in answer for answer in said):  # detectors: there is no mean of their items
            return own
        for number, answer in enumerate(said):
            if "logits" not in answer or answer["logits"].shape != said[0]["logits"].shape:
                told = ", ".join(
                    f"{n} {a['logits'].shape[1:] if 'logits' in a else 'none'}"
                    for n, a in zip(self._names, said, strict=True)
                )
                raise MismatchError(
                    f"the teachers have logits of different shapes, so no mean (teacher {number} is the first to "
                    f"differ): {told}. Are they of the same classes?"
                )
        with np.errstate(invalid="ignore"):  # what is not finite is refused with its image
            mean = np.stack([answer["logits"] for answer in said]).mean(axis=0, dtype=np.float64)
        return {"logits": mean.astype(np.float32), **own}

    def _concerns(self, member: int, given: str) -> bool:
        """Is what is given with the pixels asked for of this member?"""
        own = [tap.removeprefix(f"{member}.") for tap in self._options.taps if tap.startswith(f"{member}.")]
        return any(is_attribution(tap) for tap in own) if given == "labels" else given in own

    def identity(self) -> TeacherId:
        who = [m.identity() for m in self.members]
        digests = [w.weights for w in who]
        formats = [w.weights_format for w in who]
        return TeacherId(
            name=" + ".join(w.name for w in who),
            weights=None if None in digests else spec.digest(" ".join(map(str, digests)).encode()),
            weights_format=None if set(formats) == {None} else _each(f or "not from a file" for f in formats),
            input_spec=self.input_spec,
            processor=_each(w.processor for w in who),
            **self._options.said(),
            members=[MemberId(**w.model_dump(include=set(MemberId.model_fields))) for w in who],
        )

    def libraries(self) -> dict[str, str]:
        return {name: version for m in self.members for name, version in m.libraries().items()}

    def constants(self) -> dict[str, np.ndarray]:
        return {f"{i}/{name}": v for i, m in enumerate(self.members) for name, v in constants_of(m).items()}


def _each(words: Any) -> str:
    return " + ".join(dict.fromkeys(words))


class FlipTta:
    """A teacher's logits, averaged over an image and its mirror image (flip test-time augmentation)."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.input_spec, self.classes, self.probed = teacher.input_spec, teacher.classes, teacher.probed
        self.nameless = getattr(teacher, "nameless", ())

    def __call__(self, pixels: np.ndarray, **_given: np.ndarray) -> dict[str, np.ndarray]:
        seen = self.teacher(pixels)
        mirrored = self.teacher(np.ascontiguousarray(pixels[:, :, ::-1]))
        with np.errstate(over="ignore", invalid="ignore"):
            return {
                name: (seen[name] + mirrored[name]) / 2
                for name in seen
                if is_logits(name.removesuffix(".head"))
            }

    def identity(self) -> TeacherId:
        return self.teacher.identity().model_copy(update={"flip_tta": True})

    def libraries(self) -> dict[str, str]:
        return self.teacher.libraries()

    def constants(self) -> dict[str, np.ndarray]:
        return constants_of(self.teacher)
