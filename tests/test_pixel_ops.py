"""Pixel ops: drawn by the recipe, kept in the view, replayed bit for bit, at any size."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import softcache as sc
from softcache import canary
from softcache.errors import DamageError, SpecError
from softcache.identity import RecipeId
from softcache.recipe import OPS, Recipe, View, render
from softcache.recipe.opcodes import DEGREE, FACTOR, FRACTION, GREY, Op
from softcache.recipe.pixelop import PixelOp
from softcache.recipe.replay import INSTRUCTIONS, instructions
from softcache.source import Source
from softcache.testing import ToyImages

RECIPES = [
    "random_resized_crop(8)|flip|grayscale(p=0.4)|grayscale",
    "color_jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.5)",
    "crop(12, pad=4)|rand_augment(n=3, magnitude=30)|erase",
    "resize(16)|cutout(5)|solarize(p=0.5)",
]

KNOWN = {
    "color_jitter(brightness=0.4, hue=0.1)": (1, 3077, 5, -5),
    "rand_augment(n=3)|erase(p=1)": (15, -900, 8, 179, 0, 0, 16, 21503, 16384, 26623, 30719),
    "cutout(8)|grayscale(p=1)|solarize(p=1)": (16, 15360, 17407, 23551, 25599, 6, 8, 128),
}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def whole(height: int, width: int, *ops: int) -> View:
    return View(0, 0, width, height, width, height, False, ops)


def replayed(image: np.ndarray, *ops: int) -> np.ndarray:
    return render(image, whole(*image.shape[:2], *ops), image.shape[:2])


# --- what is stored -----------------------------------------------------------------------------


class Echo:
    """Its logits are a digest of the pixels it was shown."""

    input_spec = {"size": (8, 8)}  # noqa: RUF012

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return np.stack([digest(row) for row in pixels])


def digest(pixels: np.ndarray) -> np.ndarray:
    found = hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=12).digest()
    return np.frombuffer(found, np.uint8).astype(np.float32)


def build(out: Path, recipe: str, **options: Any) -> sc.Cache:
    small = {"views": 3, "block_rows": 8, "batch": 4, "progress": False, "ignore_labels": True}
    return sc.build(out, source=ToyImages(20), teacher=Echo(), recipe=recipe, **small | options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_student_is_shown_what_the_teacher_saw(tmp_path: Path, recipe: str):
    cache, source = build(tmp_path / "c", recipe), Source(ToyImages(20))
    made, samples = Recipe(recipe, 0), np.arange(20)
    drawn = set()
    for k in range(3):
        said = cache.read(k, samples)["logits"].values
        for i, view in enumerate(cache.read_views(k, samples)):
            image = source.image(i)
            assert view == made.view(cache.ids[i], k, image.shape[1], image.shape[0])
            assert len(view.ops) == made.parameters == cache.parameters
            assert np.array_equal(digest(render(image, view, (8, 8))), said[i])
            drawn.add(view.ops)
    assert len(drawn) > 1
    assert "pixels equal" in canary.pair(cache, source).message
    assert sc.verify(cache, read_data=True) == []


def test_ops_are_an_array_of_their_own_that_zarr_reads(tmp_path: Path):
    cache = build(tmp_path / "c", RECIPES[0])
    group: Any = zarr.open(str(cache.path), mode="r")
    array = group["view/ops"]
    assert array.shape == (3, 20, 2) and array.dtype == np.int16
    ops = array[1][cache.grid.positions(np.arange(20))]
    assert [tuple(row) for row in ops.tolist()] == [v.ops for v in cache.read_views(1, np.arange(20))]
    assert cache.identity["recipe"]["parameters"] == 2


def test_without_pixel_ops_nothing_is_added_to_a_cache(tmp_path: Path):
    cache = build(tmp_path / "c", "random_resized_crop(8)|flip")
    assert "parameters" not in cache.identity["recipe"]
    assert not (cache.path / "view" / "ops").exists() and not (cache.path / "canary" / "ops").exists()


def test_numbers_on_disk_mean_for_ever_what_they_meant():
    # stored caches depend on these: a change here needs a new op version, or a new opcode
    assert (FACTOR, FRACTION, DEGREE, GREY) == (4096, 32767, 100, 128)
    names = "NOTHING BRIGHTNESS CONTRAST SATURATION SHARPNESS HUE GRAYSCALE POSTERIZE SOLARIZE AUTOCONTRAST EQUALIZE"
    names += " SHEAR_X SHEAR_Y TRANSLATE_X TRANSLATE_Y ROTATE ERASE FILL VFLIP AFFINE HSV"
    assert {op.name: int(op) for op in Op} == {name: code for code, name in enumerate(names.split())}


@pytest.mark.parametrize(("spec", "ops"), KNOWN.items(), ids=KNOWN)
def test_a_known_view_stays_what_it_is(spec: str, ops: tuple[int, ...]):
    assert Recipe(spec, 0).view("a", 0, 32, 32).ops == ops


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ops",
    [
        (21,),
        (17,),
        (17, 256),
        (0, 17, 3),
        (20, 0, -1, 0),
        (19, 1, 2),
        (-1,),
        (1,),
        (1, -1),
        (0, 7, 0),
        (7, 9),
        (5, 129),
        (16, 1, 2, 3),
        (16, 9, 0, 8, 9),
        (15, 18001),
    ],
    ids=str,
)
def test_ops_that_no_recipe_draws_are_damage(ops: tuple[int, ...]):
    with pytest.raises(DamageError, match="which no recipe draws"):
        replayed(picture(8, 8), *ops)


def test_geometry_after_pixels_is_refused():
    with pytest.raises(SpecError, match="'flip' comes after 'grayscale'"):
        Recipe("crop(4)|grayscale|flip", 0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("color_jitter", "changes nothing"),
        ("color_jitter(brightness=-1)", "0 to 6"),
        ("color_jitter(hue=0.6)", "0 to 0.5"),
        ("color_jitter(contrast=True)", "number"),
        ("rand_augment(n=0)", "at least 1"),
        ("rand_augment(magnitude=31)", "at most 30"),
        ("rand_augment(n=513)", "1,026 numbers; at most 1,024"),
        ("erase(p=2)", "probability"),
        ("erase(scale=(0, 0.3))", "0 < low"),
        ("erase(scale=(0.1, 1.3))", "at most 1"),
        ("erase(ratio=2)", "low, high"),
        ("cutout", "size"),
        ("cutout(0)", "at least 1"),
        ("solarize(threshold=257)", "at most 256"),
        ("grayscale(p=no)", "probability"),
    ],
)
def test_specs_that_cannot_be_understood(spec: str, says: str):
    with pytest.raises(SpecError, match=says):
        Recipe(spec, 0)


def test_a_manifest_cannot_ask_for_more_numbers_than_a_recipe_draws():
    recipe = Recipe("identity", 0).identity() | {"parameters": 1025}
    with pytest.raises(ValueError, match="parameters"):
        RecipeId.model_validate(recipe)


# --- any view, any numbers ----------------------------------------------------------------------

SPECS = {
    "color_jitter": "color_jitter(brightness=0.8, contrast=6, saturation=1, hue=0.5)",
    "cutout": "cutout((7, 40))",
    "erase": "erase(p=0.9, scale=(0.01, 1), ratio=(0.1, 10))",
    "grayscale": "grayscale(p=0.5)",
    "hsv_jitter": "hsv_jitter(h=0.5, s=1, v=1)",
    "rand_augment": "rand_augment(n=4, magnitude=30)",
    "solarize": "solarize(p=0.5)",
}


def test_every_pixel_op_is_tested():
    assert set(SPECS) == {name for name, op in OPS.items() if issubclass(op, PixelOp)}
    assert set(INSTRUCTIONS) == set(Op)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@given(id=st.text(max_size=5), k=st.integers(0, 99), sides=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_view_survives_its_arrays_and_renders_at_any_size(
    spec: str, id: str, k: int, sides: tuple[int, int]
):
    height, width = sides
    recipe = Recipe(f"{spec}|{spec}", 3)
    view = recipe.view(id, k, width, height)
    stored = {name: np.array(row, np.int16) for name, row in view.fields().items()}
    again = View.unpack(stored["geometry"].tolist(), stored["ops"].tolist())
    assert again == view and len(view.ops) == recipe.parameters
    image = picture(height, width)
    before = image.copy()
    for size in ((height, width), (13, 9)):
        assert render(image, again, size).shape == (*size, 3)
        assert np.array_equal(render(image, again, size), render(image, view, size))
    assert np.array_equal(image, before)


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, ...]]:
    codes = draw(st.lists(st.sampled_from(sorted(INSTRUCTIONS)), max_size=6))
    return [(c, *(draw(st.integers(*limits)) for limits in INSTRUCTIONS[c].limits)) for c in codes]


@given(programs())
def test_any_row_of_instructions_is_read_as_it_was_written(program: list[tuple[int, ...]]):
    row = [number for step in program for number in step]
    assert [arguments for _, arguments in instructions(row)] == [step[1:] for step in program]
    assert [i for i, _ in instructions(row)] == [INSTRUCTIONS[step[0]] for step in program]


@given(st.lists(st.integers(-32768, 32767), max_size=12))
def test_any_numbers_at_all_are_rendered_or_refused(numbers: list[int]):
    image = picture(6, 5)
    try:
        assert replayed(image, *numbers).shape == image.shape
    except DamageError as e:
        assert "rebuild the cache" in str(e)


# --- the arithmetic, written out ----------------------------------------------------------------


def grey_of(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 in 16-bit fixed point."""
    r, g, b = np.moveaxis(image.astype(np.int64), -1, 0)
    return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16


def blend(start: np.ndarray | int, image: np.ndarray, factor: int) -> np.ndarray:
    """floor(start + factor (image - start)), in integers."""
    value = (start * (FACTOR - factor) + factor * image.astype(np.int64)) // FACTOR
    return np.clip(value, 0, 255).astype(np.uint8)


def smooth(image: np.ndarray) -> np.ndarray:
    """A 3x3 mean with the middle five times, rounded; the border as it is."""
    out, wide = image.astype(np.int64), image.astype(np.int64)
    if min(image.shape[:2]) > 2:
        height, width = image.shape[:2]
        total = 4 * wide[1:-1, 1:-1] + sum(
            wide[y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3)
        )
        out[1:-1, 1:-1] = (2 * total + 13) // 26
    return out


factors = st.integers(0, FRACTION)
images = st.builds(picture, st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))


@given(image=images, factor=factors)
def test_brightness_contrast_saturation_and_sharpness_are_integer_arithmetic(image: np.ndarray, factor: int):
    grey = grey_of(image)
    mean = (2 * int(grey.sum()) + grey.size) // (2 * grey.size)
    assert np.array_equal(replayed(image, Op.BRIGHTNESS, factor), blend(0, image, factor))
    assert np.array_equal(replayed(image, Op.CONTRAST, factor), blend(mean, image, factor))
    assert np.array_equal(replayed(image, Op.SATURATION, factor), blend(grey[:, :, None], image, factor))
    assert np.array_equal(replayed(image, Op.SHARPNESS, factor), blend(smooth(image), image, factor))


def sampled(image: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Nearest neighbour with an integer matrix in steps of 1/32768, pixel middles at one half."""
    height, width = image.shape[:2]
    a, b, c, d, e, f = matrix
    y, x = np.mgrid[:height, :width].astype(np.int64)
    from_x = (a * (2 * x + 1) + b * (2 * y + 1) + 2 * c) // (2 << 15)
    from_y = (d * (2 * x + 1) + e * (2 * y + 1) + 2 * f) // (2 << 15)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    out = np.zeros_like(image)
    out[inside] = image[from_y[inside], from_x[inside]]
    return out


def halves_up(numerator: int, denominator: int) -> int:
    return math.floor((2 * numerator + denominator) / (2 * denominator))


@given(image=images, share=st.integers(-FRACTION, FRACTION), angle=st.integers(-180 * DEGREE, 180 * DEGREE))
def test_shear_translate_and_rotate_are_integer_arithmetic(image: np.ndarray, share: int, angle: int):
    height, width = image.shape[:2]
    one = 1 << 15
    matrices = {
        Op.SHEAR_X: (one, halves_up(share * width * one, FRACTION * height), 0, 0, one, 0),
        Op.SHEAR_Y: (one, 0, 0, halves_up(share * height * one, FRACTION * width), one, 0),
        Op.TRANSLATE_X: (one, 0, -one * halves_up(share * width, FRACTION), 0, one, 0),
        Op.TRANSLATE_Y: (one, 0, 0, 0, one, -one * halves_up(share * height, FRACTION)),
    }
    for op, matrix in matrices.items():
        assert np.array_equal(replayed(image, op, share), sampled(image, matrix)), op
    cos, sin = (round(t(math.radians(angle / DEGREE)) * one) for t in (math.cos, math.sin))
    # twice the image, so that its middle is a whole number
    c, f = (one * width - cos * width + sin * height), (one * height - sin * width - cos * height)
    y, x = np.mgrid[:height, :width].astype(np.int64)
    from_x = (cos * (2 * x + 1) - sin * (2 * y + 1) + c) // (2 * one)
    from_y = (sin * (2 * x + 1) + cos * (2 * y + 1) + f) // (2 * one)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    expected = np.zeros_like(image)
    expected[inside] = image[from_y[inside], from_x[inside]]
    assert np.array_equal(replayed(image, Op.ROTATE, angle), expected)


def test_no_angle_is_near_enough_to_a_tie_that_a_machines_cosine_could_decide():
    """Machines' sines differ in their last bits, by 1e-16; a thousand million times that must not matter."""
    angles = np.radians(np.arange(-180 * DEGREE, 180 * DEGREE + 1) / DEGREE)
    for values in (np.cos(angles) * 2**15, np.sin(angles) * 2**15):
        assert np.abs(values % 1 - 0.5).min() > 1e-7


# --- free of resolution -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["erase(p=1)", "cutout(9)", "cutout((3, 30))"])
def test_a_box_is_the_same_part_at_every_size(spec: str):
    recipe, black = Recipe(spec, 0), np.zeros((32, 32, 3), np.uint8)
    for k in range(40):
        view = recipe.view("a", k, 32, 32)
        small, large, odd = (render(black, view, (n, n))[:, :, 0] for n in (32, 64, 48))
        assert set(np.unique(small)) <= {0, GREY} and (small == GREY).any()
        assert np.array_equal(large, small.repeat(2, 0).repeat(2, 1))
        for axis in (0, 1):
            at32, at48 = np.flatnonzero((small == GREY).any(axis)), np.flatnonzero((odd == GREY).any(axis))
            assert abs(at48[0] - 1.5 * at32[0]) <= 0.5 and abs(at48[-1] + 1 - 1.5 * (at32[-1] + 1)) <= 0.5


@pytest.mark.parametrize("op", [Op.TRANSLATE_X, Op.TRANSLATE_Y])
@pytest.mark.parametrize("pixels", [-20, -3, 0, 1, 14])
def test_a_translation_is_the_same_part_at_every_size(op: Op, pixels: int):
    share = round(pixels / 32 * FRACTION)
    small = picture(32, 32)
    large = small.repeat(2, 0).repeat(2, 1)
    moved = replayed(small, op, share)
    assert np.array_equal(replayed(large, op, share), moved.repeat(2, 0).repeat(2, 1))
    expected = np.zeros_like(small)
    along = (slice(max(pixels, 0), 32 + min(pixels, 0)), slice(max(-pixels, 0), 32 + min(-pixels, 0)))
    if op == Op.TRANSLATE_X:
        expected[:, along[0]] = small[:, along[1]]
    else:
        expected[along[0]] = small[along[1]]
    assert np.array_equal(moved, expected)


@pytest.mark.parametrize("op", [Op.SHEAR_X, Op.SHEAR_Y, Op.ROTATE])
@pytest.mark.parametrize("share", [-9000, -1500, 700, 3000, 9830])
def test_shear_and_rotation_are_the_same_geometry_at_twice_the_size(op: Op, share: int):
    y, x = np.mgrid[:128, :128]
    large = np.stack([x + 64, y + 64, (x + y) // 2 + 64], axis=-1).astype(np.uint8)
    small = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
    halved = replayed(large, op, share).reshape(64, 2, 64, 2, 3)
    whole_there = (halved > 0).all(axis=(1, 3, 4)) & (replayed(small, op, share) > 0).all(axis=2)
    off = np.abs(halved.mean(axis=(1, 3)) - replayed(small, op, share))[whole_there]
    assert off.max() <= 3 and whole_there.mean() > 0.5


def test_a_build_at_one_size_is_shown_at_another_with_its_colours(tmp_path: Path):
    """The student's size is not the teacher's: factors, order and boxes are those that were stored."""
    recipe = "crop(8)|color_jitter(brightness=0.5, hue=0.2)|erase(p=1)"
    cache, source = build(tmp_path / "c", recipe), Source(ToyImages(20))
    for i, view in enumerate(cache.read_views(0, np.arange(20))):
        pixels = render(source.image(i), view, (16, 16))
        plain = render(source.image(i), View.unpack(view.pack()), (16, 16))
        assert np.array_equal(replayed(plain, *view.ops), pixels)
        box = (np.array(view.ops[-4:]) * 16 + FRACTION // 2) // FRACTION
        assert (pixels[box[1] : box[3], box[0] : box[2]] == GREY).all()
