"""Encoded bytes, PIL images and arrays → uint8 RGB pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from softcache.errors import SourceError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# of all that Pillow can open; among the rest are formats that start other programs (EPS)
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970  # where Pillow, too, refuses an image as a decompression bomb


def to_rgb(content: Any) -> np.ndarray:
    """uint8 ``(H, W, 3)`` of encoded bytes, a PIL image, an array or a tensor.

    Arrays are uint8 ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``; tensors (whatever has ``.numpy()``)
    uint8 ``(C, H, W)`` or ``(H, W)``. Alpha is dropped, sixteen-bit greys keep their high byte, no EXIF
    rotation is applied, and of an animation the first frame counts.

    Raises :class:`SourceError` for other types and dtypes, and what the decoders raise (``OSError``,
    ``ValueError``, …) for bytes that are not a whole image.
    """
    if isinstance(content, bytes):
        return _decode(content)
    if isinstance(content, np.ndarray):
        return _array(content)
    if hasattr(content, "numpy"):
        array = np.asarray(content.numpy())
        return _array(array if array.ndim < 3 else np.moveaxis(array, 0, -1))
    if hasattr(content, "convert"):
        return _pillow(content)
    raise SourceError(
        f"a dataset item holds a {type(content).__name__} where an image was expected; "
        "it must yield undecoded bytes, PIL images or uint8 arrays"
    )


def _decode(data: bytes) -> np.ndarray:
    if data.startswith(b"\xff\xd8\xff"):
        pixels = _jpeg(data)
        if pixels is not None:
            return pixels
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return _pillow(image)


def _jpeg(data: bytes) -> np.ndarray | None:
    """Pixels by simplejpeg, or None where Pillow should try: CMYK, and what is out of the ordinary."""
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if int(height) * int(width) > MAX_PIXELS or colours in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None


def _pillow(image: Any) -> np.ndarray:
    from PIL import ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise SourceError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process, so half an image would pass "
            "for a whole one; remove the line that sets it"
        )
    if image.mode.startswith("I;16"):  # sixteen bits: the high byte, where convert() would clip at 255
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of mode {image.mode}, whose range is not known: save it with 8 or 16 bits"
        )
    return np.array(image.convert("RGB"))


def _array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise SourceError(
            f"the dataset yields {array.dtype} images; it must yield undecoded bytes, PIL images or "
            "uint8 arrays: leave out ToTensor and normalisation, softcache renders the cached view"
        )
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise SourceError(
            f"the dataset yields an image of shape {array.shape}; arrays must be (H, W) or (H, W, 3), "
            "tensors (3, H, W)"
        )
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
