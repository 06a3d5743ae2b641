"""Which items lie best on the objects of a view, as task-aligned assigners rank them."""

from __future__ import annotations

import numpy as np

from softcache.codecs.objects import Objects
from softcache.errors import CodecError

_SCORE, _OVERLAP = 0.5, 6.0  # exponents: TOOD's alignment (Feng et al. 2021), as Ultralytics sets them


def aligned(scores: np.ndarray, boxes: np.ndarray, objects: Objects) -> np.ndarray:
    """The items that overlap with an object, best first: int64 ``(k,)``, each once.

    Alignment of an item with an object is score(of its class)^0.5 · IoU^6, of equal ones the lower number is better. They
    are taken in turn: the best of every object, in the objects' order, then the second best of each, and so on.

    Args:
        scores: of a row's items, ``(items, classes)``. boxes: ``(items, 4)``, in the unit square of the view.

    Raises :class:`CodecError` for an object of a class without a score.
    """
    if len(objects) and not 0 <= objects.label.min() <= objects.label.max() < scores.shape[1]:
        raise CodecError(
            f"the boxes have classes up to {objects.label.max()}, and the teacher's are {scores.shape[1]}: they are not the "
            "same classes"
        )
    corners = boxes.astype(np.float64)
    ranked = [
        _ranked(scores[:, c], corners, box) for c, box in zip(objects.label, objects.boxes, strict=True)
    ]
    if not ranked:
        return np.zeros(0, np.int64)
    turns = np.concatenate([np.arange(len(one)) for one in ranked])
    found = np.concatenate(ranked)[np.argsort(turns, kind="stable")]
    return found[np.sort(np.unique(found, return_index=True)[1])]


def _ranked(score: np.ndarray, boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The items that overlap with a box, by falling alignment: int64 ``(k,)``."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    near = np.flatnonzero((sides > 0).all(axis=1))
    common, own = sides[near].prod(axis=1), (boxes[near, 2:] - boxes[near, :2]).prod(axis=1)
    overlap = common / (own + (box[2:] - box[:2]).prod() - common)
    alignment = score[near].astype(np.float64) ** _SCORE * overlap**_OVERLAP
    return near[np.argsort(-alignment, kind="stable")]
