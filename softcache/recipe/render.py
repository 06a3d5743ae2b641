"""``render``: the pixels of a view. Builder and trainer call this one function."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softcache.errors import MismatchError
from softcache.recipe.opcodes import filled
from softcache.recipe.view import View

VERSION = 1


def render(
    image: np.ndarray, view: View, size: tuple[int, int], partner: np.ndarray | None = None
) -> np.ndarray:
    """The pixels of ``view`` at ``size`` = (h, w): a new contiguous uint8 array ``(h, w, 3)``.

    ``image`` is uint8 ``(H, W, 3)``. Crops the rectangle (black outside the image, or what the view's ``FILL`` says),
    mirrors it, and only where its size is not ``size`` resamples it with Pillow's antialiased bilinear filter
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
    fill, ops = filled(view.ops)
    part = image[max(view.y, 0) : max(view.y + view.height, 0)]
    part = _columns(part, view, fill)
    if view.flip:
        part = part[:, ::-1]
    if (
        len(part) < view.height
    ):  # what is added below and above is of one grey: across, it need not be resampled
        part = _rows(_resized(part, (len(part), size[1])), view, fill)
    part = _resized(part, size)
    # a copy: nobody writes into the source, and no stride is negative (torch refuses those)
    if np.may_share_memory(part, image) or not part.flags.c_contiguous:
        part = part.copy()
    return _replayed(part, ops, fill) if any(ops) else part


def _columns(part: np.ndarray, view: View, fill: int) -> np.ndarray:
    """The columns of the rectangle."""
    x, right = view.x, view.x + view.width
    if x >= 0 and right <= view.image_width:
        return part[:, x:right]
    padded = np.full((len(part), view.width, 3), fill, np.uint8)
    inside = part[:, max(x, 0) : max(right, 0)]
    left = max(-x, 0)
    padded[:, left : left + inside.shape[1]] = inside
    return padded


def _rows(part: np.ndarray, view: View, fill: int) -> np.ndarray:
    """The rows of the rectangle, of which ``part`` are those inside the image."""
    padded = np.full((view.height, part.shape[1], 3), fill, np.uint8)
    top = max(-view.y, 0)
    padded[top : top + len(part)] = part
    return padded


def _replayed(pixels: np.ndarray, ops: Sequence[int], fill: int) -> np.ndarray:
    from softcache.recipe.replay import replay  # it, too, imports Pillow

    return replay(pixels, ops, fill)


def _resized(part: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``part`` itself where it has that size, or no rows."""
    if part.shape[:2] == size or not len(part):
        return part
    from PIL import Image  # only recipes that resample pay for its import

    height, width = size
    whole = Image.fromarray(np.ascontiguousarray(part))
    return np.array(whole.resize((width, height), Image.Resampling.BILINEAR))
