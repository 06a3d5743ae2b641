"""Where a detector of the DETR family is asked besides its own queries: at the boxes of a view, near them, and anywhere.

Queries of two models do not correspond, so a student cannot learn them one by one; at the same boxes it can (KD-DETR,
CLoCKDistill). The boxes are a function of what a cache names, and stand on the grid of its boxes' codec, so that a student
takes them as they are from the ``reference`` of the first layer's probes, or draws them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from softcache.codecs import Objects
from softcache.codecs.fixed import Fixed
from softcache.errors import MismatchError
from softcache.geometry import seen_in_all
from softcache.keyed import Draws, Permutation, draws
from softcache.recipe import View
from softcache.source import Boxes

VERSION = 1
COUNT = 100
_EDGE = 1 / 512  # centres and sides keep so far from 0 and 1, where a sigmoid has no inverse
_SHIFT, _ZOOM = 0.3, 0.5  # a jittered box: its centre by ± so many sides, its sides by 2^±
_SMALL, _LARGE = 1 / 64, 0.75  # sides of a random one


@dataclass(frozen=True)
class Probes:
    """The boxes that a teacher is given with the views of one cache.

    Attributes:
        seed, ids: the recipe's seed, and the samples' ids.
        boxes: of a sample by its number, in pixels of its image.
        size: (h, w) that views are rendered at for the teacher.
        count: boxes a view.
    """

    seed: int
    ids: Sequence[str]
    boxes: Callable[[int], Boxes | None]
    size: tuple[int, int]
    count: int = COUNT

    @classmethod
    def of(
        cls, identity: Mapping[str, Any], ids: Sequence[str], boxes: Callable[[int], Boxes | None]
    ) -> Self | None:
        """Those of the cache of this identity (``cache.identity``); None where its teacher was given none.

        Raises :class:`MismatchError` where they were drawn by another version of the rule.
        """
        drawn = identity.get("probes")
        if drawn is None:
            return None
        if drawn["version"] != VERSION:
            raise MismatchError(
                f"the cache's probes were drawn by version {drawn['version']} of their rule, and this softcache has version "
                f"{VERSION}: use the softcache that made it"
            )
        height, width = identity["teacher"]["input_spec"]["size"]
        return cls(identity["recipe"]["seed"], ids, boxes, (height, width), drawn["count"])

    def __call__(self, view: View, sample: int, k: int) -> np.ndarray:
        """With view number ``k`` of a sample, float32 ``(count, 4)``: see :func:`points`."""
        shown = visible(view, sample, self.boxes, self.size)
        return points(self.seed, self.ids[sample], k, shown.boxes, self.count)


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


def visible(view: View, sample: int, boxes: Callable[[int], Boxes | None], size: tuple[int, int]) -> Objects:
    """The things that a view shows, but for crowds and those to be ignored; their ``boxes`` are what :func:`points` takes.

    Args:
        sample: the view's own. boxes: of a sample by its number. size: (h, w) that the view is rendered at.
    """
    known = {i: boxes(i) or Boxes.empty() for i in (sample, *view.others)}
    found = seen_in_all(view, sample, known, size=size)
    real = ~(found.crowd | found.ignore)
    return Objects(found.boxes[real], found.label[real])


def _near(box: np.ndarray, draw: Draws) -> list[float]:
    x, y, w, h = box.tolist()
    x, y = (c + side * draw.uniform(-_SHIFT, _SHIFT) for c, side in ((x, w), (y, h)))
    return [x, y, *(side * 2 ** draw.uniform(-_ZOOM, _ZOOM) for side in (w, h))]


def _anywhere(draw: Draws) -> list[float]:
    sides = (_SMALL * (_LARGE / _SMALL) ** draw.uniform() for _ in range(2))
    return [draw.uniform(), draw.uniform(), *sides]
