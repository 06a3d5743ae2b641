"""Where a detector of the DETR family is asked besides its own queries: at the boxes of a view, near them, and anywhere.

Queries of two models do not correspond, so a student cannot learn them one by one; at the same boxes it can (KD-DETR,
CLoCKDistill). The boxes are a function of what a cache names, and stand on the grid of its boxes' codec, so that a student
takes them as they are from the ``reference`` of the first layer's probes, or draws them again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from softcache.codecs.fixed import Fixed
from softcache.geometry import seen_in_all
from softcache.keyed import Draws, Permutation, draws
from softcache.recipe import View
from softcache.source import Boxes

VERSION = 1
COUNT = 100
_EDGE = 1 / 512  # centres and sides keep so far from 0 and 1, where a sigmoid has no inverse
_SHIFT, _ZOOM = 0.3, 0.5  # a jittered box: its centre by ± so many sides, its sides by 2^±
_SMALL, _LARGE = 1 / 64, 0.75  # sides of a random one


def points(seed: int, id: str, k: int, boxes: np.ndarray, count: int = COUNT) -> np.ndarray:
    """Boxes to probe, float32 ``(count, 4)``: x1, y1, x2, y2 in the unit square of the view, centres within.

    First the view's own; half of the rest are jittered ones of them, in turn, and what is left lies anywhere, as all do
    in a view without boxes. Of more than ``count`` boxes, as many are drawn.

    Args:
        seed, id, k: the recipe's seed, the sample's id, and the number of its view.
        boxes: float64 ``(n, 4)``, those that are visible in the view, in the source's order.
    """
    draw = draws("probes", seed, id, k)
    own = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    if len(own) > count:
        own = own[np.sort(Permutation(len(own), "probes", seed, id, k).inverse(np.arange(count)))]
    near = (count - len(own)) // 2 if len(own) else 0
    jittered = [_near(own[i % len(own)], draw) for i in range(near)]
    free = [_anywhere(draw) for _ in range(count - len(own) - near)]
    found = np.concatenate([own, np.array(jittered + free).reshape(-1, 4)])
    centre, half = np.clip(found[:, :2], _EDGE, 1 - _EDGE), np.clip(found[:, 2:], _EDGE, 1 - _EDGE) / 2
    grid = Fixed()
    return grid.decode(grid.encode(np.concatenate([centre - half, centre + half], axis=1)), (4,))


def visible(
    view: View, sample: int, boxes: Callable[[int], Boxes | None], size: tuple[int, int]
) -> np.ndarray:
    """What :func:`points` takes: the things that a view shows, but for crowds and those to be ignored.

    Args:
        sample: the view's own. boxes: of a sample by its number. size: (h, w) that the view is rendered at.
    """
    known = {i: boxes(i) or Boxes.empty() for i in (sample, *view.others)}
    found = seen_in_all(view, sample, known, size=size)
    return found.boxes[~(found.crowd | found.ignore)]


def _near(box: np.ndarray, draw: Draws) -> list[float]:
    x, y, w, h = box.tolist()
    x, y = (c + side * draw.uniform(-_SHIFT, _SHIFT) for c, side in ((x, w), (y, h)))
    return [x, y, *(side * 2 ** draw.uniform(-_ZOOM, _ZOOM) for side in (w, h))]


def _anywhere(draw: Draws) -> list[float]:
    sides = (_SMALL * (_LARGE / _SMALL) ** draw.uniform() for _ in range(2))
    return [draw.uniform(), draw.uniform(), *sides]
