"""Layout: what the columns of a target of many items mean, and where its items stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from softcache.errors import SpecError, TeacherError, nearest

COLUMNS = ("logits", "objectness", "boxes", "distribution", "embedding", "reference", "deltas")
SCORES = ("sigmoid", "softmax", "geometric")
MAX_COLUMNS = 1 << 16
_COUNTS = {
    "objectness": (1, 1),
    "boxes": (4, 4),
    "reference": (4, 4),
    "distribution": (4, MAX_COLUMNS),
}  # what a count is a multiple of, and at most


@dataclass(frozen=True)
class Layout:
    """How a row of ``(…, items, columns)`` is read: an item is an anchor, a query, a proposal or a probe.

    ``columns`` maps a name of :data:`COLUMNS` to its number of columns, in order:

    - ``logits``: class scores before ``score``; with ``background``, the one that means no object.
    - ``objectness``: one logit, whose sigmoid multiplies the classes' (YOLOX). With the score ``geometric`` the root of the
      product counts (FCOS, which calls it centerness).
    - ``boxes``, ``reference``: x1, y1, x2, y2 in the unit square of the view; an answer, and where it started from.
    - ``distribution``: four sides of bins, logits (DFL). ``deltas``: what a box head adds, as it says it.
    - ``embedding``: of a query, or of a proposal.

    ``levels`` are the (height, width) of the grids of anchors, in order, cells row by row; empty where items have no
    place. ``anchors``: how many items every cell has, next to each other (RetinaNet's nine). ``layers``: items come in so
    many equal groups, one a decoder layer, the last layer last.
    ``head`` names which of a model's heads spoke, for people.
    """

    columns: Mapping[str, int]
    score: str = "sigmoid"
    background: int | None = None
    levels: tuple[tuple[int, int], ...] = ()
    layers: int = 1
    head: str = ""
    anchors: int = 1
    _slices: dict[str, slice] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = {name: int(n) if isinstance(n, np.integer) else n for name, n in self.columns.items()}
        object.__setattr__(self, "columns", counts)
        object.__setattr__(self, "levels", tuple((int(h), int(w)) for h, w in self.levels))
        if wrong := self._wrong():
            raise TeacherError(f"the layout of a target of many items: {wrong}")
        ends = list(accumulate(self.columns.values()))
        starts = [0, *ends[:-1]]
        object.__setattr__(self, "_slices", dict(zip(self.columns, map(slice, starts, ends), strict=True)))

    def _wrong(self) -> str | None:
        """What is wrong with it, in words."""
        for name, count in self.columns.items():
            if name not in COLUMNS:
                return f"unknown columns {name!r}{nearest(name, COLUMNS)}"
            each, most = _COUNTS.get(name, (1, MAX_COLUMNS))
            if type(count) is not int or not 1 <= count <= most or count % each:
                return f"{count!r} columns of {name}"
        if not self.columns or self.score not in SCORES:
            return f"no columns, or the score {self.score!r} which is none of {', '.join(SCORES)}"
        logits = self.columns.get("logits", 0)
        if self.background is not None and not (0 <= self.background < logits and logits > 1):
            return f"the background {self.background} beside the classes is none of its {logits} logits"
        sides = [side for level in self.levels for side in level]
        if len(sides) > 128 or not all(1 <= side <= 1 << 15 for side in sides):
            return f"its {len(self.levels)} levels are from {min(sides)} to {max(sides)} cells a side"
        if not 1 <= self.layers <= 1 << 10 or len(self.head) > 200:
            return f"{self.layers} layers, of a head whose name has {len(self.head)} characters"
        if not 1 <= self.anchors <= 1 << 10:
            return f"{self.anchors} anchors of a cell"
        if self.score == "geometric" and not {"logits", "objectness"} <= self.columns.keys():
            return "the score 'geometric', which is of logits and objectness"
        return None

    @property
    def width(self) -> int:
        """Columns in all."""
        return sum(self.columns.values())

    @property
    def cells(self) -> int | None:
        """How many items the levels make; None without levels."""
        return self.anchors * sum(map(prod, self.levels)) if self.levels else None

    @property
    def classes(self) -> int:
        """Class logits but the background; 0 where there are none."""
        return self.columns.get("logits", 0) - (self.background is not None)

    @property
    def scored(self) -> bool:
        """Do its columns tell one item's score from another's?"""
        return "logits" in self.columns or "objectness" in self.columns

    def part(self, values: np.ndarray, name: str) -> np.ndarray:
        """The columns ``name`` of ``values`` ``(…, items, width)``: a view."""
        return values[..., self._slices[name]]

    def parts(self, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Every name with its columns, in order."""
        return ((name, self.part(values, name)) for name in self.columns)

    def scores(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """Probabilities of the classes but the background, ``(…, items, classes)``, from ``logits`` and ``objectness``.

        Without logits, of being an object at all: ``(…, items, 1)``. Raises :class:`SpecError` where it is not ``scored``.
        """
        if not self.scored:
            raise SpecError(f"items of {', '.join(self.columns)} have no scores: they have no logits")
        if "logits" not in parts:
            return _sigmoid(parts["objectness"])
        logits = parts["logits"]
        if self.score == "softmax":
            p = np.exp(logits - logits.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
        else:
            p = _sigmoid(logits)
        if self.background is not None:
            p = np.delete(p, self.background, axis=-1)
        if "objectness" in parts:
            p = p * _sigmoid(parts["objectness"])
        return np.sqrt(p) if self.score == "geometric" else p

    def __str__(self) -> str:
        """``logits 80, boxes 4; sigmoid; 3 levels; one2many``, for people."""
        told = [", ".join(f"{name} {count}" for name, count in self.columns.items()), self.score]
        told += [f"background {self.background}"] * (self.background is not None)
        told += [f"{len(self.levels)} levels"] * bool(self.levels)
        told += [f"{self.anchors} anchors a cell"] * (self.anchors > 1)
        told += [f"{self.layers} layers"] * (self.layers > 1)
        return "; ".join(told + [self.head] * bool(self.head))

    def identity(self) -> dict[str, Any]:
        """As JSON-able values; :meth:`from_identity` is the inverse."""
        return {
            "columns": list(self.columns.items()),  # their order counts
            "score": self.score,
            "background": self.background,
            "levels": list(self.levels),
            "layers": self.layers,
            "head": self.head,
            "anchors": self.anchors,
        }

    @classmethod
    def from_identity(cls, stored: Mapping[str, Any]) -> Layout:
        """Raises :class:`TeacherError` for what no teacher says."""
        return cls(**{**stored, "columns": dict(stored["columns"])})


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Without overflow at either end."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)
