"""Where a box is in a view: against painted marks that are found again, torchvision, and itself there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from softcache import geometry
from softcache.errors import DamageError, SpecError
from softcache.geometry import matrix, seen, to_source, to_view
from softcache.recipe import Recipe, View, render
from softcache.recipe.opcodes import DEGREE, FRACTION, Op, filled
from softcache.recipe.replay import instructions

# what moves content, alone and together
MOVING = [
    "identity",
    "crop(60, pad=9)|flip",
    "random_resized_crop(64)|flip",
    "letterbox((96, 80))",
    "letterbox(120, align=top_left)|flip",
    "letterbox(300, upscale=False)",
    "vflip(p=1)|flip",
    "vflip|crop(50)|flip|center_crop(40)",
    "zoom_out(p=1)|flip",
    "letterbox(128)|flip|random_affine",
    "random_affine(degrees=30, scale=0.2, translate=0.1)",
    "letterbox(128)|flip|vflip|random_affine(degrees=180, translate=0.2, scale=0.5, shear=20)",
    "flip|random_affine(shear=40, scale=0)|rand_augment(n=2, magnitude=20)",
    "letterbox(90)|vflip|rand_augment(n=2, magnitude=9)",
]
# of RandAugment's fourteen only those that leave colours: marks are found by theirs
STILL = {Op.FILL, Op.VFLIP, Op.AFFINE, Op.NOTHING}
STILL |= {Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE}

coordinates = st.floats(-500, 1500)


@st.composite
def boxes(draw: st.DrawFn, most: int = 5) -> np.ndarray:
    rows = draw(
        st.lists(st.tuples(coordinates, coordinates, st.floats(0.1, 400), st.floats(0.1, 400)), max_size=most)
    )
    return np.array([(x, y, x + w, y + h) for x, y, w, h in rows]).reshape(-1, 4)


def plain(width: int, height: int, *ops: int, flip: bool = False) -> View:
    return View(0, 0, width, height, width, height, flip, ops)


# --- painted, rendered and found again ----------------------------------------------------------


def painted(height: int, width: int, marks: np.ndarray) -> np.ndarray:
    """Black, with marks ``(3, 4)`` xyxy in red, green and blue."""
    image = np.zeros((height, width, 3), np.uint8)
    for channel, (left, top, right, bottom) in enumerate(marks.astype(int)):
        image[top:bottom, left:right, channel] = 255
    return image


def middles(pixels: np.ndarray) -> np.ndarray:
    """Where the marks' middles are, float64 ``(3, 2)`` in pixels; grey counts for nothing, NaN where there is no mark."""
    found = []
    height, width = pixels.shape[:2]
    for channel in range(3):
        others = np.delete(pixels, channel, axis=2).max(axis=2).astype(np.float64)
        weight = (pixels[:, :, channel] - others).clip(0)
        total = weight.sum() or np.nan
        found.append(
            (
                (weight.sum(axis=0) @ (np.arange(width) + 0.5)) / total,
                (weight.sum(axis=1) @ (np.arange(height) + 0.5)) / total,
            )
        )
    return np.array(found)


@pytest.mark.parametrize("spec", MOVING)
def test_a_mark_is_rendered_where_the_matrix_says(spec: str):
    recipe, rng, checked = Recipe(spec, 5), np.random.default_rng(0), 0
    for trial in range(40):
        height, width = rng.integers(70, 200, 2)
        view = recipe.view("a", trial, int(width), int(height))
        stages = parts(view)
        if not {code for code, _ in stages} <= STILL:
            continue
        low = rng.uniform(0, (width - 12, height - 12), (3, 2)).astype(int)
        marks = np.hstack([low, low + 12])
        apart = np.abs(low[:, None] - low[None]).max(axis=2)[np.triu_indices(3, 1)]
        for size in ((160, 160), (80, 120), (111, 53)):
            affine = matrix(view, size)
            inside = np.logical_and.reduce([shown(stage, marks, size) for _, stage in stages])
            if not inside.any() or apart.min() < 14:
                continue
            found = middles(render(painted(height, width, marks), view, size))
            expected = ((marks[:, :2] + 6) @ affine[:, :2].T + affine[:, 2]) * size[::-1]
            assert np.abs(found - expected)[inside].max() < 0.6, (trial, size)
            checked += inside.sum()
    assert checked > 10


def parts(view: View) -> list[tuple[int, View]]:
    """Every op with the view as it is after it: what leaves the picture on the way is lost."""
    fill, ops = filled(view.ops)
    first = () if fill is None else (Op.FILL, fill)
    found, at = [(int(Op.FILL), replace(view, ops=first))], 0
    for instruction, _ in instructions(ops):
        code, at = ops[at], at + 1 + len(instruction.limits)
        found.append((code, replace(view, ops=(*first, *ops[:at]))))
    return found


def shown(view: View, marks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which marks are wholly in the picture."""
    affine = matrix(view, size)
    corners = marks[:, [[0, 1], [2, 1], [0, 3], [2, 3]]] @ affine[:, :2].T + affine[:, 2]
    return np.asarray(((corners > 0.03) & (corners < 0.97)).all(axis=(1, 2)))


@pytest.mark.parametrize("spec", MOVING[:10])
def test_a_painted_box_is_found_within_a_pixel(spec: str):
    """Edges this time, of views that are rectangles."""
    rng, checked = np.random.default_rng(1), 0
    recipe = Recipe(spec, 2)
    for trial in range(40):
        height, width = rng.integers(70, 200, 2)
        low = rng.integers(0, (width - 30, height - 30))
        box = np.array([[*low, *(low + rng.integers(10, 30, 2))]], np.float64)
        image = painted(height, width, np.vstack([box, np.zeros((2, 4))]))
        view = recipe.view("b", trial, int(width), int(height))
        for size in ((160, 160), (90, 200)):
            expected = to_view(view, box)[0]
            if expected.min() < 0 or expected.max() > 1:
                continue
            pixels = render(image, view, size).astype(int)
            red = pixels[:, :, 0] - pixels[:, :, 1] > 127
            y, x = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
            if not len(x) or not len(y):
                assert ((expected[2:] - expected[:2]) * size[::-1]).min() < 2
                continue
            found = np.array([x[0], y[0], x[-1] + 1, y[-1] + 1])
            assert np.abs(found - expected * [size[1], size[0], size[1], size[0]]).max() <= 1
            checked += 1
    assert checked > 3


# --- there and back -----------------------------------------------------------------------------


def u16(unit: np.ndarray) -> np.ndarray:
    """As boxes are stored: fixed point over [-0.5, 1.5]."""
    return np.round((unit.clip(-0.5, 1.5) + 0.5) / 2 * 65535) / 65535 * 2 - 0.5


@pytest.mark.parametrize(
    "spec", [s for s in MOVING if "degrees" not in s and "shear" not in s and "rand_" not in s]
)
@given(xyxy=boxes(), id=st.text(max_size=3), width=st.integers(60, 4000), height=st.integers(60, 4000))
def test_there_and_back_is_the_same_box(spec: str, xyxy: np.ndarray, id: str, width: int, height: int):
    view = Recipe(spec, 0).view(id, 3, width, height)
    unit = to_view(view, xyxy)
    np.testing.assert_allclose(to_source(view, unit), xyxy, rtol=0, atol=1e-9)
    held = ((unit >= -0.5) & (unit <= 1.5)).all(axis=1)
    again = to_view(view, to_source(view, u16(unit[held])))
    assert np.abs(again - unit[held]).max(initial=0) * 640 <= 0.02


@pytest.mark.parametrize("spec", [s for s in MOVING if "degrees" in s or "shear" in s or "rand_" in s])
@given(id=st.text(max_size=3), width=st.integers(60, 2000), height=st.integers(60, 2000))
def test_points_of_a_turned_view_come_back_and_boxes_enclose(spec: str, id: str, width: int, height: int):
    view = Recipe(spec, 0).view(id, 3, width, height)
    points = np.random.default_rng(0).uniform(-10, 2000, (20, 2))
    boxes = np.hstack([points, points + 20])
    unit = to_view(view, boxes, (64, 80))
    back = to_source(view, unit, (64, 80))
    assert (back[:, :2] <= boxes[:, :2] + 1e-9).all() and (back[:, 2:] >= boxes[:, 2:] - 1e-9).all()
    dots = np.hstack([points, points])
    np.testing.assert_allclose(
        to_source(view, to_view(view, dots, (64, 80)), (64, 80)), dots, rtol=0, atol=1e-7
    )


def test_one_pixel_and_very_flat_images():
    dot = to_view(Recipe("letterbox(640)", 0).view("a", 0, 1, 1), np.array([[0, 0, 1, 1]]))
    np.testing.assert_array_equal(dot, [[0, 0, 1, 1]])
    for width, height in ((3000, 40), (40, 3000), (1, 500)):
        view = Recipe("letterbox(640)", 0).view("a", 0, width, height)
        unit = to_view(view, np.array([[0, 0, width, height]]))
        assert unit.min() >= 0 and unit.max() <= 1 and (unit[:, 2:] - unit[:, :2]).max() == 1
        assert render(np.full((height, width, 3), 200, np.uint8), view, (320, 320)).shape == (320, 320, 3)


# --- torchvision --------------------------------------------------------------------------------


def tv(box: np.ndarray, height: int, width: int):
    tensors = pytest.importorskip("torchvision.tv_tensors")
    import torch

    return tensors.BoundingBoxes(
        torch.from_numpy(box).double(), format=tensors.BoundingBoxFormat.XYXY, canvas_size=(height, width)
    )


@settings(max_examples=20)
@given(xyxy=boxes(), angle=st.integers(-180 * DEGREE, 180 * DEGREE), share=st.floats(-0.3, 0.3))
def test_boxes_move_as_torchvisions(xyxy: np.ndarray, angle: int, share: float):
    f = pytest.importorskip("torchvision.transforms.v2.functional")
    height, width = 320, 480
    given = tv(xyxy, height, width)
    zero = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "center": [0.0, 0.0]}
    lean = float(np.degrees(np.arctan(share * width / height)))
    wide, high = round(share * width), round(share * height)
    cases = [
        (plain(width, height, flip=True), f.horizontal_flip(given)),
        (plain(width, height, Op.VFLIP), f.vertical_flip(given)),
        (plain(width, height, Op.ROTATE, angle), f.rotate(given, angle / DEGREE)),
        (
            plain(width, height, Op.SHEAR_X, round(share * FRACTION)),
            f.affine(given, **zero | {"shear": [lean, 0.0]}),
        ),
        (
            plain(width, height, Op.TRANSLATE_X, round(share * FRACTION)),
            f.affine(given, **zero | {"translate": [wide, 0]}),
        ),
        (
            plain(width, height, Op.TRANSLATE_Y, round(share * FRACTION)),
            f.affine(given, **zero | {"translate": [0, high]}),
        ),
    ]
    for view, expected in cases:
        moved = to_view(view, xyxy, (height, width)) * [width, height, width, height]
        # torchvision cuts what leaves the picture, and a matrix here is in steps of 1/32768 a pixel
        np.testing.assert_allclose(
            clamped(moved, height, width), clamped(expected.numpy(), height, width), atol=0.1
        )


def clamped(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return boxes.reshape(-1, 4).clip(0, [width, height, width, height])


@given(xyxy=boxes(), id=st.text(max_size=3))
def test_boxes_of_a_resized_crop_are_torchvisions(xyxy: np.ndarray, id: str):
    f = pytest.importorskip("torchvision.transforms.v2.functional")
    view = Recipe("random_resized_crop((200, 300))", 1).view(id, 0, 480, 320)
    expected = f.resized_crop(tv(xyxy, 320, 480), view.y, view.x, view.height, view.width, [200, 300])
    moved = to_view(view, xyxy) * [300, 200, 300, 200]
    np.testing.assert_allclose(clamped(moved, 200, 300), clamped(expected.numpy(), 200, 300), atol=1e-6)


# --- what is seen of them -----------------------------------------------------------------------


def test_seen_says_what_is_left_of_each_box():
    view = View(100, 50, 200, 100, 640, 480, False)
    xyxy = np.array(
        [
            [100, 50, 300, 150],  # the whole view
            [0, 50, 200, 150],  # half of it
            [0, 0, 110, 51],  # less than a tenth
            [400, 300, 500, 400],  # elsewhere
            [120, 60, 120, 90],  # no area
            [150, 90, 140, 100],  # the wrong way round
            [np.nan, 60, 140, 90],
            [-np.inf, 60, np.inf, 90],
            [150, 60, 250, 160],  # nine tenths
        ]
    )
    found = seen(view, xyxy)
    assert found.index.tolist() == [0, 1, 8]
    np.testing.assert_allclose(found.visible, [1, 0.5, 0.9])
    np.testing.assert_allclose(found.boxes, [[0, 0, 1, 1], [0, 0, 0.5, 1], [0.25, 0.1, 0.75, 1]])
    assert seen(view, xyxy, min_visible=0.6).index.tolist() == [0, 8]
    assert seen(view, xyxy, min_visible=0).index.tolist() == [0, 1, 2, 8]
    assert seen(view, np.zeros((0, 4))).boxes.shape == (0, 4)


@given(xyxy=boxes(), id=st.text(max_size=3))
def test_the_visible_share_is_that_of_counted_places(xyxy: np.ndarray, id: str):
    """Brute force: places spread over each box, and how many of them the view shows."""
    assume(len(xyxy))
    view = Recipe("letterbox(64)|flip|random_affine(scale=0.5)", 0).view(id, 0, 640, 480)
    found = seen(view, xyxy, min_visible=0)
    grid = (np.mgrid[:40, :40].reshape(2, -1).T + 0.5) / 40
    for i, box in enumerate(xyxy):
        places = box[:2] + grid * (box[2:] - box[:2])
        affine = matrix(view)
        unit = places @ affine[:, :2].T + affine[:, 2]
        share = ((unit >= 0) & (unit <= 1)).all(axis=1).mean()
        at = np.flatnonzero(found.index == i)
        assert abs((found.visible[at[0]] if len(at) else 0) - share) < 0.06


# --- what is refused ----------------------------------------------------------------------------


def test_ops_that_count_in_pixels_ask_for_the_size():
    view = plain(10, 10, Op.ROTATE, 900)
    with pytest.raises(SpecError, match="say size="):
        to_view(view, np.zeros((1, 4)))
    assert to_view(view, np.array([[5, 5, 5, 5]]), (10, 10)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (np.zeros((4, 2)), r"boxes are \(n, 4\).*these are \(4, 2\)"),
        (np.zeros(4), r"these are \(4,\)"),
        (np.zeros((2, 2, 4)), r"these are \(2, 2, 4\)"),
        ("boxes", "these are 'boxes'"),
    ],
)
def test_what_are_no_boxes_is_refused(wrong: Any, told: str):
    for move in (to_view, to_source, seen):
        with pytest.raises(SpecError, match=told):
            move(plain(10, 10), wrong)
    assert to_view(plain(10, 10), np.array([])).shape == (0, 4)


def test_a_view_that_is_a_line_is_damage():
    with pytest.raises(DamageError, match="no recipe draws"):
        matrix(plain(10, 10, Op.AFFINE, 100, 100, 0, 100, 100, 0))
    with pytest.raises(DamageError, match="no recipe draws"):
        matrix(plain(10, 10, 77))


def test_what_is_a_rectangle():
    assert geometry.rectangular(plain(9, 9, Op.FILL, 114, Op.BRIGHTNESS, 3, flip=True))
    for ops in ((Op.VFLIP,), (Op.AFFINE, 1, 0, 0, 0, 1, 0), (Op.NOTHING, Op.TRANSLATE_X, 4)):
        assert not geometry.rectangular(plain(9, 9, *ops))
