"""``warp``: what a map that was made on one view looks like on another view of the same image.

Both views are axis-aligned rectangles of the source image, mirrored or not, so what lies between them is one scale and
one offset an axis, and bilinear resampling is one small matrix an axis. The probe of a build measures with this
function how far a teacher's maps really move so, and the trainer applies it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softcache.errors import SpecError
from softcache.geometry import rectangular
from softcache.recipe import View


def warp(values: np.ndarray, seen: Sequence[View], shown: Sequence[View]) -> np.ndarray:
    """Maps of the views ``seen``, resampled bilinearly to the views ``shown``.

    Args:
        values: float32 ``(B, C, h, w)``; cell (i, j) stands for its share of the view's rectangle, whatever the size in
            pixels the view was rendered at.
        seen: the B views the maps were made on.
        shown: the B views that are wanted; where one reaches outside of what was seen, the outermost cells are
            repeated.

    Returns:
        float32 ``(B, C, h, w)``.

    Raises :class:`SpecError` for a view that is turned, sheared, moved or upside down: no rectangle of the image.
    """
    if not all(map(rectangular, (*seen, *shown))):
        raise SpecError(
            "maps can be warped from one rectangle of an image to another, mirrored left-right or not, and one of these "
            "views is turned, sheared, moved or upside down (vflip, random_affine with degrees or shear, rand_augment): "
            "use exact views, or leave that op out"
        )
    _, channels, h, w = values.shape
    a, b = (
        np.array([v.pack() for v in views], np.float64).reshape(-1, View.FIELDS) for views in (seen, shown)
    )
    no_flip = np.zeros(len(a))
    across = _weights(w, a[:, 0], a[:, 2], a[:, 6], b[:, 0], b[:, 2], b[:, 6])
    down = _weights(h, a[:, 1], a[:, 3], no_flip, b[:, 1], b[:, 3], no_flip)
    rows = values.reshape(-1, channels * h, w) @ across.transpose(0, 2, 1)
    return down[:, None] @ rows.reshape(-1, channels, h, w)


def _weights(
    n: int,
    start: np.ndarray,
    length: np.ndarray,
    flip: np.ndarray,
    to_start: np.ndarray,
    to_length: np.ndarray,
    to_flip: np.ndarray,
) -> np.ndarray:
    """float32 ``(B, n, n)``: what each cell along an axis of the wanted view takes from each cell of the seen one."""
    place = (np.arange(n) + 0.5) / n  # centres of cells, as shares of the view
    place = np.where(to_flip[:, None] > 0, 1 - place, place)
    place = (to_start[:, None] + place * to_length[:, None] - start[:, None]) / length[:, None]
    place = np.where(flip[:, None] > 0, 1 - place, place)
    position = np.clip(place * n - 0.5, 0, n - 1)
    low = np.floor(position).astype(np.int64)
    share = position - low
    cells = np.arange(n)
    lower, upper = (cells == low[..., None]), (cells == np.minimum(low + 1, n - 1)[..., None])
    return (lower * (1 - share)[..., None] + upper * share[..., None]).astype(np.float32)
