"""The geometry law ``box``: where a place of the image is in a view, and back. Nobody else moves a box.

A view takes a rectangle of the source image, mirrors it or not, and may turn, shear or move what it shows; all of that is
one affine, which is exact. Places are in pixels of the source image whose corners are whole numbers (the first pixel
covers 0 to 1), or in the unit square of the view, (0, 0) its top left and (1, 1) its bottom right corner. So nothing here
depends on the size a view is rendered at, with one exception: RandAugment's ops that move content count in pixels of
that size, and need it (``size``).

Of a mixed view :func:`matrix`, :func:`to_view`, :func:`to_source` and :func:`seen` tell of the view's own part; its
partner's is that of ``view.mix.view``. A mosaic has no one affine: :func:`parts` are its tiles, and :func:`seen_in_all` has
the boxes of all images that a view shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from softcache.errors import DamageError, MismatchError, SpecError
from softcache.recipe import View
from softcache.recipe.mix import ONE
from softcache.recipe.opcodes import filled
from softcache.source import Boxes

if TYPE_CHECKING:
    from softcache.recipe.replay import Instruction

Size = tuple[int, int]
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom
MIN_VISIBLE = 0.1


def matrix(view: View, size: Size | None = None) -> np.ndarray:
    """The affine from source pixels to the unit square of the view, float64 ``(2, 3)``: ``m[:, :2] @ (x, y) + m[:, 2]``.

    Raises:
        SpecError: the view's content is moved by an op that counts in pixels, and ``size`` (h, w) is not given; or it is a
            mosaic.
        DamageError: an op that no recipe draws, or one that makes a line of the view.
    """
    if view.mosaic is not None:
        raise SpecError(
            "a mosaic shows four images, each moved by its own affine: see softcache.geometry.parts"
        )
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

    Where the view is turned or sheared it is the box around the four corners. ``size`` and errors as for :func:`matrix`;
    :class:`SpecError` for boxes of another shape, too.
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
    return _seen(Part(-1, view), xyxy, min_visible, size)


@dataclass(frozen=True)
class Part:
    """One of the images that a view shows.

    Attributes:
        sample: whose image.
        view: how it is seen: no mosaic, and not mixed.
        place: where the unit square of ``view`` lies in that of the whole picture: left, top, right, bottom.
        window: what can be seen of it there, likewise; the rest is cut off.
        covered: what of that lies below another part, of a cutmix.
    """

    sample: int
    view: View
    place: Rectangle = (0.0, 0.0, 1.0, 1.0)
    window: Rectangle = (0.0, 0.0, 1.0, 1.0)
    covered: Rectangle = (0.0, 0.0, 0.0, 0.0)

    def size(self, whole: Size | None) -> Size | None:
        """The size (h, w) that it is rendered at in a picture of that size."""
        if whole is None:
            return None
        left, top, right, bottom = (
            math.floor(edge * side + 0.5) for edge, side in zip(self.place, whole[::-1] * 2, strict=True)
        )
        return max(1, bottom - top), max(1, right - left)


def parts(view: View, sample: int) -> list[Part]:
    """The images that a view of ``sample`` shows: one, the four of a mosaic in the order of its tiles, and after them as
    many of what it is mixed with."""
    if view.mix is not None:
        own, theirs = parts(replace(view, mix=None), sample), parts(view.mix.view, view.mix.partner)
        if (blend := view.mix.blend).width:
            edges = blend.x, blend.y, blend.x + blend.width, blend.y + blend.height
            left, top, right, bottom = (edge / ONE for edge in edges)
            box = left, top, right, bottom
            own = [replace(part, covered=box) for part in own]
            theirs = [replace(part, window=box) for part in theirs]
        return own + theirs
    own = replace(view, mosaic=None)
    if view.mosaic is None:
        return [Part(sample, own)]
    shown = [(sample, own), *((tile.sample, tile.view) for tile in view.mosaic.tiles)]
    places = view.mosaic.frame.places([part for _, part in shown])
    return [
        Part(*one, (float(left), float(top), float(right), float(bottom)))
        for one, (left, top, right, bottom) in zip(shown, places, strict=True)
    ]


@dataclass(frozen=True)
class SeenInAll(Seen):
    """What is visible of the boxes of several images; ``index`` is that in the boxes of its own image.

    Attributes:
        sample: int64 ``(m,)``: whose box it is.
        label, crowd, ignore: as in :class:`softcache.source.Boxes`.
    """

    sample: np.ndarray
    label: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray


def seen_in_all(
    view: View,
    sample: int,
    boxes: Mapping[int, Boxes],
    min_visible: float = MIN_VISIBLE,
    size: Size | None = None,
) -> SeenInAll:
    """As :func:`seen`, of all images that a view of ``sample`` shows; a box is cut where its tile ends.

    ``boxes`` by sample are those of ``sample`` and of ``view.others``. Of pictures mixed all over (mixup) all boxes are
    seen. What a cutmix covers of a box is not visible, and the box is not made smaller. One image may be shown, and its
    boxes seen, several times.

    Raises:
        SpecError: as :func:`matrix`.
        MismatchError: the boxes of a sample are not given.
    """
    found: list[tuple[Part, Boxes, Seen]] = []
    for part in parts(view, sample):
        if part.sample not in boxes:
            raise MismatchError(
                f"the view shows sample {part.sample} too: give the boxes of all its samples (view.others)"
            )
        theirs = boxes[part.sample]
        found.append((part, theirs, _seen(part, theirs.xyxy, min_visible, size)))
    all_of = [theirs[one.index] for _, theirs, one in found]
    return SeenInAll(
        boxes=np.concatenate([one.boxes for _, _, one in found]),
        visible=np.concatenate([one.visible for _, _, one in found]),
        index=np.concatenate([one.index for _, _, one in found]),
        sample=np.concatenate([np.full(len(one.index), part.sample) for part, _, one in found]),
        label=np.concatenate([kept.label for kept in all_of]),
        crowd=np.concatenate([kept.crowd for kept in all_of]),
        ignore=np.concatenate([kept.ignore for kept in all_of]),
    )


def _seen(part: Part, xyxy: np.ndarray, min_visible: float, size: Size | None) -> Seen:
    """The boxes that are seen in a part, in the unit square of the whole picture, which is of ``size``."""
    boxes = _rows(xyxy)
    index = np.flatnonzero(np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    low, high = np.array(part.place[:2] * 2), np.array(part.place[2:] * 2)
    moved = low + to_view(part.view, boxes[index], part.size(size)) * (high - low)
    clipped = moved.clip(np.maximum(low, part.window[:2] * 2), np.minimum(high, part.window[2:] * 2))
    hidden = clipped.clip(part.covered[:2] * 2, part.covered[2:] * 2)
    share = (_area(clipped) - _area(hidden)) / _area(moved)
    kept = (share >= min_visible) & (share > 0)
    return Seen(clipped[kept], share[kept], index[kept])


def rectangular(view: View) -> bool:
    """Is what the view shows a rectangle of the image, mirrored left-right or not, and nothing else?"""
    return view.mosaic is None and not any(True for _ in _moves(view))


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
    boxes = _rows(xyxy)
    corners = boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]] @ affine[:, :2].T + affine[:, 2]
    return np.hstack([corners.min(axis=1), corners.max(axis=1)])


def _rows(xyxy: np.ndarray) -> np.ndarray:
    """Boxes as float64 ``(n, 4)``, an empty list too. :class:`SpecError` for what has another shape."""
    try:
        boxes = np.asarray(xyxy, np.float64)
    except (TypeError, ValueError):
        raise SpecError(f"boxes are numbers (n, 4): left, top, right, bottom; these are {xyxy!r}") from None
    if boxes.shape == (0,):
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise SpecError(f"boxes are (n, 4): left, top, right, bottom; these are {boxes.shape}")
    return boxes


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
