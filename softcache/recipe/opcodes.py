"""The numbers that :attr:`~softcache.recipe.View.ops` consists of: an opcode, its arguments, the next opcode, …

They stand in caches for ever: an opcode keeps its number, its arguments and its meaning. Zeros between are nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class Op(IntEnum):
    """What is done to the pixels; the arguments are in :mod:`softcache.recipe.replay` and docs/format.md."""

    NOTHING = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    SHARPNESS = 4
    HUE = 5
    GRAYSCALE = 6
    POSTERIZE = 7
    SOLARIZE = 8
    AUTOCONTRAST = 9
    EQUALIZE = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14
    ROTATE = 15
    ERASE = 16
    FILL = 17
    VFLIP = 18
    AFFINE = 19
    HSV = 20


FACTOR = 4096  # Pillow blends in float32: with factors in such steps, up to 8, no bit of it is ever rounded
FRACTION = 32767  # of a side: free of resolution
DEGREE = 100
GREY = 128  # what is erased is filled with


def filled(ops: Sequence[int]) -> tuple[int | None, Sequence[int]]:
    """What FILL says is shown outside the image, 0 … 255, and the ops after it; None without one, which is black."""
    return (ops[1], ops[2:]) if len(ops) > 1 and ops[0] == Op.FILL and 0 <= ops[1] <= 255 else (None, ops)


def fraction(part: float, whole: float) -> int:
    """``part`` of a side of length ``whole``, in steps of 1/32767; whole pixels come back exactly."""
    return round(part * FRACTION / whole)
