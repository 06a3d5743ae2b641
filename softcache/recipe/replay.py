"""The realised pixel ops of a view, done again: the same bits on every machine.

Whatever is done is Pillow's, on integers, or in floats that no compiler and no processor can round otherwise: factors
are multiples of 1/4096 (:data:`~.opcodes.FACTOR`), matrices multiples of 1/32768 with NEAREST sampling, and of 2**-20 with
bilinear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from softcache.errors import DamageError
from softcache.recipe.opcodes import DEGREE, FACTOR, FRACTION, GREY, Op

_STEPS = 1 << 15  # of a matrix, to one
_FINE = (
    1 << 20
)  # so that Pillow's bilinear, in float64, needs at most 50 bits: 8 of a level and 21 of each place

Matrix = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Instruction:
    """What an opcode does: ``run(image, *arguments)`` gives an image of the same size; ``limits`` of each argument.

    Where content is moved, ``taken(width, height, *arguments)`` is the matrix (a, b, c, d, e, f) by which the place (x, y)
    of the result comes from (ax + by + c, dx + ey + f), in pixels whose corners are whole numbers; ``sized`` where the
    same arguments are not the same share of the sides at every size. With ``fills``, ``run`` is also given the grey that
    comes in from outside, last.
    """

    run: Callable[..., Image.Image]
    limits: tuple[tuple[int, int], ...] = ()
    taken: Callable[..., Matrix] | None = None
    sized: bool = False
    fills: bool = False


def replay(pixels: np.ndarray, ops: Sequence[int], fill: int = 0) -> np.ndarray:
    """``pixels``, uint8 ``(h, w, 3)``, after ``ops``: a new array. What comes in from outside is of the grey ``fill``.

    Raises :class:`DamageError` for an opcode there is none of, an argument out of its range, or one that is missing.
    """
    image = Image.fromarray(pixels)
    for instruction, arguments in instructions(ops):
        image = instruction.run(image, *arguments, *([fill] if instruction.fills else []))
    return np.array(image)


def instructions(ops: Sequence[int]) -> Iterator[tuple[Instruction, tuple[int, ...]]]:
    """What ``ops`` says to do, in order; raises as :func:`replay` does."""
    at = 0
    while at < len(ops):
        code = ops[at]
        instruction = INSTRUCTIONS.get(code)
        if instruction is None:
            raise DamageError(f"a view has the pixel op {code}, which no recipe draws: rebuild the cache")
        arguments = tuple(ops[at + 1 : at + 1 + len(instruction.limits)])
        held = [low <= a <= high for a, (low, high) in zip(arguments, instruction.limits, strict=False)]
        if len(held) < len(instruction.limits) or not all(held):
            raise DamageError(
                f"a view has {Op(code).name} {arguments}, which no recipe draws: rebuild the cache"
            )
        at += 1 + len(arguments)
        yield instruction, arguments


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Instruction:
    return Instruction(lambda image, factor: enhancer(image).enhance(factor / FACTOR), ((0, FRACTION),))


def _hue(image: Image.Image, shift: int) -> Image.Image:
    """Pillow's hue, a byte, moved around the circle, as torchvision does."""
    hue, *rest = image.convert("HSV").split()
    turned = hue.point([(h + shift) % 256 for h in range(256)])
    return Image.merge("HSV", (turned, *rest)).convert("RGB")


def _grayscale(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _sampled(taken: Callable[[int, int, int], Matrix], limits: tuple[int, int]) -> Instruction:
    """Each pixel from the nearest one of where ``taken`` says, black outside."""

    def run(image: Image.Image, argument: int) -> Image.Image:
        matrix = taken(image.width, image.height, argument)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    return Instruction(run, (limits,), taken, sized=True)


def _shear_x(width: int, height: int, shear: int) -> Matrix:
    return 1, _divided(shear * width * _STEPS, FRACTION * height) / _STEPS, 0, 0, 1, 0


def _shear_y(width: int, height: int, shear: int) -> Matrix:
    return 1, 0, 0, _divided(shear * height * _STEPS, FRACTION * width) / _STEPS, 1, 0


def _translate_x(width: int, height: int, distance: int) -> Matrix:
    return 1, 0, -_divided(distance * width, FRACTION), 0, 1, 0


def _translate_y(width: int, height: int, distance: int) -> Matrix:
    return 1, 0, 0, 0, 1, -_divided(distance * height, FRACTION)


def _rotate(width: int, height: int, angle: int) -> Matrix:
    """Counter-clockwise about the middle."""
    turn = math.radians(angle / DEGREE)
    cos, sin = round(math.cos(turn) * _STEPS), round(math.sin(turn) * _STEPS)
    x, y = width / 2, height / 2
    steps = cos, -sin, x * _STEPS - cos * x + sin * y, sin, cos, y * _STEPS - sin * x - cos * y
    a, b, c, d, e, f = (s / _STEPS for s in steps)
    return a, b, c, d, e, f


def _upside_down(width: float, height: float) -> Matrix:
    return 1, 0, 0, 0, -1, height


def _unit(width: float, height: float, *shares: int) -> Matrix:
    """A matrix over the unit square, in pixels."""
    a, b, c, d, e, f = (share / FRACTION for share in shares)
    return a, b * width / height, c * width, d * height / width, e, f * height


def _affine(image: Image.Image, *arguments: int) -> Image.Image:
    """Bilinear, its matrix rounded to multiples of 2**-20; ``fill`` where the place lies outside."""
    *shares, fill = arguments
    width, height = image.size
    sides = (1, 1), (width, height), (width, 1), (height, width), (1, 1), (height, 1)
    matrix = [_divided(s * a * _FINE, FRACTION * b) / _FINE for s, (a, b) in zip(shares, sides, strict=True)]
    grey = (fill, fill, fill)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey
    )


def _hsv(image: Image.Image, shift: int, saturation: int, value: int) -> Image.Image:
    """Hue moved around the circle, the other two multiplied by factors: look-up tables on Pillow's HSV bytes."""
    tables = [(h + shift) % 256 for h in range(256)]
    for factor in (saturation, value):
        tables += [min(255, level * factor // FACTOR) for level in range(256)]
    return image.convert("HSV").point(tables).convert("RGB")


def _misplaced(image: Image.Image, fill: int) -> Image.Image:
    raise DamageError("a view has FILL after other ops, which no recipe draws: rebuild the cache")


def _erase(image: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    if right < left or bottom < top:
        raise DamageError("a view erases a box of no size, which no recipe draws: rebuild the cache")
    wide, high = image.size
    x, y = _divided(left * wide, FRACTION), _divided(top * high, FRACTION)
    end = _divided(right * wide, FRACTION), _divided(bottom * high, FRACTION)
    image.paste((GREY, GREY, GREY), (x, y, *end))
    return image


def _divided(a: int, b: int) -> int:
    """a / b, rounded; halves up."""
    return (2 * a + b) // (2 * b)


_SIDE = (0, FRACTION)
_SIGNED = (-FRACTION, FRACTION)

INSTRUCTIONS: Mapping[int, Instruction] = {
    Op.NOTHING: Instruction(lambda image: image),
    Op.BRIGHTNESS: _enhance(ImageEnhance.Brightness),
    Op.CONTRAST: _enhance(ImageEnhance.Contrast),
    Op.SATURATION: _enhance(ImageEnhance.Color),
    Op.SHARPNESS: _enhance(ImageEnhance.Sharpness),
    Op.HUE: Instruction(_hue, ((-128, 128),)),
    Op.GRAYSCALE: Instruction(_grayscale),
    Op.POSTERIZE: Instruction(ImageOps.posterize, ((1, 8),)),
    Op.SOLARIZE: Instruction(ImageOps.solarize, ((0, 256),)),
    Op.AUTOCONTRAST: Instruction(ImageOps.autocontrast),
    Op.EQUALIZE: Instruction(ImageOps.equalize),
    Op.SHEAR_X: _sampled(_shear_x, _SIGNED),
    Op.SHEAR_Y: _sampled(_shear_y, _SIGNED),
    Op.TRANSLATE_X: _sampled(_translate_x, _SIGNED),
    Op.TRANSLATE_Y: _sampled(_translate_y, _SIGNED),
    Op.ROTATE: _sampled(_rotate, (-180 * DEGREE, 180 * DEGREE)),
    Op.ERASE: Instruction(_erase, (_SIDE, _SIDE, _SIDE, _SIDE)),
    Op.FILL: Instruction(_misplaced, ((0, 255),)),
    Op.VFLIP: Instruction(ImageOps.flip, taken=_upside_down),
    Op.AFFINE: Instruction(_affine, (_SIGNED,) * 6, _unit, fills=True),
    Op.HSV: Instruction(_hsv, ((-128, 128), _SIDE, _SIDE)),
}
