"""The realised pixel ops of a view, done again: the same bits on every machine.

Whatever is done is Pillow's, on integers, or in floats that no compiler and no processor can round otherwise: factors
are multiples of 1/4096 (:data:`~.opcodes.FACTOR`), matrices multiples of 1/32768 with NEAREST sampling.
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


@dataclass(frozen=True)
class Instruction:
    """What an opcode does: ``run(image, *arguments)`` gives an image of the same size; ``limits`` of each argument."""

    run: Callable[..., Image.Image]
    limits: tuple[tuple[int, int], ...] = ()


def replay(pixels: np.ndarray, ops: Sequence[int]) -> np.ndarray:
    """``pixels``, uint8 ``(h, w, 3)``, after ``ops``: a new array.

    Raises :class:`DamageError` for an opcode there is none of, an argument out of its range, or one that is missing.
    """
    image = Image.fromarray(pixels)
    for instruction, arguments in instructions(ops):
        image = instruction.run(image, *arguments)
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


def _sample(image: Image.Image, *matrix: float) -> Image.Image:
    """(a, b, c, d, e, f) in steps: pixel (x, y) is taken from (ax + by + c, dx + ey + f), black outside."""
    data = tuple(m / _STEPS for m in matrix)
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.NEAREST)


def _shear_x(image: Image.Image, shear: int) -> Image.Image:
    width, height = image.size
    return _sample(image, _STEPS, _divided(shear * width * _STEPS, FRACTION * height), 0, 0, _STEPS, 0)


def _shear_y(image: Image.Image, shear: int) -> Image.Image:
    width, height = image.size
    return _sample(image, _STEPS, 0, 0, _divided(shear * height * _STEPS, FRACTION * width), _STEPS, 0)


def _translate_x(image: Image.Image, distance: int) -> Image.Image:
    return _sample(image, _STEPS, 0, -_STEPS * _divided(distance * image.width, FRACTION), 0, _STEPS, 0)


def _translate_y(image: Image.Image, distance: int) -> Image.Image:
    return _sample(image, _STEPS, 0, 0, 0, _STEPS, -_STEPS * _divided(distance * image.height, FRACTION))


def _rotate(image: Image.Image, angle: int) -> Image.Image:
    """Counter-clockwise about the middle."""
    turn = math.radians(angle / DEGREE)
    cos, sin = round(math.cos(turn) * _STEPS), round(math.sin(turn) * _STEPS)
    x, y = image.width / 2, image.height / 2
    return _sample(image, cos, -sin, x * _STEPS - cos * x + sin * y, sin, cos, y * _STEPS - sin * x - cos * y)


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
    Op.SHEAR_X: Instruction(_shear_x, (_SIGNED,)),
    Op.SHEAR_Y: Instruction(_shear_y, (_SIGNED,)),
    Op.TRANSLATE_X: Instruction(_translate_x, (_SIGNED,)),
    Op.TRANSLATE_Y: Instruction(_translate_y, (_SIGNED,)),
    Op.ROTATE: Instruction(_rotate, ((-180 * DEGREE, 180 * DEGREE),)),
    Op.ERASE: Instruction(_erase, (_SIDE, _SIDE, _SIDE, _SIDE)),
}
