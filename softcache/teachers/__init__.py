"""Teachers: a batch of pixels → named arrays. One file a kind, listed in :data:`TEACHERS`.

A teacher is called with uint8 pixels ``(B, H, W, 3)`` RGB at ``input_spec.size`` and gives
``{"logits": float32 (B, C), …}``: its output as ``logits``, and each module it was asked to tap by name. It has
``identity()``, everything about it that changes its answers.

A detector has ``layouts`` besides, by the name of each of its answers of many items ``(B, items, columns)``: what the
columns mean, known before it is called. It may have ``constants()``, arrays by name that are the same for every image:
its query embeddings, its classes' prior, a frozen head as the bytes of a safetensors file. One that
answers ``logits.head`` has the layer that makes its logits of that: ``class_weight`` (C, d) and ``class_bias`` (C), float32.
One whose name begins with ``class_`` (``class_prior``) has the classes along its first axis, and is put into the order of
the logits.

One that is asked for an attribution (:mod:`softcache.targets.attribution`) is called with ``labels=``, int64 ``(B,)``, −1
where unknown, and may answer what each misses, too (:func:`softcache.targets.gap_of`). One that is asked for ``probes`` is
called with ``probes=``, float32 ``(B, P, 4)``: the boxes to answer for (:mod:`softcache.probes`). Called without them it
answers the rest.

Only this package imports a teacher's library, and only when such a teacher is loaded.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from softcache.errors import SpecError, TeacherError, suggest
from softcache.identity import InputSpec, TeacherId
from softcache.targets import Layout

__all__ = ["TEACHERS", "Options", "Teacher", "constants_of", "layouts_of", "load"]


@dataclass(frozen=True)
class Options:
    """What a user may say about a teacher; see :func:`softcache.build`."""

    weights: Path | None = None
    allow_pickle: bool = False
    taps: tuple[str, ...] = ()
    precision: str = "fp32"
    device: str | None = None
    batch: int = 64
    input_size: tuple[int, int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    color: str | None = None
    label_smoothing: float | None = None  # ε of its training, where it is known
    head: str | None = None  # of an ONNX graph: what its outputs mean, see softcache.teachers.heads
    expected: str | None = None  # and its sha256, where no other will do
    # Wrapped around it by softcache.teachers.ensemble.assemble:
    flip_tta: bool = False
    columns: tuple[int, ...] | None = None

    def said(self) -> dict[str, Any]:
        """What goes into a teacher's identity as it is."""
        return {
            "precision": self.precision,
            "batch": self.batch,
            "label_smoothing": self.label_smoothing,
        }

    @classmethod
    def like(cls, teacher: Mapping[str, Any], **said: Any) -> Options:
        """Those a cache's teacher was built with (``cache.teacher(target)``), but for what is said anew."""
        kept = ("precision", "batch", "flip_tta", "head", "label_smoothing")
        built = {k: teacher[k] for k in kept if k in teacher}
        built["columns"] = tuple(teacher["columns"]) if teacher.get("columns") else None
        first, *others = (member["input_spec"] for member in teacher.get("members", [teacher]))
        for name, key in {"input_size": "size", "mean": "mean", "std": "std", "color": "color"}.items():
            if all(spec[key] == first[key] for spec in others):  # or else each carries its own
                built[name] = first[key] if key == "color" else tuple(first[key])
        return cls(**built | {k: v for k, v in said.items() if v is not None})


class Teacher(Protocol):
    """What the builder needs; see the module's text."""

    input_spec: InputSpec
    classes: tuple[str, ...] | None
    probed: bool  # is its answer to a picture of noise part of its identity?
    # and, where it has any, ``layouts: Mapping[str, Layout]`` and ``constants() -> Mapping[str, np.ndarray]``: ask
    # layouts_of and constants_of

    def __call__(self, pixels: np.ndarray, **given: np.ndarray) -> dict[str, np.ndarray]: ...
    def identity(self) -> TeacherId: ...
    def libraries(self) -> dict[str, str]: ...


CONSTANT_TYPES = ("float32", "float16", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")

# name before the colon → module of this package with ``load(name, options)``
TEACHERS = {
    "hf": "hf",
    "onnx": "onnx",
    "timm": "timm",
    "torchvision": "torchvision",
    "ultralytics": "ultralytics",
}


def load(teacher: str | Callable[..., Any], options: Options) -> Teacher:
    """A teacher from its spec, or around a callable or a ``torch.nn.Module``.

    Args:
        teacher: ``torchvision:NAME``, ``timm:NAME``, ``onnx:FILE``, ``ultralytics:FILE``, ``hf:FOLDER``,
            ``package.module:factory``, or the object itself.
        options: weights, taps, precision and the rest.

    Raises:
        TeacherError: no such teacher, weights that do not fit, a module name it does not have.
    """
    if not isinstance(teacher, str):
        from softcache.teachers.wrap import wrap

        # A module is put into evaluation mode and on a device: not the user's own.
        own = copy.deepcopy(teacher) if hasattr(teacher, "state_dict") else teacher
        return wrap(own, _name_of(teacher), options)
    if options.head is not None and not teacher.startswith("onnx:"):
        raise SpecError(f"--head says what the outputs of an ONNX graph are: leave it out for {teacher}")
    head, colon, tail = teacher.partition(":")
    if not colon or not tail:
        known = ", ".join(f"{k}:NAME" for k in TEACHERS)
        raise TeacherError(f"teacher {teacher!r} is written package.module:factory, or {known}")
    if head in TEACHERS:
        return importlib.import_module(f"softcache.teachers.{TEACHERS[head]}").load(tail, options)
    from softcache.teachers.factory import load as load_factory

    if "." not in head and importlib.util.find_spec(head) is None:
        kinds = ", ".join(f"{k}:NAME" for k in TEACHERS)
        hint = suggest(head, TEACHERS)
        raise TeacherError(
            f"cannot import {head!r} for the teacher {teacher!r}, and it is none of {kinds}{hint}"
        )
    return load_factory(teacher, options)


def layouts_of(teacher: Any) -> dict[str, Layout]:
    """What a teacher, or somebody's module or callable, says of its targets of many items. Raises :class:`TeacherError`."""
    found = dict(getattr(teacher, "layouts", None) or {})
    for name, layout in found.items():
        if not isinstance(layout, Layout):
            raise TeacherError(
                f"the layouts of a teacher are softcache.Layout by target, and of {name!r} a {type(layout).__name__}"
            )
    return found


def constants_of(teacher: Any) -> dict[str, np.ndarray]:
    """The constants that a teacher, or somebody's module or callable, offers. Raises :class:`TeacherError`."""
    offered: Any = getattr(teacher, "constants", None)
    found: dict[str, np.ndarray] = {}
    if callable(offered):
        given: Any = offered()
        found = {name: _array(value) for name, value in given.items()}
    for name, values in found.items():
        if not re.fullmatch(r"(\d+/)?[a-z0-9_]+", name) or len(name) > 100:
            raise TeacherError(f"a constant of the teacher is named {name!r}: a-z, 0-9 and '_' only")
        if values.dtype.name not in CONSTANT_TYPES or not values.size or not values.ndim:
            raise TeacherError(
                f"the teacher's constant {name!r} is {values.dtype} {values.shape}: at least one number along one axis, of "
                f"{', '.join(CONSTANT_TYPES)}"
            )
    return found


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def failure(name: str, pixels: np.ndarray, e: Exception) -> TeacherError:
    """What to raise for an exception of the network's or the callable's own."""
    last = traceback.extract_tb(e.__traceback__)[-1]
    said = (str(e).splitlines() or [""])[0]
    return TeacherError(
        f"the teacher {name} failed on a batch of uint8 pixels of shape {pixels.shape}: {type(e).__name__}: {said} "
        f"({Path(last.filename).name}:{last.lineno}); is that what it takes, and its input size?"
    )


def _name_of(teacher: Any) -> str:
    named = teacher if hasattr(teacher, "__qualname__") else type(teacher)
    return f"{named.__module__}:{named.__qualname__}"


def input_spec(options: Options, found: Any, who: str) -> InputSpec:
    """The input spec a teacher carries (a mapping, or None), with what the user set on top."""
    given = dict(found or {})
    said = {"size": options.input_size, "mean": options.mean, "std": options.std, "color": options.color}
    given |= {k: v for k, v in said.items() if v is not None}
    missing = [k for k in ("size", "mean", "std") if k not in given]
    if missing:
        flags = ", ".join({"size": "--input-size 224", "mean": "--mean", "std": "--std"}[k] for k in missing)
        raise TeacherError(
            f"{who} says nothing about its input's {', '.join(missing)}: state it with {flags}"
        )
    try:
        spec = InputSpec(
            size=_pair(given["size"]),
            mean=_triple(given["mean"]),
            std=_triple(given["std"]),
            color=given.get("color", "RGB"),
        )
    except (TypeError, ValueError) as e:
        raise TeacherError(
            f"{who}: an input spec is a size in pixels, three means, three stds, and RGB or BGR, not {given}"
        ) from e
    if min(spec.std) <= 0:
        raise TeacherError(f"{who}: its std is {spec.std}: pixels are divided by it, so it is above 0")
    return spec


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    r, g, b = values
    return float(r), float(g), float(b)
