"""Heads: what the outputs of a detector's graph mean, since a graph cannot say it. One class each, listed in :data:`HEADS`.

A head's spec string is its constructor call: ``yolo``, ``yolox(strides=(8, 16, 32))``, ``detr(pred_logits, pred_boxes)``. It
gives the target ``detections``: dense float32 ``(B, items, columns)`` before any NMS, laid out as its ``layout`` says, boxes
in the unit square of the input. Probabilities become logits; 0 and 1, which have none, stand a millionth away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar, Protocol

import numpy as np

from softcache import spec
from softcache.errors import SpecError, TeacherError
from softcache.targets.layout import Layout

Size = tuple[int, int]
Outputs = Mapping[str, np.ndarray]

_LEAST = 1e-6  # the nearest that a probability comes to 0 and to 1
_BEYOND = 0.01
_SHARES = 2.0  # pixels, within which no boxes of all anchors lie
_ALIKE = 0.9  # of what is decoded it is 0.99, but for pictures of a few cells, and of offsets about 0
_UNIT = {"mean": (0, 0, 0), "std": (1, 1, 1), "color": "RGB"}


class Head(Protocol):
    """What every member of :data:`HEADS` offers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    INPUT: ClassVar[Mapping[str, Any]]  # what such graphs are fed, unless the user says otherwise

    def outputs(self, found: Outputs, size: Size) -> tuple[str, ...] | None:
        """The graph's outputs that it reads, of those of one picture; None where they do not fit."""
        ...

    def layout(self, said: Outputs, size: Size) -> Layout: ...
    def read(self, said: Outputs, size: Size) -> np.ndarray: ...


@dataclass(frozen=True)
class Yolo:
    """Ultralytics' export without NMS: ``(B, 4 + C, A)``, cx, cy, w, h in pixels and C probabilities."""

    output: str = ""
    strides: tuple[int, ...] = (8, 16, 32)

    INPUT: ClassVar[Mapping[str, Any]] = _UNIT

    def __post_init__(self) -> None:
        _check_strides("yolo", self.strides)

    def outputs(self, found: Outputs, size: Size) -> tuple[str, ...] | None:
        cells = _cells(_levels(size, self.strides))
        fits = [n for n, v in found.items() if v.ndim == 3 and v.shape[1] > 4 and v.shape[2] == cells]
        return _only(fits, self.output)

    def layout(self, said: Outputs, size: Size) -> Layout:
        (values,) = said.values()
        return Layout({"logits": values.shape[1] - 4, "boxes": 4}, levels=_levels(size, self.strides))

    def read(self, said: Outputs, size: Size) -> np.ndarray:
        (values,) = said.values()
        rows = values.transpose(0, 2, 1)
        _refuse_shares(rows[..., :4], "yolo reads pixels: export it without normalising them")
        return np.concatenate([_logits(rows[..., 4:]), _unit(_corners(rows[..., :4]), size)], axis=-1)


@dataclass(frozen=True)
class Yolox:
    """YOLOX's raw export: ``(B, A, 5 + C)``, dx, dy, log w, log h in cells, and probabilities of an object and C classes."""

    output: str = ""
    strides: tuple[int, ...] = (8, 16, 32)

    INPUT: ClassVar[Mapping[str, Any]] = {"mean": (0, 0, 0), "std": (1 / 255,) * 3, "color": "BGR"}

    def __post_init__(self) -> None:
        _check_strides("yolox", self.strides)

    def outputs(self, found: Outputs, size: Size) -> tuple[str, ...] | None:
        cells = _cells(_levels(size, self.strides))
        fits = [n for n, v in found.items() if v.ndim == 3 and v.shape[2] > 5 and v.shape[1] == cells]
        return _only(fits, self.output)

    def layout(self, said: Outputs, size: Size) -> Layout:
        (values,) = said.values()
        columns = {"logits": values.shape[2] - 5, "objectness": 1, "boxes": 4}
        return Layout(columns, levels=_levels(size, self.strides))

    def read(self, said: Outputs, size: Size) -> np.ndarray:
        (values,) = said.values()
        corner, stride = _grid(size, self.strides)
        _refuse_decoded(values[..., :2], (corner + 0.5) * stride)
        middle = (values[..., :2] + corner) * stride
        sides = np.exp(np.minimum(values[..., 2:4], 30)) * stride  # float32 ends at exp(88)
        boxes = _unit(_corners(np.concatenate([middle, sides], axis=-1)), size)
        return np.concatenate([_logits(values[..., 5:]), _logits(values[..., 4:5]), boxes], axis=-1)


@dataclass(frozen=True)
class Detr:
    """Queries: logits ``(B, Q, C)`` and boxes ``(B, Q, 4)``, cx, cy, w, h as shares of the picture.

    With ``score=softmax`` the last class means no object.
    """

    logits: str = "pred_logits"
    boxes: str = "pred_boxes"
    score: str = "sigmoid"

    INPUT: ClassVar[Mapping[str, Any]] = _UNIT

    def __post_init__(self) -> None:
        if self.score not in ("sigmoid", "softmax"):
            raise SpecError(f"detr: score is sigmoid or softmax, not {self.score!r}")

    def outputs(self, found: Outputs, size: Size) -> tuple[str, ...] | None:
        logits, boxes = found.get(self.logits), found.get(self.boxes)
        if logits is None or boxes is None or logits.ndim != 3 or boxes.shape != (*logits.shape[:2], 4):
            return None
        return self.logits, self.boxes

    def layout(self, said: Outputs, size: Size) -> Layout:
        classes = said[self.logits].shape[2]
        background = classes - 1 if self.score == "softmax" else None
        return Layout({"logits": classes, "boxes": 4}, self.score, background)

    def read(self, said: Outputs, size: Size) -> np.ndarray:
        return np.concatenate([said[self.logits], _corners(said[self.boxes])], axis=-1)


HEADS: dict[str, type[Head]] = {"detr": Detr, "yolo": Yolo, "yolox": Yolox}


def parse(text: str) -> Head:
    """``"yolox(strides=(8, 16))"`` → the head. Raises :class:`SpecError`."""
    calls = spec.parse(text)
    if len(calls) != 1:
        raise SpecError(f"head {text!r} has {len(calls)} steps: name one of {', '.join(HEADS)}")
    return spec.construct(calls[0], HEADS, "head")


def spelled(head: Head) -> str:
    """The spec that makes it, with everything in it that is not a default."""
    name = next(name for name, made in HEADS.items() if isinstance(head, made))
    said = {f.name: getattr(head, f.name) for f in fields(head) if getattr(head, f.name) != f.default}
    return str(spec.Call(name, kwargs=tuple(sorted(said.items()))))


def fitting(text: str | None, found: Outputs, size: Size, who: str) -> Head:
    """The head that ``text`` names, or the one whose outputs are there.

    Args:
        found: what the graph answers to one picture, by name.

    Raises:
        TeacherError: it does not fit, or none does, or several do; told with what was found.
    """
    heads = {text: parse(text)} if text else {name: head() for name, head in HEADS.items()}
    fits = [name for name, head in heads.items() if head.outputs(found, size)]
    if len(fits) == 1:
        return heads[fits[0]]
    has = ", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items())
    what = (
        f"the head {text!r} does not fit {who}" if text else f"the outputs of {who} are no head that is known"
    )
    if len(fits) > 1:
        what = f"the outputs of {who} fit the heads {' and '.join(fits)}"
    raise TeacherError(
        f"{what}: for an input of {size[0]}x{size[1]} it answers {has}. Heads are detr, (1, queries, classes) and "
        "(1, queries, 4); yolo, (1, 4 + classes, anchors); yolox, (1, anchors, 5 + classes); anchors of strides 8, 16, 32 "
        "unless strides= says otherwise. Say which with --head, or export the graph without NMS"
    )


def _only(fits: list[str], wanted: str) -> tuple[str, ...] | None:
    fits = [name for name in fits if wanted in ("", name)]
    return (fits[0],) if len(fits) == 1 else None


def _levels(size: Size, strides: tuple[int, ...]) -> tuple[Size, ...]:
    return tuple((size[0] // s, size[1] // s) for s in strides)


def _cells(levels: tuple[Size, ...]) -> int:
    return sum(map(prod, levels))


def _grid(size: Size, strides: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The (x, y) of every cell in cells, ``(A, 2)``, and its stride, ``(A, 1)``."""
    corners, steps = [], []
    for (h, w), stride in zip(_levels(size, strides), strides, strict=True):
        y, x = np.mgrid[:h, :w].reshape(2, -1)
        corners.append(np.stack([x, y], axis=-1))
        steps.append(np.full((h * w, 1), stride))
    return np.concatenate(corners).astype(np.float32), np.concatenate(steps).astype(np.float32)


def _check_strides(head: str, strides: Any) -> None:
    if not isinstance(strides, tuple) or not strides or any(type(s) is not int or s < 1 for s in strides):
        told = f"not {strides!r}"
        raise SpecError(f"{head}: strides are whole numbers of at least 1, such as (8, 16, 32), {told}")


def _refuse_shares(boxes: np.ndarray, hint: str) -> None:
    """Raises :class:`TeacherError` for boxes that are shares of the picture's sides: of pixels, no picture has all middles
    and sides within two."""
    most = float(boxes.max(initial=0))
    if boxes.size and most <= _SHARES:
        raise TeacherError(
            f"no number of the graph's boxes is beyond {most:.4g}, so they are shares of the sides, and the head {hint}"
        )


def _refuse_decoded(offsets: np.ndarray, middles: np.ndarray) -> None:
    """Raises :class:`TeacherError` for boxes that the graph has decoded itself, whose shape is the same: those lie around
    the middle of their cell, in pixels or in shares of the sides, and offsets in cells around 0, wherever the cell is."""
    if np.median(np.abs(offsets - middles)) < np.median(np.abs(offsets)) or _alike(offsets, middles) > _ALIKE:
        raise TeacherError(
            "the graph decodes its boxes itself: they are pixels or shares, and the head yolox reads offsets in cells. "
            "Export it with raw outputs (YOLOX's export_onnx.py without --decode_in_inference)"
        )


def _alike(offsets: np.ndarray, middles: np.ndarray) -> float:
    """How nearly offsets ``(B, A, 2)`` are a multiple of the middles ``(A, 2)`` and a constant: the lower correlation of x
    and y; 0 where they are all one."""
    a = offsets.astype(np.float64) - offsets.mean(axis=(0, 1), dtype=np.float64)
    b = np.broadcast_to(middles - middles.mean(axis=0), a.shape)
    norm = np.linalg.norm(a, axis=(0, 1)) * np.linalg.norm(b, axis=(0, 1))
    return float(((a * b).sum(axis=(0, 1)) / np.where(norm > 0, norm, 1)).min())


def _logits(p: np.ndarray) -> np.ndarray:
    """Raises :class:`TeacherError` for what are no probabilities; a quantised graph's may be a little beyond 0 and 1."""
    low, high = float(p.min(initial=0)), float(p.max(initial=0))
    if low < -_BEYOND or high > 1 + _BEYOND:
        raise TeacherError(
            f"the scores of the graph go from {low:.4g} to {high:.4g}, and this head reads probabilities: export it with "
            "its sigmoid, and not transposed"
        )
    p = np.clip(p, _LEAST, 1 - _LEAST)
    return np.log(p) - np.log1p(-p)


def _corners(boxes: np.ndarray) -> np.ndarray:
    """cx, cy, w, h → x1, y1, x2, y2."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([middle - half, middle + half], axis=-1)


def _unit(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Pixels → shares of the sides."""
    return boxes / np.array([size[1], size[0]] * 2, np.float32)
