"""Encoded bytes, PIL images and arrays → uint8 RGB pixels, by one rule for what is out of the ordinary:

* grey is repeated; a palette is looked up; alpha and transparency are dropped, whatever colour lies under them;
* CMYK becomes RGB as Pillow converts it, (255 − C)(255 − K) / 255; in a JPEG it is taken to be stored inverted, as
  Adobe does, whether Adobe's marker is there or not;
* of sixteen bits the high byte is kept, in grey and in colour (of a colour PPM Pillow makes eight bits, rounding);
  whole numbers of 32 bits and floats are refused;
* of an animation the first frame counts, of a TIFF the first page;
* an EXIF orientation is not applied, as torchvision's and timm's loaders do not (TIFF's own tag is, by Pillow);
* what a decoder calls damaged or cut short is refused.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from softcache.errors import SourceError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# of all that Pillow can open; among the rest are formats that start other programs (EPS)
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970  # where Pillow, too, refuses an image as a decompression bomb

_APP1, _ORIENTATION, _EXIF = 0xE1, 0x0112, b"Exif\0\0"


def to_rgb(content: Any) -> np.ndarray:
    """uint8 ``(H, W, 3)`` of encoded bytes, a PIL image, an array or a tensor.

    Arrays are uint8 ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``; tensors (whatever has ``.numpy()``)
    uint8 ``(C, H, W)`` or ``(H, W)``. What is out of the ordinary goes by the rule above.

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


def is_rotated(content: Any) -> bool:
    """Does the EXIF of these bytes of an image ask for it to be shown turned or mirrored? Decodes no pixels."""
    return isinstance(content, bytes) and orientation(content) != 1


def orientation(content: bytes) -> int:
    """The EXIF orientation, 2 to 8, of a JPEG, of which the beginning will do, or of a whole PNG or WebP; 1, as it stands,
    of all others."""
    found = _orientation(_exif(content).removeprefix(_EXIF))
    return found if found in range(2, 9) else 1


def is_jpeg(content: bytes) -> bool:
    """Do they begin as one?"""
    return content.startswith(b"\xff\xd8")


def _exif(content: bytes) -> bytes:
    """What a file's container holds as EXIF; nothing where there is none."""
    if is_jpeg(content):
        return _exif_of_jpeg(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):  # size, name, so many bytes, a checksum
        return _chunk(content, b"eXIf", 8, "big", lambda size: size + 4)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":  # name, size, so many bytes, an even number
        return _chunk(content, b"EXIF", 12, "little", lambda size: size + size % 2)
    return b""


def _chunk(
    content: bytes, wanted: bytes, at: int, order: Literal["little", "big"], room: Callable[[int], int]
) -> bytes:
    """The first of that name, of those from ``at`` on; after the eight bytes of its head there is ``room`` for its size."""
    while at < len(content):
        words = content[at : at + 4], content[at + 4 : at + 8]
        size, name = words if order == "big" else words[::-1]
        length = int.from_bytes(size, order)
        if name == wanted:
            return content[at + 8 : at + 8 + length]
        at += 8 + room(length)
    return b""


def _exif_of_jpeg(content: bytes) -> bytes:
    at = 2
    while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] not in (b"\xda", b"\xd9", b""):
        size = int.from_bytes(content[at + 2 : at + 4], "big")
        if content[at + 1] == _APP1 and content.startswith(_EXIF, at + 4):
            return content[at + 4 : at + 2 + size]
        at += 2 + max(size, 2)
    return b""


def _orientation(tiff: bytes) -> int:
    """The tag in the first directory; 1, as it stands, where there is none."""
    order = "little" if tiff.startswith(b"II") else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    first = number(4, 4)
    entries = range(first + 2, min(first + 2 + 12 * number(first, 2), len(tiff)), 12)
    return next((number(at + 8, 2) for at in entries if number(at, 2) == _ORIENTATION), 1)


def _decode(data: bytes) -> np.ndarray:
    if data.startswith(b"\xff\xd8\xff"):
        pixels = _jpeg(data)
        if pixels is not None:
            return pixels
    with open_image(io.BytesIO(data)) as image:
        return _pillow(image)


def open_image(file: Any) -> Any:
    """Pillow's image of a path or a binary file, of :data:`FORMATS`, its pixels not read yet. Raises what Pillow does.

    Ultralytics, once imported, has put another ``open`` into Pillow, which would install a package for what is damaged.
    """
    from PIL import Image

    pillows = getattr(sys.modules.get("ultralytics.utils.patches"), "_image_open", Image.open)
    return pillows(file, formats=FORMATS)


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
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        # sixteen bits, as a PGM's are made by Pillow: the high byte, where convert() would clip at 255
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of mode {image.mode}, whose range is not known: save it with 8 or 16 bits"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
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
