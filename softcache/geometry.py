"""The geometry law ``box``: where a place of the image is in a view, and back. Nobody else moves a box.

A view takes a rectangle of the source image, mirrors it or not, and may turn, shear or move what it shows; all of that is
one affine, which is exact. Places are in pixels of the source image whose corners are whole numbers (the first pixel
covers 0 to 1), or in the unit square of the view, (0, 0) its top left and (1, 1) its bottom right corner. So nothing here
depends on the size a view is rendered at, with one exception: RandAugment's ops that move content count in pixels of
that size, and need it (``size``).

Of a mixed view this is the view's own part; its partner's is that of ``view.mix.view``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from softcache.errors import DamageError, SpecError
from softcache.recipe import View
from softcache.recipe.opcodes import filled

if TYPE_CHECKING:
    from softcache.recipe.replay import Instruction

Size = tuple[int, int]
MIN_VISIBLE = 0.1


def matrix(view: View, size: Size | None = None) -> np.ndarray:
    """The affine from source pixels to the unit square of the view, float64 ``(2, 3)``: ``m[:, :2] @ (x, y) + m[:, 2]``.

    Raises:
        SpecError: the view's content is moved by an op that counts in pixels, and ``size`` (h, w) is not given.
        DamageError: an op that no recipe draws, or one that makes a line of the view.
    """
    found = np.array([[1, 0, -view.x], [0, 1, -view.y], [0, 0, 1]], np.float64)
    found[:2] /= np.array([[view.width], [view.height]])
    if view.flip:
        found[0] = found[2] - found[0]
    for taken in _taken(view, size):
        if abs(np.linalg.det(taken)) < 1e-6:
            raise DamageError("a view is sheared to a line, which no recipe draws: rebuild the cache")
        found = np.linalg.solve(taken, found)
    return found[:2]


def to_view(view: View, xyxy: np.ndarray, size: Size | None = None) -> np.ndarray:
    """Boxes ``(n, 4)`` in source pixels → float64 ``(n, 4)`` in the unit square of the view, not clipped.

    Where the view is turned or sheared it is the box around the four corners. ``size`` and errors as for :func:`matrix`.
    """
    return _around(matrix(view, size), xyxy)


def to_source(view: View, unit: np.ndarray, size: Size | None = None) -> np.ndarray:
    """The inverse of :func:`to_view`: boxes ``(n, 4)`` of the unit square → float64 ``(n, 4)`` in source pixels.

    Where the view is turned or sheared it is the box around the four corners, which is larger than what it came from.
    """
    whole = np.vstack([matrix(view, size), [0, 0, 1]])
    return _around(np.linalg.inv(whole)[:2], unit)


@dataclass(frozen=True)
class Seen:
    """What is visible of some boxes.

    Attributes:
        boxes: float64 ``(m, 4)``, xyxy in the unit square of the view, clipped to it.
        visible: float64 ``(m,)``: the share of each box's area in the view that lies inside, ``min_visible`` … 1.
        index: int64 ``(m,)``: which of the given boxes they are.
    """

    boxes: np.ndarray
    visible: np.ndarray
    index: np.ndarray


def seen(view: View, xyxy: np.ndarray, min_visible: float = MIN_VISIBLE, size: Size | None = None) -> Seen:
    """The boxes ``(n, 4)`` in source pixels of which at least ``min_visible`` (a share of the area) lies in the view.

    It is the share of ``to_view``'s box, as in Ultralytics' ``box_candidates``; its other rules (two pixels a side,
    proportions under 100) depend on the size, and are left to who trains. Boxes of no area, and with what is no number,
    are never seen. (What an op of RandAugment moves out of the picture, and another back, counts as seen; it is black.)
    """
    boxes = np.asarray(xyxy, np.float64).reshape(-1, 4)
    index = np.flatnonzero(np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    moved = to_view(view, boxes[index], size)
    clipped = moved.clip(0, 1)
    share = _area(clipped) / _area(moved)
    kept = (share >= min_visible) & (share > 0)
    return Seen(clipped[kept], share[kept], index[kept])


def rectangular(view: View) -> bool:
    """Is what the view shows a rectangle of the image, mirrored left-right or not, and nothing else?"""
    return not any(True for _ in _moves(view))


def _moves(view: View) -> Iterator[tuple[Instruction, tuple[int, ...]]]:
    """The instructions that move content, with their arguments."""
    if any(view.ops):
        from softcache.recipe.replay import instructions  # it imports Pillow

        for instruction, arguments in instructions(filled(view.ops)[1]):
            if instruction.taken:
                yield instruction, arguments


def _taken(view: View, size: Size | None) -> Iterator[np.ndarray]:
    """For each op that moves content: where a place of its result comes from, float64 ``(3, 3)`` over the unit square."""
    for instruction, arguments in _moves(view):
        assert instruction.taken
        if instruction.sized and size is None:
            raise SpecError(
                "this view moves its content by whole pixels of the size it is rendered at (RandAugment's shears, "
                "shifts and turns): say size=(height, width)"
            )
        height, width = size if size and instruction.sized else (1, 1)
        a, b, c, d, e, f = instruction.taken(width, height, *arguments)
        yield np.array([[a, b * height / width, c / width], [d * width / height, e, f / height], [0, 0, 1]])


def _around(affine: np.ndarray, xyxy: np.ndarray) -> np.ndarray:
    """The boxes around the moved corners."""
    boxes = np.asarray(xyxy, np.float64).reshape(-1, 4)
    corners = boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]] @ affine[:, :2].T + affine[:, 2]
    return np.hstack([corners.min(axis=1), corners.max(axis=1)])


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
