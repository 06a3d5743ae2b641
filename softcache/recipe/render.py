"""``render``: the pixels of a view. Builder and trainer call this one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from softcache.errors import DamageError, MismatchError
from softcache.recipe.opcodes import filled
from softcache.recipe.options import rendered
from softcache.recipe.view import View

VERSION = 1
MOST = 178_956_970  # pixels that are held at a time: as many as an image may have


NO_OTHERS: Mapping[int, np.ndarray] = MappingProxyType({})


def render(
    image: np.ndarray, view: View, size: int | tuple[int, int], others: Mapping[int, np.ndarray] = NO_OTHERS
) -> np.ndarray:
    """The pixels of ``view`` at ``size`` = (h, w), or both in one number: a new contiguous uint8 array ``(h, w, 3)``.

    ``image`` is uint8 ``(H, W, 3)``. Crops the rectangle (black outside the image, or what the view's ``FILL`` says),
    mirrors it, and only where its size is not ``size`` resamples it with Pillow's antialiased bilinear filter
    (integer arithmetic, the same on every machine; with ``FILL`` across first, and then down). Then its pixel ops are
    done, at that size. Of a mosaic each tile is made so, at its own size. At last it is mixed with its partner's pixels,
    made likewise. ``others`` are the images of ``view.others`` by sample, see :func:`gather`; more do no harm.
    Raises :class:`SpecError` for what is no size, :class:`MismatchError` for an image of another size than the one the
    view was drawn for and for one that is missing, and :class:`DamageError` for ops that no recipe draws.
    """
    pair = rendered(size)
    pixels = _tiled(image, view, pair, others)
    if view.mix is None:
        return pixels
    return view.mix.blend(pixels, _tiled(_of(view.mix.partner, others), view.mix.view, pair, others))


def gather(sample: int, view: View, look: Callable[[int], np.ndarray]) -> dict[int, np.ndarray]:
    """The images that a view of ``sample`` is rendered from, its own too, by sample; ``look`` gives each, once."""
    return {i: look(i) for i in dict.fromkeys((sample, *view.others))}


def _of(sample: int, others: Mapping[int, np.ndarray]) -> np.ndarray:
    if sample not in others:
        raise MismatchError(
            f"the view shows sample {sample} too: render it with the images of all its samples (view.others) as others"
        )
    return others[sample]


def _tiled(
    image: np.ndarray, view: View, size: tuple[int, int], others: Mapping[int, np.ndarray]
) -> np.ndarray:
    """The pixels without the mix."""
    if view.mosaic is None:
        return _alone(image, view, size)
    tiles, frame = view.mosaic.tiles, view.mosaic.frame
    canvas = np.full((*size, 3), frame.fill, np.uint8)
    shown = [(image, view), *((_of(tile.sample, others), tile.view) for tile in tiles)]
    places = frame.pixels([part for _, part in shown], size)
    for (one, part), (left, top, right, bottom) in zip(shown, places, strict=True):
        rows, columns = slice(max(top, 0), min(bottom, size[0])), slice(max(left, 0), min(right, size[1]))
        if rows.start < rows.stop and columns.start < columns.stop:
            pixels = _alone(one, part, (bottom - top, right - left))
            canvas[rows, columns] = pixels[
                rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
            ]
    return canvas


def _alone(image: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """The pixels without mosaic and mix."""
    if image.shape[:2] != (view.image_height, view.image_width):
        raise MismatchError(
            f"the view was drawn for an image of {view.image_width}x{view.image_height}, this one "
            f"is {image.shape[1]}x{image.shape[0]}: another image, or resized since the cache was "
            "built; use the source that the cache was built from"
        )
    fill, ops = filled(view.ops)
    part = image[max(view.y, 0) : max(view.y + view.height, 0)]
    part = _padded(part, 1, view.x, view.width, fill or 0)
    if view.flip:
        part = part[:, ::-1]
    if fill is not None:
        # across first, before rows are added: the rectangle around a long image may be very large
        part = _resized(part, (len(part), size[1]))
    part = _padded(part, 0, min(view.y, 0), view.height, fill or 0)
    part = _resized(part, size)
    # a copy: nobody writes into the source, and no stride is negative (torch refuses those)
    if np.may_share_memory(part, image) or not part.flags.c_contiguous:
        part = part.copy()
    return _replayed(part, ops, fill or 0) if any(ops) else part


def _padded(part: np.ndarray, axis: int, start: int, length: int, fill: int) -> np.ndarray:
    """``length`` rows (columns) from ``start``, those of ``part`` where there are any."""
    inside = np.s_[max(start, 0) : max(start + length, 0)]
    found = part[:, inside] if axis else part[inside]
    if found.shape[axis] == length:
        return found
    shape = (len(part), length, 3) if axis else (length, part.shape[1], 3)
    if shape[0] * shape[1] > MOST:
        raise DamageError(
            f"a view shows {shape[1]:,}x{shape[0]:,} pixels, most of them outside the image; up to {MOST:,} are rendered"
        )
    padded = np.full(shape, fill, np.uint8)
    first = max(-start, 0)
    place = np.s_[first : first + found.shape[axis]]
    padded[(slice(None), place) if axis else place] = found
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
