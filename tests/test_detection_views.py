"""The views that detectors are trained on: against Ultralytics' arithmetic written out, torchvision, and pixel by pixel."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import softcache as sc
from softcache import canary
from softcache.errors import SpecError
from softcache.geometry import matrix, seen, to_view
from softcache.keyed import draws
from softcache.recipe import Recipe, View, gather, render
from softcache.recipe.opcodes import FACTOR, FRACTION, Op
from softcache.source import Source
from softcache.testing import ToyImages
from softcache.warp import warp

sides = st.integers(1, 60)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Something like a photograph, which survives being resampled twice."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def whole(image: np.ndarray, *ops: int) -> View:
    height, width = image.shape[:2]
    return View(0, 0, width, height, width, height, False, ops)


# --- what is shown outside the image ------------------------------------------------------------


@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    x=st.integers(-30, 30),
    y=st.integers(-30, 30),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    flip=st.booleans(),
    fill=st.integers(0, 255),
    size=st.tuples(sides, sides),
)
def test_a_view_is_the_resized_picture_of_image_and_fill(
    height, width, x, y, rows, columns, flip, fill, size
):
    """The definition, bit for bit: the whole rectangle is put together, and then resampled."""
    image = picture(height, width)
    expected = np.full((rows, columns, 3), fill, np.uint8)
    for row in range(max(y, 0), min(y + rows, height)):
        for column in range(max(x, 0), min(x + columns, width)):
            expected[row - y, column - x] = image[row, column]
    if flip:
        expected = np.ascontiguousarray(expected[:, ::-1])
    for ops in ((Op.FILL, fill), ()) if fill == 0 else ((Op.FILL, fill),):
        view = View(x, y, columns, rows, width, height, flip, ops)
        pixels = render(image, view, (rows, columns))
        assert np.array_equal(pixels, expected) and pixels.flags.c_contiguous
        assert not np.shares_memory(pixels, image)
        resized = Image.fromarray(expected)
        if ops:  # across first
            resized = resized.resize((size[1], rows), Image.Resampling.BILINEAR)
        resized = resized.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        assert np.array_equal(render(image, view, size), np.asarray(resized))


def test_a_fill_is_kept_through_later_geometry_and_stands_first():
    view = Recipe("letterbox(64, fill=7)|crop(32)|flip(p=1)|vflip(p=1)|resize(9)|grayscale(p=1)", 0).view(
        "a", 0, 40, 20
    )
    assert view.ops == (Op.FILL, 7, Op.VFLIP, Op.GRAYSCALE)
    assert Recipe("zoom_out(p=0, fill=9)", 0).view("a", 0, 4, 4).ops == (Op.FILL, 9)
    assert Recipe("random_affine|crop(3)", 0).view("a", 0, 40, 20).ops == ()


# --- letterbox ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def augment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ultralytics' own augmentations, with its settings in a folder of its own and off the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        yield pytest.importorskip(
            "ultralytics.data.augment", reason="needs ultralytics: the extra 'ultralytics'"
        )


def test_what_is_written_out_here_is_what_the_installed_ultralytics_does(augment: Any):
    rng = np.random.default_rng(0)
    for k in range(40):
        height, width = (int(side) for side in rng.integers(1, 900, 2))
        image = np.zeros((height, width, 3), np.uint8)
        said = augment.LetterBox((384, 640), scaleup=bool(k % 2)).get_params({"img": image})
        found = ultralytics(height, width, (384, 640), bool(k % 2))
        assert found == (said["left"], said["top"], *said["new_unpad"])
        options = 45.0, 0.2, 0.4, 8.0  # degrees, translate, scale, shear
        random.seed(k)
        theirs = augment.RandomPerspective(*options).get_params({"img": image})["M"]
        random.seed(k)
        assert [random.uniform(0, 0) for _ in range(2)] == [0, 0]  # its perspective
        mine = perspective(random, *options, width, height)
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-3)


def test_hsv_jitter_looks_like_the_installed_ultralytics(augment: Any):
    image = smooth(60, 80, 5)
    for k in range(8):
        gains = np.random.default_rng(k).uniform(-1, 1, 3) * [0.1, 0.7, 0.4]
        picture = {"img": np.ascontiguousarray(image[:, :, ::-1])}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "uniform", lambda *_, gains=gains: gains)
            theirs = augment.RandomHSV(1, 1, 1)(picture)["img"][:, :, ::-1].astype(int)
        turn, *factors = round(gains[0] * 256), *(round((1 + g) * FACTOR) for g in gains[1:])
        mine = render(image, whole(image, Op.HSV, turn, *factors), (60, 80))
        assert (
            np.abs(mine - theirs).mean() < 2.5
        )  # its hues are whole pairs of degrees, Pillow's 256ths of the circle


def ultralytics(height: int, width: int, size: tuple[int, int], upscale: bool) -> tuple[int, int, int, int]:
    """LetterBox of Ultralytics 8, centred: left, top, width and height of the content."""
    r = min(size[0] / height, size[1] / width)
    if not upscale:
        r = min(r, 1.0)
    new = max(round(width * r), 1), max(round(height * r), 1)
    dw, dh = (size[1] - new[0]) / 2, (size[0] - new[1]) / 2
    return round(dw - 0.1), round(dh - 0.1), *new


def yolox(height: int, width: int, size: tuple[int, int], upscale: bool) -> tuple[int, int, int, int]:
    """preproc of YOLOX."""
    r = min(size[0] / height, size[1] / width)
    if not upscale:
        r = min(r, 1.0)
    return 0, 0, max(int(width * r), 1), max(int(height * r), 1)


@pytest.mark.parametrize(("align", "theirs"), [("center", ultralytics), ("top_left", yolox)])
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    size=st.sampled_from([(640, 640), (416, 416), (384, 640)]),
    upscale=st.booleans(),
)
def test_a_letterbox_shows_the_image_where_theirs_does(align, theirs, height, width, size, upscale):
    left, top, wide, high = theirs(height, width, size, upscale)
    view = Recipe(f"letterbox({size}, align={align}, upscale={upscale})", 0).view("a", 0, width, height)
    found = to_view(view, np.array([[0, 0, width, height]]))[0] * [*size[::-1], *size[::-1]]
    expected = np.array([left, top, left + wide, top + high])
    pixel = np.array(
        [wide / width, high / height] * 2
    )  # both edges of the rectangle are rounded to one of the source
    assert (np.abs(found - expected) <= pixel + 1e-6).all(), (found, expected)


def test_a_letterbox_of_whole_proportions_is_exact():
    image = picture(30, 40)
    view = Recipe("letterbox(80)", 0).view("a", 0, 40, 30)
    assert view.pack() == (0, -5, 40, 40, 40, 30, 0) and view.ops == (Op.FILL, 114)
    pixels = render(image, view, (40, 40))
    assert np.array_equal(pixels[5:35], image)
    assert (pixels[:5] == 114).all() and (pixels[35:] == 114).all()
    small = Recipe("letterbox(80, upscale=False, fill=3)", 0).view("a", 0, 40, 30)
    pixels = render(image, small, (80, 80))
    assert (
        np.array_equal(pixels[25:55, 20:60], image)
        and (pixels[:25] == 3).all()
        and (pixels[:, 60:] == 3).all()
    )


@pytest.mark.parametrize("size", [(640, 640), (320, 320)])
def test_the_fill_reaches_two_pixels_into_a_photograph(shared_data: Path, size: tuple[int, int]):
    """Resampled with its fill around it, a photograph differs at the border only from one that is padded afterwards."""
    off, checked = [], 0
    for file in sorted((shared_data / "coco356" / "images" / "val2017").glob("*.jpg"))[:12]:
        image = np.asarray(Image.open(file).convert("RGB"))
        height, width = image.shape[:2]
        view = Recipe(f"letterbox({size})", 0).view("a", 0, width, height)
        mine = render(image, view, size).astype(int)
        # the same rectangle with the border repeated instead of the fill
        y, x = (np.arange(n) + start for n, start in ((view.height, view.y), (view.width, view.x)))
        wide = image[y.clip(0, height - 1)][:, x.clip(0, width - 1)]
        across = Image.fromarray(wide).resize((size[1], view.height), Image.Resampling.BILINEAR)
        pure = np.asarray(across.resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(int)
        left, top, right, bottom = to_view(view, np.array([[0, 0, width, height]]))[0] * [
            *size[::-1],
            *size[::-1],
        ]
        inner = np.s_[
            int(np.ceil(top)) + 2 * (top > 0) : int(bottom) - 2 * (bottom < size[0]),
            int(np.ceil(left)) + 2 * (left > 0) : int(right) - 2 * (right < size[1]),
        ]
        assert np.array_equal(mine[inner], pure[inner])
        assert (mine[: max(int(top) - 2, 0)] == 114).all() and (mine[:, : max(int(left) - 2, 0)] == 114).all()
        # and theirs: content resized to whole pixels, then padded
        left, top, wide, high = ultralytics(height, width, size, True)
        theirs = np.full((*size, 3), 114)
        content = Image.fromarray(image).resize((wide, high), Image.Resampling.BILINEAR)
        theirs[top : top + high, left : left + wide] = np.asarray(content)
        off.append(np.abs(mine - theirs)[inner].mean())
        checked += 1
    assert checked == 12 and np.mean(off) < 1.5, off


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 2), (3000, 40), (40, 3000), (20000, 10)])
def test_a_letterbox_of_the_oddest_images(width: int, height: int):
    image = np.full((height, width, 3), 255, np.uint8)
    view = Recipe("letterbox(640)", 0).view("a", 0, width, height)
    for side in (640, 320):
        pixels = render(image, view, (side, side))
        share = (pixels > 184).mean()  # the mean of white and the fill
        box = to_view(view, np.array([[0, 0, width, height]]))[0]
        assert abs(share - (box[2] - box[0]) * (box[3] - box[1])) < 3 / side


# --- random_affine ------------------------------------------------------------------------------


def perspective(stream, degrees, translate, scale, shear, width, height) -> np.ndarray:
    """RandomPerspective.affine_transform of Ultralytics 8 without perspective, ``(3, 3)``, on canvas pixels."""
    center, turn, tilt, move = (np.eye(3) for _ in range(4))
    center[0, 2], center[1, 2] = -width / 2, -height / 2
    a = np.radians(stream.uniform(-degrees, degrees))
    s = stream.uniform(1 - scale, 1 + scale)
    turn[:2, :2] = s * np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])  # cv2.getRotationMatrix2D
    tilt[0, 1] = np.tan(np.radians(stream.uniform(-shear, shear)))
    tilt[1, 0] = np.tan(np.radians(stream.uniform(-shear, shear)))
    move[0, 2] = stream.uniform(0.5 - translate, 0.5 + translate) * width
    move[1, 2] = stream.uniform(0.5 - translate, 0.5 + translate) * height
    return move @ tilt @ turn @ center


@pytest.mark.parametrize(
    ("degrees", "translate", "scale", "shear"),
    [(0, 0.1, 0.5, 0), (10, 0.1, 0.5, 2), (180, 0.5, 0.9, 0), (0, 0, 0, 40), (45, 1, 0.2, 10), (0, 0, 0, 0)],
)
@given(k=st.integers(0, 99), width=st.integers(100, 3000), height=st.integers(100, 3000))
def test_an_affine_moves_places_as_ultralytics(degrees, translate, scale, shear, k, width, height):
    spec = f"random_affine(degrees={degrees}, translate={translate}, scale={scale}, shear={shear})"
    view = Recipe(spec, 4).view("a", k, width, height)
    assert bool(view.ops) == bool(degrees or shear)
    theirs = perspective(
        draws(4, "a", k, 0, "random_affine"), degrees, translate, scale, shear, width, height
    )
    points = np.random.default_rng(k).uniform(0, (width, height), (30, 2))
    expected = points @ theirs[:2, :2].T + theirs[:2, 2]
    mine = matrix(view)
    found = (points @ mine[:, :2].T + mine[:, 2]) * [width, height]
    shown = ((expected > 0) & (expected < [width, height])).all(axis=1)
    # the rectangle is rounded to source pixels, of which each is up to ``1 + scale`` pixels large in the view
    assert np.abs(found - expected)[shown].max(initial=0) <= 2 * (1 + scale)


@pytest.mark.parametrize(
    "spec", ["random_affine(degrees=45, scale=0.3)", "random_affine(degrees=180, scale=0, shear=20)"]
)
def test_a_turned_view_looks_as_torch_turns_it(spec: str):
    torch = pytest.importorskip("torch")
    height, width = 120, 150
    image = smooth(height, width)
    given = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double() - 114
    for k in range(4):
        view = Recipe(f"letterbox(({height}, {width}))|{spec}", 0).view("a", k, width, height)
        back = np.linalg.inv(np.vstack([matrix(view) * [[width], [height]], [0, 0, 1]]))
        y, x = np.mgrid[:height, :width] + 0.5
        places = np.stack([x, y, np.ones_like(x)], axis=-1) @ back[:2].T
        grid = torch.from_numpy(places / [width / 2, height / 2] - 1)[None]
        theirs = (
            torch.nn.functional.grid_sample(given, grid, align_corners=False)[0].permute(1, 2, 0).numpy()
            + 114
        )
        mine = render(image, view, (height, width))
        inside = ((places > 6) & (places < [width - 6, height - 6])).all(axis=-1)
        outside = ((places < -6) | (places > [width + 6, height + 6])).any(axis=-1)
        assert np.abs(mine - theirs).mean() < 3
        assert np.abs(mine - theirs)[inside].max() < 24
        assert (mine[outside] == 114).all()


def bilinear(image: np.ndarray, shares: tuple[int, ...], fill: int) -> np.ndarray:
    """AFFINE in integers: matrices in 2**-20 of a pixel, places in 2**-21, levels cut."""
    height, width = image.shape[:2]
    a, b, c, d, e, f = shares
    rounded = lambda n, m: (2 * n + m) // (2 * m)  # noqa: E731
    fine = 1 << 20
    row = [
        rounded(a * fine, FRACTION),
        rounded(b * width * fine, FRACTION * height),
        rounded(c * width * fine, FRACTION),
    ]
    column = [
        rounded(d * height * fine, FRACTION * width),
        rounded(e * fine, FRACTION),
        rounded(f * height * fine, FRACTION),
    ]
    out = np.full_like(image, fill)
    for y in range(height):
        for x in range(width):
            px, py = (m[0] * (2 * x + 1) + m[1] * (2 * y + 1) + 2 * m[2] for m in (row, column))
            if not (0 <= px < width * 2 * fine and 0 <= py < height * 2 * fine):
                continue
            px, py = px - fine, py - fine
            (left, dx), (top, dy) = divmod(px, 2 * fine), divmod(py, 2 * fine)
            at = lambda i, j: image[min(max(i, 0), height - 1), min(max(j, 0), width - 1)].astype(object)  # noqa: E731
            upper = at(top, left) * (2 * fine - dx) + at(top, left + 1) * dx
            lower = at(top + 1, left) * (2 * fine - dx) + at(top + 1, left + 1) * dx
            out[y, x] = (upper * (2 * fine - dy) + lower * dy) // (4 * fine * fine)
    return out


@given(
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    seed=st.integers(0, 99),
    shares=st.tuples(*[st.integers(-FRACTION, FRACTION)] * 6),
    fill=st.integers(0, 255),
)
def test_an_affine_is_integer_arithmetic(height, width, seed, shares, fill):
    image = picture(height, width, seed)
    pixels = render(image, whole(image, Op.FILL, fill, Op.AFFINE, *shares), (height, width))
    assert np.array_equal(pixels, bilinear(image, shares, fill))


# --- vflip, hsv_jitter --------------------------------------------------------------------------


@given(height=sides, width=sides, seed=st.integers(0, 20))
def test_vflips_and_crops_are_exact_on_any_chain(height, width, seed):
    inner = max(1, height // 2), max(1, width // 3)
    view = Recipe(f"flip|vflip|crop({inner})|vflip(p=1)", seed).view("a", 0, width, height)
    place = draws(seed, "a", 0, 2, "crop")
    y, x = place.integer(height - inner[0] + 1), place.integer(width - inner[1] + 1)
    image = expected = picture(height, width)
    if draws(seed, "a", 0, 0, "flip").uniform() < 0.5:
        expected = expected[:, ::-1]
    if draws(seed, "a", 0, 1, "vflip").uniform() < 0.5:
        expected = expected[::-1]
    expected = expected[y : y + inner[0], x : x + inner[1]][::-1]
    assert np.array_equal(render(image, view, inner), expected)


def test_hsv_jitter_is_three_tables():
    image = picture(40, 40, 3)
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(image).convert("HSV")).astype(int), -1, 0)
    tables = (
        (hue - 40) % 256,
        np.minimum(saturation * 6000 // FACTOR, 255),
        np.minimum(value * 2000 // FACTOR, 255),
    )
    expected = Image.fromarray(np.stack(tables, axis=-1).astype(np.uint8), "HSV").convert("RGB")
    mine = render(image, whole(image, Op.HSV, -40, 6000, 2000), (40, 40))
    assert np.array_equal(mine, np.asarray(expected))
    assert (
        np.abs(render(image, whole(image, Op.HSV, 0, FACTOR, FACTOR), (40, 40)).astype(int) - image).max()
        <= 6
    )


def test_hsv_jitter_draws_ultralytics_gains():
    recipe = Recipe("hsv_jitter", 0)
    ops = np.array([recipe.view(str(i), 0, 8, 8).ops for i in range(3000)])
    assert set(ops[:, 0]) == {Op.HSV}
    for column, unit, middle, most in ((1, 256, 0, 0.015), (2, FACTOR, 1, 0.7), (3, FACTOR, 1, 0.4)):
        drawn = ops[:, column] / unit - middle
        assert (
            abs(drawn.min() + most) < 0.02 * most + 0.5 / unit
            and abs(drawn.max() - most) < 0.02 * most + 0.5 / unit
        )
        assert abs(drawn.mean()) < 0.05 * most and abs(drawn.std() - most / 3**0.5) < 0.05 * most


# --- zoom_out, iou_crop -------------------------------------------------------------------------


def test_zoom_out_draws_what_torchvisions_does():
    torch, v2 = pytest.importorskip("torch"), pytest.importorskip("torchvision.transforms.v2")
    recipe = Recipe("zoom_out(p=1)", 0)
    views = [recipe.view(str(i), 0, 200, 100) for i in range(1500)]
    ours = np.array([(-v.x, -v.y, v.width, v.height) for v in views])
    torch.manual_seed(0)
    image = torch.zeros(3, 100, 200)
    theirs = []
    for _ in range(1500):
        left, top, right, bottom = v2.RandomZoomOut(p=1.0).make_params([image])["padding"]
        theirs.append((left, top, 200 + left + right, 100 + top + bottom))
    for percent in (5, 25, 50, 75, 95):
        spread = np.percentile(ours, percent, axis=0) - np.percentile(np.array(theirs), percent, axis=0)
        assert np.abs(spread / [600, 300, 800, 400]).max() < 0.04
    share = np.mean([Recipe("zoom_out(p=0.3)", 0).view(str(i), 0, 9, 9).width > 9 for i in range(2000)])
    assert 0.2 < share < 0.34


BOXES = np.array([[20, 30, 80, 90], [150, 10, 190, 60], [100, 50, 110, 95]], np.float64)


def test_iou_crop_draws_what_torchvisions_does():
    torch, v2 = pytest.importorskip("torch"), pytest.importorskip("torchvision.transforms.v2")
    from torchvision import tv_tensors

    recipe = Recipe("iou_crop", 0)
    views = [recipe.view(str(i), 0, 200, 100, BOXES) for i in range(1500)]
    ours = np.array([(v.x, v.y, v.width, v.height) for v in views])
    torch.manual_seed(0)
    form: Any = tv_tensors.BoundingBoxFormat.XYXY
    given = tv_tensors.BoundingBoxes(torch.from_numpy(BOXES), format=form, canvas_size=(100, 200))  # pyright: ignore[reportCallIssue]
    draw, theirs = v2.RandomIoUCrop(), []
    for _ in range(1500):
        found = draw.make_params([torch.zeros(3, 100, 200), given])
        theirs.append([found[n] for n in ("left", "top", "width", "height")] if found else (0, 0, 200, 100))
    theirs = np.array(theirs)
    assert abs((ours[:, 2] == 200).mean() - (theirs[:, 2] == 200).mean()) < 0.04
    for percent in (10, 25, 50, 75, 90):
        spread = np.percentile(ours, percent, axis=0) - np.percentile(theirs, percent, axis=0)
        assert np.abs(spread).max() <= 10, (percent, spread)


def test_iou_crop_sees_boxes_where_earlier_ops_put_them():
    """At least 0.9 of IoU with one box, of which there is one: nothing else can be shown, wherever it went."""
    recipe = Recipe(
        "flip|vflip|zoom_out|iou_crop(min_scale=0.05, min_aspect_ratio=0.2, max_aspect_ratio=5, "
        "options=(0.5,), trials=400)",
        0,
    )
    boxes, shown = np.array([[100.0, 20, 180, 90]]), 0
    for i in range(60):
        view = recipe.view(str(i), 0, 200, 100, boxes)
        found = seen(view, boxes)
        if view.width >= 200:
            continue  # none was found that is good enough
        x, y, right, bottom = found.boxes[0]
        inside = (right - x) * (bottom - y)
        iou = inside / (1 + inside / found.visible[0] - inside)
        assert iou > 0.48
        shown += 1
    assert shown > 30


def test_iou_crop_without_boxes():
    recipe = Recipe("iou_crop|resize(32)", 0)
    assert recipe.boxed and not Recipe("zoom_out", 0).boxed
    for none in (np.zeros((0, 4)), np.array([[5.0, 5, 5, 9], [np.nan, 1, 2, 3], [900, 900, 950, 950]])):
        assert recipe.view("a", 0, 40, 20, none).pack() == (0, 0, 40, 20, 40, 20, 0)
    with pytest.raises(SpecError, match=r"on 'a', an image of 40x20: iou_crop .* the source has none"):
        recipe.view("a", 0, 40, 20)
    assert recipe.view("a", 0, 1, 1, np.array([[0.0, 0, 1, 1]])).pack() == (0, 0, 1, 1, 1, 1, 0)


# --- phases -------------------------------------------------------------------------------------

PHASES = "2: letterbox(32)|random_affine(degrees=9)|hsv_jitter; letterbox(32)|flip"


def test_phases_are_one_recipe():
    recipe = Recipe(" 2 :letterbox(32)|random_affine(degrees=9.0)|hsv_jitter() ;letterbox(size=32)|flip", 5)
    assert recipe.spec == PHASES and recipe == Recipe(PHASES, 5) and Recipe(recipe.spec, 5).spec == PHASES
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert recipe.size == (32, 32) and recipe.starts == (0, 2) and recipe.parameters == 2 + 7 + 4
    first, last = (Recipe(part, 5) for part in PHASES.removeprefix("2: ").split("; "))
    for k in range(6):
        view, alone = recipe.view("a", k, 50, 40), (first if k < 2 else last).view("a", k, 50, 40)
        assert view.pack() == alone.pack() and view.ops[: len(alone.ops)] == alone.ops
        assert len(view.ops) == recipe.parameters and not any(view.ops[len(alone.ops) :])
        assert np.array_equal(
            render(picture(40, 50), view, (32, 32)), render(picture(40, 50), alone, (32, 32))
        )
    identity = recipe.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert set(identity["ops"]) == {"letterbox", "random_affine", "hsv_jitter", "flip"}


def test_a_phase_may_mix():
    recipe = Recipe("1: resize((8, 8))|mixup; 3: resize((8, 8)); resize((8, 8))|cutmix", 0)
    assert recipe.mixed and recipe.starts == (0, 1, 4)
    drawn = [recipe.mix("a", k, 0, 10, 8, 8) for k in range(6)]
    assert [d is not None for d in drawn] == [True, False, False, False, True, True]
    assert drawn[0] is not None and not drawn[0][0].width


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("identity; flip", "does not say how many views"),
        ("2: letterbox(64);", r"nothing stands after the last ';' of '2: letterbox\(64\);': write there how"),
        ("2: ; flip", "phase '2:' of '2: ; flip' has no ops"),
        ("0: identity; flip", "does not say how many views"),
        ("two: identity; flip", "does not say how many views"),
        ("2: identity", "for all views that are left"),
        ("2: identity; 3: flip", "for all views that are left"),
        ("2: resize(4); flipp", "did you mean"),
        ("2: letterbox(32); letterbox((24, 32))", "32x32 and .* with 32x24"),
        ("2: letterbox(32); identity", "depends on the image"),
        ("letterbox(32)|zoom_out(fill=0)", "'letterbox' with 114 and 'zoom_out' with 0"),
        ("random_affine(degrees=1)|flip", "'flip' comes after a 'random_affine' that turns"),
        ("random_affine(shear=1)|letterbox(3)", "write 'letterbox' before it"),
        ("hsv_jitter|letterbox(3)", "'letterbox' comes after 'hsv_jitter'"),
        ("zoom_out|mixup", "write a resize or a letterbox before 'mixup'"),
        ("1: identity; iou_crop|cutmix", "write a resize or a letterbox before 'cutmix'"),
        (f"{'9' * 5000}: identity; flip", "does not say how many views"),
        ("letterbox(0)", "at least 1"),
        ("letterbox(9, fill=256)", "from 0 to 255"),
        ("letterbox(9, fill=-1)", "at least 0"),
        ("letterbox(9, align=left)", "center or top_left"),
        ("letterbox(9, upscale=1)", "True or False"),
        ("random_affine(degrees=181)", "0 to 180"),
        ("random_affine(scale=1)", "0 to 0.9"),
        ("random_affine(shear=45)", "0 to 40"),
        ("zoom_out(max=0.5)", "at least 1"),
        ("zoom_out(p=2)", "probability"),
        ("iou_crop(options=())", "IoUs from 0 to 1"),
        ("iou_crop(options=0.5)", "IoUs from 0 to 1"),
        ("iou_crop(max_scale=2)", "at most 1"),
        ("iou_crop(min_scale=2)", "low <= high"),
        ("iou_crop(trials=0)", "at least 1"),
        ("hsv_jitter(h=0, s=0, v=0)", "changes nothing"),
        ("hsv_jitter(h=0.6)", "0 to 0.5"),
        ("vflip(p=3)", "probability"),
    ],
)
def test_specs_that_cannot_be_understood(spec: str, says: str):
    with pytest.raises(SpecError, match=says):
        Recipe(spec, 0)


def test_a_view_that_is_too_large_names_the_image():
    with pytest.raises(SpecError, match=r"'a', an image of 30000x10.*32767"):
        for k in range(20):
            Recipe("zoom_out(p=1)", 0).view("a", k, 30000, 10)


# --- the same at every size ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "letterbox(640)|flip",
        "letterbox(640)|random_affine|vflip",
        "letterbox(640)|random_affine(degrees=20, shear=5)",
        "zoom_out(p=1)|resize((640, 640))",
    ],
)
def test_the_student_sees_the_teachers_view_at_half_the_size(spec: str):
    image = smooth(300, 400)
    for k in range(4):
        view = Recipe(spec, 0).view("a", k, 400, 300)
        large, small = render(image, view, (640, 640)), render(image, view, (320, 320))
        halved = large.reshape(320, 2, 320, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - small).mean() < 1.5


def test_a_known_view_stays_what_it_is():
    # stored caches depend on these: a change here needs a new op version
    known = {
        "letterbox(64)|flip": ((0, -9, 100, 100), (17, 114)),
        "random_affine": ((-4, 1, 101, 81), ()),
        "letterbox(64)|random_affine(degrees=10, shear=2)|hsv_jitter": (
            (-5, -8, 98, 94),
            (17, 114, 19, 27492, -5275, 5275, 4427, 28340, 0, 20, -1, 4836, 4054),
        ),
        "zoom_out(p=1)|iou_crop|vflip(p=1)": ((-175, -174, 388, 310), (17, 114, 18)),
    }
    for spec, (rectangle, ops) in known.items():
        view = Recipe(spec, 0).view("a", 0, 100, 80, BOXES)
        assert view.pack() == (*rectangle, 100, 80, 0) and view.ops == ops


# --- in a cache ---------------------------------------------------------------------------------


class Echo:
    """Its logits are a digest of the pixels it was shown."""

    input_spec = {"size": (16, 16)}  # noqa: RUF012

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return np.stack([digest(row) for row in pixels])


def digest(pixels: np.ndarray) -> np.ndarray:
    found = hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=12).digest()
    return np.frombuffer(found, np.uint8).astype(np.float32)


def build(out: Path, source: Any, recipe: str, **options: Any) -> sc.Cache:
    small = {"views": 3, "block_rows": 8, "batch": 4, "progress": False, "ignore_labels": True}
    return sc.build(out, source=source, teacher=Echo(), recipe=recipe, **small | options)


@pytest.mark.parametrize(
    "recipe",
    [
        "1: zoom_out|iou_crop|vflip|letterbox(16)|random_affine(degrees=9)|hsv_jitter; letterbox(16)|flip",
        "1: letterbox(16)|mixup(p=0.5); iou_crop|letterbox(16)|mixup",
    ],
)
def test_a_cache_holds_the_views_that_boxes_and_phases_drew(tmp_path: Path, recipe: str):
    layouts.write("coco", tmp_path / "pets")
    source = Source(tmp_path / "pets", split="train")
    cache, made = build(tmp_path / "c", tmp_path / "pets", recipe, split="train"), Recipe(recipe, 0)
    for k in range(3):
        said = cache.read(k, np.arange(len(source)))["logits"].values
        for i, view in enumerate(cache.read_views(k, np.arange(len(source)))):
            image, boxes = source.image(i), source.boxes(i)
            assert boxes is not None
            alone = made.view(cache.ids[i], k, image.shape[1], image.shape[0], boxes.xyxy)
            assert replace(view, mix=None) == alone
            images = gather(i, view, source.image)
            if view.mix:
                other, (height, width, _) = source.boxes(view.mix.partner), images[view.mix.partner].shape
                assert other is not None
                size = width, height
                assert view.mix.view == made.view(cache.ids[view.mix.partner], k, *size, other.xyxy)
            assert np.array_equal(digest(render(image, view, (16, 16), images)), said[i])
    assert "pixels equal" in canary.pair(cache, source).message
    assert sc.verify(cache, read_data=True) == []


def test_a_build_refuses_boxes_and_phases_it_cannot_serve(tmp_path: Path):
    with pytest.raises(SpecError, match=r"asks where the boxes are, and .* has none"):
        build(tmp_path / "c", ToyImages(8), "iou_crop|resize((16, 16))")
    with pytest.raises(SpecError, match="has 3 views before its last phase, and views=3"):
        build(tmp_path / "c", ToyImages(8), "3: resize((16, 16)); resize((16, 16))|flip")
    with pytest.raises(SpecError, match="a crop of 99x99 is larger"):  # of a phase that comes later
        build(tmp_path / "c", ToyImages(8), "1: letterbox(99); crop(99)")
    assert not (tmp_path / "c").exists()


def test_maps_are_not_warped_to_what_is_no_rectangle():
    image = whole(picture(8, 8))
    maps = np.zeros((1, 2, 4, 4), np.float32)
    warp(maps, [image], [replace(image, ops=(Op.FILL, 114, Op.BRIGHTNESS, 9))])
    for ops in ((Op.VFLIP,), (Op.FILL, 114, Op.AFFINE, FRACTION, 0, 0, 0, FRACTION, 0), (Op.ROTATE, 100)):
        with pytest.raises(SpecError, match="rectangle of an image"):
            warp(maps, [image], [replace(image, ops=ops)])
