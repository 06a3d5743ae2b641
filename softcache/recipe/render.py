"""``render``: the pixels of a view. Builder and trainer call this one function."""

from __future__ import annotations

import numpy as np

from softcache.errors import MismatchError
from softcache.recipe.view import View

VERSION = 1


def render(
    image: np.ndarray, view: View, size: tuple[int, int], partner: np.ndarray | None = None
) -> np.ndarray:
    """The pixels of ``view`` at ``size`` = (h, w): a new contiguous uint8 array ``(h, w, 3)``.

    ``image`` is uint8 ``(H, W, 3)``. Crops the rectangle (zeros outside the image), mirrors it, and
    only where its size is not ``size`` resamples it with Pillow's antialiased bilinear filter
    (integer arithmetic, the same on every machine). Then its pixel ops are done, at that size. A view
    with a mix is mixed with the same of ``partner``, the image of the sample ``view.mix.partner``.
    Raises :class:`MismatchError` for an image of another size than the one the view was drawn for and
    for a partner that is missing, and :class:`DamageError` for ops that no recipe draws.
    """
    pixels = _alone(image, view, size)
    if view.mix is None:
        return pixels
    if partner is None:
        raise MismatchError(
            f"the view is mixed with sample {view.mix.partner}: render it with that sample's image as partner"
        )
    return view.mix.blend(pixels, _alone(partner, view.mix.view, size))


def _alone(image: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """The pixels without the mix."""
    if image.shape[:2] != (view.image_height, view.image_width):
        raise MismatchError(
            f"the view was drawn for an image of {view.image_width}x{view.image_height}, this one "
            f"is {image.shape[1]}x{image.shape[0]}: another image, or resized since the cache was "
            "built; use the source that the cache was built from"
        )
    part = _crop(image, view)
    if view.flip:
        part = part[:, ::-1]
    # a copy: nobody writes into the source, and no stride is negative (torch refuses those)
    part = _resize(part, size) if part.shape[:2] != size else part.copy()
    return _replayed(part, view.ops) if any(view.ops) else part


def _crop(image: np.ndarray, view: View) -> np.ndarray:
    x, y, right, bottom = view.x, view.y, view.x + view.width, view.y + view.height
    if x >= 0 and y >= 0 and right <= view.image_width and bottom <= view.image_height:
        return image[y:bottom, x:right]
    part = np.zeros((view.height, view.width, 3), np.uint8)
    inside = image[max(y, 0) : max(bottom, 0), max(x, 0) : max(right, 0)]
    top, left = max(-y, 0), max(-x, 0)
    part[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return part


def _replayed(pixels: np.ndarray, ops: tuple[int, ...]) -> np.ndarray:
    from softcache.recipe.replay import replay  # it, too, imports Pillow

    return replay(pixels, ops)


def _resize(part: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image  # only recipes that resample pay for its import

    height, width = size
    whole = Image.fromarray(np.ascontiguousarray(part))
    return np.array(whole.resize((width, height), Image.Resampling.BILINEAR))
