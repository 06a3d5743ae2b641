"""Pixel ops against torchvision: what they do with the realised magnitude, and how magnitudes are distributed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from softcache.recipe import Recipe, View, render
from softcache.recipe.opcodes import DEGREE, FACTOR, FRACTION, Op
from softcache.recipe.replay import INSTRUCTIONS


def picture(side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def replayed(image: np.ndarray, *ops: int) -> np.ndarray:
    height, width = image.shape[:2]
    return render(image, View(0, 0, width, height, width, height, False, ops), (height, width))


def by_torchvision(image: np.ndarray, op: Op, *arguments: int) -> np.ndarray:
    """The same realised op, on tensors where they are torchvision's own code and not Pillow's."""
    f, picture = pytest.importorskip("torchvision.transforms.functional"), Image.fromarray(image)
    torch = pytest.importorskip("torch")
    tensor, first = torch.from_numpy(image.copy()).permute(2, 0, 1), arguments[0] if arguments else 0
    factor, share, (width, height) = first / FACTOR, first / FRACTION, picture.size
    nearest = {"interpolation": f.InterpolationMode.NEAREST}
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | nearest
    tilt = math.degrees(math.atan(share))
    calls: dict[Op, Any] = {
        Op.NOTHING: lambda: tensor,
        Op.BRIGHTNESS: lambda: f.adjust_brightness(tensor, factor),
        Op.CONTRAST: lambda: f.adjust_contrast(tensor, factor),
        Op.SATURATION: lambda: f.adjust_saturation(tensor, factor),
        Op.SHARPNESS: lambda: f.adjust_sharpness(tensor, factor),
        Op.HUE: lambda: f.adjust_hue(picture, first / 255),
        Op.GRAYSCALE: lambda: f.rgb_to_grayscale(tensor, 3),
        Op.POSTERIZE: lambda: f.posterize(tensor, first),
        Op.SOLARIZE: lambda: f.solarize(tensor, first),
        Op.AUTOCONTRAST: lambda: f.autocontrast(tensor),
        Op.EQUALIZE: lambda: f.equalize(tensor),
        Op.SHEAR_X: lambda: f.affine(picture, **still | {"shear": [tilt, 0.0]}, center=[0, 0]),
        Op.SHEAR_Y: lambda: f.affine(picture, **still | {"shear": [0.0, tilt]}, center=[0, 0]),
        Op.TRANSLATE_X: lambda: f.affine(picture, **still | {"translate": [round(share * width), 0]}),
        Op.TRANSLATE_Y: lambda: f.affine(picture, **still | {"translate": [0, round(share * height)]}),
        Op.ROTATE: lambda: f.rotate(picture, first / DEGREE, **nearest),
        Op.VFLIP: lambda: f.vflip(tensor),
    }
    found = calls[op]()
    return np.asarray(found) if isinstance(found, Image.Image) else found.permute(1, 2, 0).numpy()


# what torchvision has none of is in test_pixel_ops.py and test_detection_views.py
@pytest.mark.parametrize("op", sorted(set(Op) - {Op.ERASE, Op.FILL, Op.AFFINE, Op.HSV}))
def test_each_op_is_torchvisions_with_the_realised_magnitude(op: Op):
    """Point ops within one level, geometric ones in all but one pixel of two hundred."""
    rng = np.random.default_rng(op)
    for seed in range(20):
        image = picture(48, seed) if seed % 2 else photograph(48, seed)
        arguments = [int(rng.integers(low, high + 1)) for low, high in INSTRUCTIONS[op].limits]
        if op in (Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.SHARPNESS):
            arguments = [int(rng.integers(0, 2 * FACTOR))]
        elif op == Op.HUE:
            arguments = [int(rng.integers(-127, 128))]
        elif op == Op.SOLARIZE:
            arguments = [int(rng.integers(0, 256))]
        mine, theirs = replayed(image, op, *arguments), by_torchvision(image, op, *arguments)
        off = np.abs(mine.astype(int) - theirs.astype(int))
        if op in (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE):
            assert (off.max(axis=2) > 0).mean() < 1 / 200, arguments
        else:
            assert off.max() <= 1, arguments


def photograph(side: int, seed: int) -> np.ndarray:
    """Something smooth, with few of the 256 values."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(30, 200, (4, 4, 3), np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BILINEAR))


def test_color_jitter_draws_what_torchvisions_does():
    torch, transforms = pytest.importorskip("torch"), pytest.importorskip("torchvision.transforms")
    recipe = Recipe("color_jitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)", 0)
    ours: list[dict[int, float]] = []
    orders = []
    for i in range(3000):
        ops = recipe.view(str(i), 0, 8, 8).ops
        orders.append(ops[::2])
        ours.append(dict(zip(ops[::2], ops[1::2], strict=True)))
    torch.manual_seed(0)
    draw = transforms.ColorJitter.get_params
    theirs = [draw((0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1))[1:] for _ in range(3000)]
    for i, (op, unit) in enumerate([(1, FACTOR), (2, FACTOR), (3, FACTOR), (5, 255)]):
        mine = np.array([drawn[op] / unit for drawn in ours])
        other = np.array([drawn[i] for drawn in theirs])
        spread = np.ptp(other)
        for percent in (0, 10, 50, 90, 100):
            assert abs(np.percentile(mine, percent) - np.percentile(other, percent)) < 0.05 * spread
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24 and min(counts) > 80 and max(counts) < 180


def test_erase_draws_what_torchvisions_does():
    torch, transforms = pytest.importorskip("torch"), pytest.importorskip("torchvision.transforms")
    recipe = Recipe("erase(p=1)", 0)
    views = [recipe.view(str(i), 0, 60, 40) for i in range(3000)]
    ours = np.array([v.ops[1:] for v in views]) * (60, 40, 60, 40) / FRACTION
    assert np.allclose(ours, np.round(ours), atol=1e-2)
    torch.manual_seed(0)
    image, draw = torch.zeros(3, 40, 60), transforms.RandomErasing.get_params
    boxes = [draw(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(3000)]
    theirs = np.array([(x, y, x + w, y + h) for y, x, h, w in boxes])
    for percent in (10, 50, 90):
        assert (
            np.abs(np.percentile(ours, percent, axis=0) - np.percentile(theirs, percent, axis=0)).max() < 2.5
        )


def test_erase_happens_as_often_as_it_says():
    recipe = Recipe("erase(p=0.3)", 0)
    share = np.mean([any(recipe.view(str(i), 0, 32, 32).ops) for i in range(2000)])
    assert 0.26 < share < 0.34


@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
def test_rand_augment_draws_from_torchvisions_space(magnitude: int):
    transforms = pytest.importorskip("torchvision.transforms")
    space = transforms.RandAugment()._augmentation_space(31, (331, 331))
    recipe = Recipe(f"rand_augment(n=1, magnitude={magnitude})", 0)
    drawn = [recipe.view(str(i), 0, 331, 331).ops for i in range(2800)]
    names = {
        Op.NOTHING: ("Identity", 0, 1), Op.SHEAR_X: ("ShearX", 0, FRACTION), Op.SHEAR_Y: ("ShearY", 0, FRACTION),
        Op.TRANSLATE_X: ("TranslateX", 0, FRACTION / 331), Op.TRANSLATE_Y: ("TranslateY", 0, FRACTION / 331),
        Op.ROTATE: ("Rotate", 0, DEGREE), Op.BRIGHTNESS: ("Brightness", 1, FACTOR), Op.SATURATION: ("Color", 1, FACTOR),
        Op.CONTRAST: ("Contrast", 1, FACTOR), Op.SHARPNESS: ("Sharpness", 1, FACTOR), Op.POSTERIZE: ("Posterize", 0, 1),
        Op.SOLARIZE: ("Solarize", 0, 1), Op.AUTOCONTRAST: ("AutoContrast", 0, 1), Op.EQUALIZE: ("Equalize", 0, 1),
    }  # fmt: skip
    assert {name for name, _, _ in names.values()} == set(space)
    for op, (name, zero, unit) in names.items():
        magnitudes, signed = space[name]
        wanted = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
        found = {argument for code, argument in drawn if code == op}
        expected = {zero + sign * wanted for sign in ((1, -1) if signed else (1,))}
        assert sorted(a / unit for a in found) == pytest.approx(
            sorted(expected), abs=max(0.6 / unit, 0.6 * (unit == 1))
        )
        assert 140 < sum(code == op for code, _ in drawn) < 260, name
