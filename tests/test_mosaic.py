"""Mosaics: what is drawn, the pixels it makes, where its boxes are, and caches of it."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_mixed_cache import Echo, Holes, rewrite

import softcache as sc
from softcache import builder, job, loop, testing
from softcache import manifest as m
from softcache.cache import Cache
from softcache.checker import verify_live
from softcache.errors import DamageError, MismatchError, SourceError, SpecError, StoreError, UnreadableImage
from softcache.forecast import plan
from softcache.geometry import parts, rectangular, seen, seen_in_all, to_view
from softcache.recipe import Recipe, View, gather, render
from softcache.recipe.mix import ONE, Blend, Mix
from softcache.recipe.mosaic import MOST, Frame, Mosaic, Tile
from softcache.recipe.opcodes import FACTOR, Op
from softcache.source import Boxes
from softcache.source.kept import Kept
from softcache.store import Store
from softcache.teachers import Options, load

plain_frames = st.builds(
    Frame, st.integers(0, ONE), st.integers(0, ONE), st.integers(1, MOST * FACTOR), st.integers(0, 255)
)
frames = plain_frames | st.builds(
    lambda frame, width, height: replace(frame, width=width, height=height),
    plain_frames,
    st.integers(1, 1000),
    st.integers(1, 1000),
)
canvases = st.tuples(st.integers(1, 60), st.integers(1, 60))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def whole(image: np.ndarray, **more: Any) -> View:
    height, width = image.shape[:2]
    return View(0, 0, width, height, width, height, False, **more)


# --- what is drawn ----------------------------------------------------------------------------------------------


def test_it_is_written_and_read_in_one_way():
    recipe = Recipe("letterbox(64)|flip|mosaic(scale=[0.5, 1.5], p=1.0)|mixup(alpha=32, p=0.1)", 0)
    assert recipe.spec == "letterbox(64)|flip|mosaic|mixup(alpha=32, p=0.1)"
    assert (recipe.tiled, recipe.mixed, recipe.size) == (True, True, (64, 64))
    phased = Recipe("2: letterbox(64)|mosaic(); letterbox(64)|flip", 0)
    assert phased.spec == "2: letterbox(64)|mosaic; letterbox(64)|flip" and phased.tiled
    assert [phased.mosaic("a", k, 0, 9) is None for k in range(4)] == [False, False, True, True]
    assert not Recipe("letterbox(64)", 0).tiled


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mosaic|flip", "'flip' comes after 'mosaic'.*in every tile by itself"),
        ("mosaic|letterbox(64)", "'letterbox' comes after 'mosaic'"),
        ("mosaic|color_jitter(0.1)", "'color_jitter' comes after 'mosaic'"),
        ("mosaic|mosaic", "'mosaic' comes after 'mosaic'"),
        ("mosaic|cutmix", "'cutmix' comes after 'mosaic', which only 'mixup' may follow"),
        ("mosaic|mix", "'mix' comes after 'mosaic', which only 'mixup' may follow"),
        ("mixup|mosaic", "'mixup' must come last"),
        ("mosaic(p=2)", "probability"),
        ("mosaic(scale=0)", "low, high"),
        ("mosaic(scale=(0.0, 1.0))", "0 < low"),
        ("mosaic(scale=(1.0, 5.0))", "at most 4"),
        ("mosaic(center=(0.5, 1.2))", "at most 1"),
        ("mosaic(fill=256)", "grey"),
        ("mosaic(tiles=9)", "tiles"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, says: str):
    with pytest.raises(SpecError, match=says):
        Recipe(spec, 0)


def test_draws_are_spread_over_their_ranges_and_partners_are_three_others():
    recipe = Recipe("letterbox(64)|mosaic(p=0.75, scale=(0.25, 2), center=(0.1, 0.6), fill=7)", 3)
    found = [recipe.mosaic(f"{i}", 1, i % 50, 50) for i in range(2000)]
    kept = [(i % 50, *one) for i, one in enumerate(found) if one]
    assert 0.71 < len(kept) / 2000 < 0.79
    x, y, scale = (np.array([getattr(frame, n) for _, frame, _ in kept]) for n in ("x", "y", "scale"))
    for values, one, low, high in ((x, ONE, 0.1, 0.6), (y, ONE, 0.1, 0.6), (scale, FACTOR, 0.25, 2)):
        shares = values / one
        assert low - 1e-3 <= shares.min() < low + 0.01 * (high - low) * 2 and shares.max() <= high + 1e-3
        assert abs(shares.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.08
    partners = Counter()
    for sample, frame, order in kept:
        three = [next(order) for _ in range(3)]
        assert frame.fill == 7 and len({sample, *three}) == 4
        partners.update(three)
    assert len(partners) == 50 and max(partners.values()) < 2 * min(partners.values())


def test_a_mosaic_depends_on_seed_id_and_view_alone():
    def drawn(seed: int, id: str, k: int) -> Any:
        frame, order = Recipe("letterbox(64)|mosaic", seed).mosaic(id, k, 4, 1000)  # type: ignore[misc]
        return frame.pack(), [next(order) for _ in range(3)]

    first = drawn(0, "a", 0)
    others = [drawn(1, "a", 0), drawn(0, "b", 0), drawn(0, "a", 1)]
    assert drawn(0, "a", 0) == first and first not in others
    # for ever: what is drawn today
    assert first == ((24586, 19393, 3901, 114, 0, 0), [815, 289, 997])


# --- pixels -----------------------------------------------------------------------------------------------------


def by_hand(images: list[np.ndarray], views: list[View], frame: Frame, size: tuple[int, int]) -> np.ndarray:
    """Tile by tile, in fractions and with Pillow alone: of views that are a part of their image."""
    height, width = size
    canvas = Image.new("RGB", (width, height), (frame.fill,) * 3)
    x, y, scale = Fraction(frame.x, 32767), Fraction(frame.y, 32767), Fraction(frame.scale, 4096)
    for n, (image, view) in enumerate(zip(images, views, strict=True)):
        wide = high = scale
        if frame.width:  # as a letterbox, on the canvas of the recipe
            gain = min(Fraction(frame.width, view.width), Fraction(frame.height, view.height)) * scale
            wide, high = gain * view.width / frame.width, gain * view.height / frame.height
        left, top = x - wide * (n % 2 == 0), y - high * (n < 2)
        edges = (left * width, top * height, (left + wide) * width, (top + high) * height)
        left, top, right, bottom = (int(np.floor(e + Fraction(1, 2))) for e in edges)
        part = Image.fromarray(image).crop((view.x, view.y, view.x + view.width, view.y + view.height))
        if view.flip:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if right > left and bottom > top:
            if view.ops[:1] == (Op.FILL,):  # across first
                part = part.resize((right - left, part.height), Image.Resampling.BILINEAR)
            canvas.paste(part.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
    return np.asarray(canvas)


@settings(max_examples=150)
@given(frame=frames, size=canvases, seed=st.integers(0, 99))
def test_the_pixels_are_those_of_tiles_laid_by_hand(frame: Frame, size: tuple[int, int], seed: int):
    rng = np.random.default_rng(seed)
    images, views = [], []
    for i in range(4):
        height, width = (int(n) for n in rng.integers(2, 40, 2))
        images.append(picture(height, width, seed + i))
        w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        views.append(View(x, y, w, h, width, height, bool(rng.integers(2))))
    tiles = tuple(Tile(10 + i, 0, views[i]) for i in range(1, 4))
    view = replace(views[0], mosaic=Mosaic(tiles, frame))
    assert view.others == (11, 12, 13)
    pixels = render(images[0], view, size, {10 + i: images[i] for i in range(4)})
    assert pixels.shape == (*size, 3) and pixels.flags.c_contiguous and pixels.flags.writeable
    assert np.array_equal(pixels, by_hand(images, views, frame, size))


@given(frame=frames, rectangles=st.lists(st.tuples(*[st.integers(1, 4000)] * 2), min_size=4, max_size=4))
def test_the_geometry_is_one_at_every_size(frame: Frame, rectangles: list[tuple[int, int]]):
    """Edges at 640 and at 320 are the same within a pixel, and half a pixel from where they are exactly."""
    shown = [View(0, 0, *sides, *sides, False) for sides in rectangles]
    large, small = (np.array(frame.pixels(shown, (n, n * 2))) for n in (640, 320))
    assert np.abs(large - 2 * small).max() <= 1
    exact = np.array(frame.places(shown)).astype(float) * [1280, 640, 1280, 640]
    assert np.abs(large - exact).max() <= 0.5 + 1e-6
    (a, b, c, d) = large  # they meet in one point
    assert a[2] == c[2] == b[0] == d[0] and a[3] == b[3] == c[1] == d[1]


def test_each_tile_has_its_own_ops_and_fill():
    images = [picture(20, 30, i) for i in range(4)]
    views = [View(-5, 0, 40, 20, 30, 20, False, (Op.FILL, 10 * i, Op.BRIGHTNESS, 2000 * i)) for i in range(4)]
    frame = Frame(ONE // 2, ONE // 2, FACTOR // 2, 255)
    view = replace(views[0], mosaic=Mosaic(tuple(Tile(i, 2, views[i]) for i in (1, 2, 3)), frame))
    pixels = render(images[0], view, (40, 60), dict(enumerate(images)))
    for i in range(4):
        y, x = 20 * (i // 2), 30 * (i % 2)
        assert np.array_equal(pixels[y : y + 20, x : x + 30], render(images[i], views[i], (20, 30)))


def test_a_mixup_of_two_mosaics_is_the_blend_of_both():
    images = [picture(24, 32, i) for i in range(6)]
    frame, other = Frame(9000, 20000, 5000, 114), Frame(20000, 9000, 3000, 114)
    mosaic = Mosaic(tuple(Tile(i, 0, whole(images[i])) for i in (1, 2, 3)), frame)
    theirs = Mosaic(tuple(Tile(i, 0, whole(images[i])) for i in (0, 5, 1)), other)
    partner = whole(images[4], mosaic=theirs)
    view = whole(images[0], mosaic=mosaic, mix=Mix(4, 0, partner, Blend(12345)))
    assert view.others == (1, 2, 3, 4, 0, 5)
    given = dict(enumerate(images))
    a = render(images[0], replace(view, mix=None), (30, 30), given)
    b = render(images[4], partner, (30, 30), given)
    assert np.array_equal(render(images[0], view, (30, 30), given), Blend(12345)(a, b))
    looked: list[int] = []
    gathered = gather(0, view, lambda i: looked.append(i) or images[i])
    assert looked == [0, 1, 2, 3, 4, 5] and set(gathered) == set(looked)
    for missing in (1, 4, 5):
        with pytest.raises(MismatchError, match=f"shows sample {missing} too"):
            render(images[0], view, (30, 30), {i: im for i, im in given.items() if i != missing})


# --- boxes ------------------------------------------------------------------------------------------------------


def boxes_of(xyxy: Any, label: int = 0) -> Boxes:
    rows = np.array(xyxy, np.float64).reshape(-1, 4)
    flags = np.zeros(len(rows), bool)
    return Boxes(rows, np.full(len(rows), label), flags, flags)


COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])


def painted_mosaic(seed: int) -> tuple[View, list[np.ndarray], dict[int, Boxes]]:
    """A mosaic of four black images, each with one box of its own colour."""
    rng = np.random.default_rng(seed)
    recipe = Recipe("letterbox(256, fill=0)|flip|vflip(p=0.3)|random_affine(scale=0.3)|mosaic(fill=0)", seed)
    images, views, boxes = [], [], {}
    for i in range(4):
        height, width = (int(n) for n in rng.integers(150, 400, 2))
        low = rng.integers(0, (width - 80, height - 80))
        box = [*low, *(low + rng.integers(30, 80, 2))]
        image = np.zeros((height, width, 3), np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = COLOURS[i]
        images.append(image)
        views.append(recipe.view(f"{seed}-{i}", 0, width, height))
        boxes[i] = boxes_of([box], label=i)
    frame, _ = recipe.mosaic(f"{seed}", 0, 0, 4)  # type: ignore[misc]
    return (
        replace(views[0], mosaic=Mosaic(tuple(Tile(i, 0, views[i]) for i in (1, 2, 3)), frame)),
        images,
        boxes,
    )


def found_box(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray | None:
    """left, top, right, bottom of the pixels that are more of this colour than not."""
    mask = (np.abs(pixels.astype(int) - colour) < 128).all(axis=2)
    y, x = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1]) if len(x) else None


@pytest.mark.parametrize("size", [(640, 640), (320, 480)])
def test_painted_boxes_are_found_where_they_are_seen(size: tuple[int, int]):
    height, width = size
    cut = 0
    for seed in range(25):
        view, images, boxes = painted_mosaic(seed)
        pixels = render(images[0], view, size, dict(enumerate(images)))
        known = seen_in_all(view, 0, boxes, min_visible=0)
        scale = view.mosaic.frame.scale / FACTOR if view.mosaic else 1
        for i in range(4):
            at = np.flatnonzero(known.sample == i)
            found = found_box(pixels, COLOURS[i])
            if found is None or not len(at):
                assert (
                    not len(at)
                    or ((known.boxes[at[0], 2:] - known.boxes[at[0], :2]) * [width, height]).min() < 2
                )
                continue
            expected = known.boxes[at[0]] * [width, height, width, height]
            assert np.abs(found - expected).max() <= 1.5, (seed, i)
            assert known.label[at[0]] == i and known.index[at[0]] == 0
            # the share of what there would be without an edge, from the areas themselves
            box, one = boxes[i].xyxy[0], parts(view, 0)[i].view
            shown = (box[2] - box[0]) * (box[3] - box[1]) / (one.width * one.height)
            full = shown * scale**2 * width * height
            area = (found[2] - found[0]) * (found[3] - found[1])
            around = 2 * (found[2] - found[0] + found[3] - found[1]) + 4
            assert abs(known.visible[at[0]] * full - area) <= around
            cut += known.visible[at[0]] < 0.95
    assert cut > 5


def test_boxes_are_cut_where_their_tile_ends_and_dropped_below_the_share():
    image = np.zeros((100, 100, 3), np.uint8)
    view = View(20, 0, 60, 100, 100, 100, False)  # its tile shows x from 20 to 80
    others = tuple(Tile(i, 0, whole(image)) for i in (1, 2, 3))
    mosaic = replace(view, mosaic=Mosaic(others, Frame(ONE // 2 + 1, ONE // 2 + 1, FACTOR // 2, 0)))
    boxes = {i: boxes_of(np.zeros((0, 4))) for i in range(4)}
    boxes[0] = boxes_of([[0, 0, 40, 50], [70, 20, 90, 30], [75, 0, 200, 10], [85, 0, 99, 9], [30, 5, 30, 9]])
    boxes[3] = boxes_of([[0, 0, 100, 100]])
    found = seen_in_all(mosaic, 0, boxes)
    assert found.index.tolist() == [0, 1, 0] and found.sample.tolist() == [0, 0, 3]
    np.testing.assert_allclose(
        found.visible, [0.5, 0.5, 1], atol=1e-4
    )  # the centre is a 65534th beyond the middle
    at = (ONE // 2 + 1) / ONE
    tile = at - 0.5
    expected = [
        [tile, tile, tile + 1 / 6, tile + 0.25],
        [tile + 5 / 12, tile + 0.1, at, tile + 0.15],
        [at, at, 1, 1],
    ]
    np.testing.assert_allclose(found.boxes, expected, atol=3e-5)
    assert len(seen_in_all(mosaic, 0, boxes, min_visible=0.9).index) == 1
    assert seen_in_all(mosaic, 0, boxes, min_visible=0).index.tolist() == [0, 1, 2, 0]
    for missing in (0, 2):
        with pytest.raises(MismatchError, match=f"shows sample {missing} too"):
            seen_in_all(mosaic, 0, {i: b for i, b in boxes.items() if i != missing})


def test_of_a_mixup_both_sets_are_seen():
    view, images, boxes = painted_mosaic(3)
    other, _, more = painted_mosaic(4)
    assert other.mosaic
    far = {i + 10: b for i, b in more.items()}
    moved = tuple(replace(tile, sample=tile.sample + 10) for tile in other.mosaic.tiles)
    partner = replace(other, mosaic=Mosaic(moved, other.mosaic.frame))
    mixed = replace(view, mix=Mix(10, 0, partner, Blend(9000)))
    both, own, theirs = (seen_in_all(v, s, boxes | far) for v, s in ((mixed, 0), (view, 0), (partner, 10)))
    for name in ("boxes", "visible", "index", "sample", "label", "crowd", "ignore"):
        expected = np.concatenate([getattr(own, name), getattr(theirs, name)])
        np.testing.assert_array_equal(getattr(both, name), expected)
    assert [part.sample for part in parts(mixed, 0)] == [0, 1, 2, 3, 10, 11, 12, 13]
    with pytest.raises(SpecError, match="its own affine"):
        to_view(view, boxes[0].xyxy)
    assert not rectangular(view) and rectangular(whole(images[0]))


def test_of_a_cutmix_own_boxes_are_covered_and_the_partners_cut():
    """Against pixels: a red box under a green one's picture."""
    rng, checked = np.random.default_rng(0), 0
    for _ in range(40):
        own, other = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100, 3), np.uint8)
        boxes = {}
        for i, image in enumerate((own, other)):
            low = rng.integers(0, 60, 2)
            box = [*low, *(low + rng.integers(10, 40, 2))]
            image[box[1] : box[3], box[0] : box[2]] = COLOURS[i]
            boxes[i] = boxes_of([box])
        x, y, right, bottom = (
            round(int(n) * ONE / 100) for n in [*rng.integers(0, 50, 2), *rng.integers(51, 101, 2)]
        )
        blend = Blend(16000, x, y, right - x, bottom - y)
        view = whole(own, mix=Mix(1, 0, whole(other), blend))
        pixels, found = render(own, view, (100, 100), {1: other}), seen_in_all(view, 0, boxes, 1e-3)
        for i in range(2):
            left, top, end, below = boxes[i].xyxy[0]
            shown = (pixels == COLOURS[i]).all(axis=2).sum() / ((end - left) * (below - top))
            at = np.flatnonzero(found.sample == i)
            assert abs((found.visible[at[0]] if len(at) else 0) - shown) < 0.01
            if len(at):
                expected = boxes[0].xyxy[0] if i == 0 else found_box(pixels, COLOURS[1])
                np.testing.assert_allclose(found.boxes[at[0]] * 100, expected, atol=0.01)
                checked += shown < 1
    assert checked > 20


def test_of_one_image_alone_all_is_as_seen_says():
    view = Recipe("letterbox(64)|flip|random_affine", 1).view("a", 0, 640, 480)
    xyxy = np.random.default_rng(0).uniform(-100, 700, (40, 4))
    flags = np.arange(40) % 3 == 0
    boxes = Boxes(xyxy, np.arange(40), flags, ~flags)
    a, b = seen(view, xyxy), seen_in_all(view, 5, {5: boxes})
    np.testing.assert_array_equal(a.boxes, b.boxes)
    np.testing.assert_array_equal(a.index, b.index)
    np.testing.assert_array_equal(b.label, a.index)
    np.testing.assert_array_equal(b.crowd, flags[a.index])
    assert set(b.sample.tolist()) == {5}


def test_ops_that_count_in_pixels_count_those_of_the_tile():
    """A shift by 40 % is rounded to pixels of the tile, not of the canvas."""
    image = np.zeros((50, 50, 3), np.uint8)
    image[10:20, 5:15] = 255
    view = whole(image, ops=(Op.TRANSLATE_X, round(0.4 * 32767)))
    blank = tuple(Tile(i, 0, whole(image)) for i in (1, 2, 3))
    mosaic = replace(view, mosaic=Mosaic(blank, Frame(20000, 20000, 2200, 0)))
    none = boxes_of(np.zeros((0, 4)))
    found = seen_in_all(mosaic, 0, {0: boxes_of([[5, 10, 15, 20]]), 1: none, 2: none, 3: none}, size=(93, 93))
    dark = np.zeros_like(image)
    pixels = render(image, mosaic, (93, 93), {1: dark, 2: dark, 3: dark})
    expected = found_box(pixels, COLOURS[3])
    assert expected is not None
    assert np.abs(found.boxes[0] * 93 - expected).max() <= 1


# --- caches -----------------------------------------------------------------------------------------------------

ODD = 13
RECIPE = (
    "2: random_resized_crop(8)|flip|color_jitter(0.2)|mosaic(p=0.8)|mixup(p=0.5); random_resized_crop(8)|flip"
)
OPTIONS: dict[str, Any] = {
    "teacher": Echo(),
    "targets": {"logits": "full(u8)", "pixels": "f16"},
    "views": 3,
    "block_rows": 5,
    "batch": 4,
    "progress": False,
}


def make(path: Path | Store, samples: int = ODD, recipe: str = RECIPE, **options: Any) -> Cache:
    return sc.build(path, source=sc.Source(testing.ToyImages(samples)), recipe=recipe, **OPTIONS | options)


@pytest.fixture(scope="module")
def source() -> sc.Source:
    return sc.Source(testing.ToyImages(ODD))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of mosaics, some of them mixed, and a plain one. Copy it before you change it."""
    path = tmp_path_factory.mktemp("mosaic") / "cache"
    make(path)
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_the_teacher_saw_the_mosaic_that_is_stored(built: Path, source: sc.Source):
    """From the arrays as plain Zarr gives them, put together here."""
    cache, group = sc.open(built), zarr.open_group(built, mode="r")
    stored = {
        name: np.asarray(group[f"view/{name}"])
        for name in ("geometry", "ops", "tiles", "mosaic", "partner", "mix")
    }
    assert stored["tiles"].dtype == np.int64 and stored["tiles"].shape == (3, ODD, 6)
    assert stored["mosaic"].dtype == np.int16 and stored["mosaic"].shape == (3, ODD, 6)
    said, positions = np.asarray(group["targets/pixels/value"]), cache.grid.positions(np.arange(ODD))

    def alone(sample: int, k: int, size: tuple[int, int]) -> np.ndarray:
        row = k, positions[sample]
        view = View.unpack(stored["geometry"][row].tolist(), stored["ops"][row].tolist())
        return render(source.image(sample), view, size)

    def tiled(sample: int, k: int) -> np.ndarray:
        tiles, frame = (stored[name][k, positions[sample]].tolist() for name in ("tiles", "mosaic"))
        if tiles[0] < 0:
            assert tiles == [-1] * 6 and frame == [0] * 6
            return alone(sample, k, (8, 8))
        assert tiles[1::2] == [k] * 3 and len({sample, *tiles[::2]}) == 4
        x, y, scale, fill, *canvas = frame
        assert canvas == [0, 0]
        big = np.full((80, 80, 3), fill, np.uint8)  # the canvas is its middle
        for n, who in enumerate([sample, *tiles[::2]]):
            left, top = x / 32767 - (n % 2 == 0) * scale / 4096, y / 32767 - (n < 2) * scale / 4096
            left, top, right, bottom = (
                int(np.floor(8 * e + 0.5)) for e in (left, top, left + scale / 4096, top + scale / 4096)
            )
            tile = alone(who, k, (bottom - top, right - left))
            big[36 + top : 36 + bottom, 36 + left : 36 + right] = tile
        return big[36:44, 36:44]

    kinds: set[tuple[bool, bool]] = set()
    for sample in range(ODD):
        for k in range(3):
            row = k, positions[sample]
            pixels, (who, number) = tiled(sample, k).astype(int), stored["partner"][row].tolist()
            if who >= 0:
                assert number == k
                lam = int(stored["mix"][row][0])
                pixels = (lam * pixels + (ONE - lam) * tiled(who, number).astype(int) + 16383) // ONE
            kinds.add((stored["tiles"][row][0] >= 0, who >= 0))
            assert np.array_equal(said[row].transpose(1, 2, 0), pixels)
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
    assert (stored["tiles"][2] == -1).all() and (stored["partner"][2] == -1).all()  # the plain phase


def test_what_the_cache_reads_renders_to_the_same_pixels(built: Path, source: sc.Source):
    cache, shuffled = sc.open(built), np.random.default_rng(0).permutation(ODD)
    for k in range(3):
        said, views = cache.read(k, shuffled)["pixels"].values, cache.read_views(k, shuffled)
        for sample, view, pixels in zip(shuffled.tolist(), views, said, strict=True):
            images = gather(sample, view, source.image)
            assert np.array_equal(render(images[sample], view, (8, 8), images), pixels.transpose(1, 2, 0))
            assert cache[cache.ids[sample], k].view == view
            if view.mix:
                assert view.mix.view.mix is None
                assert view.mix.view == replace(cache[cache.ids[view.mix.partner], k].view, mix=None)


def test_it_is_whole_and_is_the_teachers(built: Path, source: sc.Source):
    cache = sc.open(built)
    assert sc.verify(cache, read_data=True) == []
    assert "pixels equal" in sc.pair(cache, source, every=True).message
    found = verify_live(cache, source, load(Echo(), Options(batch=4)), 20)
    assert found["pixels"]["cache"]["relative_l2"] == 0


def test_identity_says_so_and_only_then(built: Path, tmp_path: Path):
    assert sc.open(built).identity["recipe"]["tiled"] is True
    plain = make(tmp_path / "plain", recipe="random_resized_crop(8)|flip")
    assert b'"tiled"' not in plain.store.get(m.MANIFEST) and not plain.tiled
    assert not [name for name in plain.store.names() if "tile" in name or "mosaic" in name]


def test_neither_blocks_nor_builders_nor_workers_change_a_view(built: Path, tmp_path: Path):
    cache, every = sc.open(built), np.arange(ODD)
    other = make(tmp_path / "other", block_rows=13, batch=13, workers=5)
    for k in range(3):
        assert other.read_views(k, every) == cache.read_views(k, every)
    make(tmp_path / "ranks", rank=1, world=2)
    assert (tmp_path / "ranks" / m.MANIFEST).read_bytes() == (built / m.MANIFEST).read_bytes()


def test_a_build_that_was_broken_off_anywhere_ends_with_the_same_bytes(built: Path, tmp_path: Path):
    disk = testing.CountingDisk()
    make(Store(tmp_path / "counted", disk))
    for at in range(3, disk.operations, disk.operations // 8):
        root = tmp_path / f"at{at}"
        with pytest.raises(StoreError):
            make(Store(root, testing.FailingDisk(at)))
        make(root)
        assert (root / m.MANIFEST).read_bytes() == (built / m.MANIFEST).read_bytes()


def test_blocks_that_are_there_can_be_read_before_the_end(copy: Path, built: Path):
    (copy / m.MANIFEST).unlink()
    unfinished, whole = sc.open(copy), sc.open(built)
    assert unfinished.read_views(0, np.arange(ODD)) == whole.read_views(0, np.arange(ODD))


def test_labels_are_told_of_where_there_is_no_mosaic_only(built: Path, tmp_path: Path):
    cache = sc.open(built)
    plain = sum(
        v.mosaic is None and v.mix is None for k in range(3) for v in cache.read_views(k, np.arange(ODD))
    )
    own = sum(
        v.mosaic is None and v.mix is not None and 2 * v.mix.blend.lam >= ONE
        for k in range(3)
        for v in cache.read_views(k, np.arange(ODD))
    )
    assert cache.manifest and cache.manifest.report.labelled == plain + own
    every = make(tmp_path / "all", recipe="crop(8)|mosaic").manifest
    assert every and every.report.labelled == 0 and every.report.top1 is None


# --- few samples, and unreadable ones -----------------------------------------------------------------------------


def test_one_sample_is_refused_before_anything_is_loaded(tmp_path: Path):
    with pytest.raises(SpecError, match=r"shows every sample with others.*1 sample,.*leave out the mosaic"):
        make(tmp_path / "c", samples=1, recipe="crop(8)|mosaic", teacher="no.such:teacher")
    assert not (tmp_path / "c").exists()


def test_of_two_samples_the_other_is_shown_three_times(tmp_path: Path):
    cache = make(tmp_path / "c", samples=2, recipe="crop(8)|mosaic|mixup")
    for view in cache.read_views(0, np.arange(2)):
        assert view.mosaic and len({tile.sample for tile in view.mosaic.tiles}) == 1
    assert sc.verify(cache, read_data=True) == []


def test_with_skip_corrupt_the_next_partner_is_taken(tmp_path: Path):
    images = Holes(ODD)
    images.holes = (4, 7)
    common: dict[str, Any] = OPTIONS | {"recipe": "random_resized_crop(8)|mosaic|mixup(p=0.5)"}
    with pytest.raises(SourceError, match=r"2 images cannot be read.*--skip-corrupt"):
        sc.build(tmp_path / "no", source=sc.Source(images), **common)
    holed = sc.build(tmp_path / "c", source=sc.Source(images), skip_corrupt=True, **common)
    whole = sc.build(tmp_path / "w", source=sc.Source(Holes(ODD)), **common)
    good, changed = np.setdiff1d(np.arange(ODD), (4, 7)), 0
    for k in range(3):
        for ours, theirs in zip(holed.read_views(k, good), whole.read_views(k, good), strict=True):
            assert not {4, 7} & set(ours.others)
            assert ours.mosaic and theirs.mosaic and ours.mosaic.frame == theirs.mosaic.frame
            same, was = ([tile.sample for tile in v.mosaic.tiles] for v in (ours, theirs) if v.mosaic)
            kept = [sample for sample in was if sample not in (4, 7)]
            assert same[: len(kept)] == kept
            changed += same != was
    assert changed
    assert sc.verify(holed, read_data=True) == []
    assert "pixels equal" in sc.pair(holed, sc.Source(images)).message


def test_the_only_readable_image_has_no_partner(tmp_path: Path):
    images = Holes(3)
    images.holes = (0, 2)
    with pytest.raises(SourceError, match="is the only image that can be read"):
        sc.build(tmp_path / "c", source=sc.Source(images), recipe="mosaic", skip_corrupt=True, **OPTIONS)


# --- how often an image is decoded ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "a_row"), [("crop(8)", 0), ("crop(8)|mosaic", 3), ("crop(8)|mosaic|mixup(alpha=9)", 7)]
)
def test_an_image_is_decoded_once_where_there_is_room_and_for_each_tile_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, a_row: int
):
    counts: Counter[int] = Counter()
    image = sc.Source.image

    def counted(self: sc.Source, i: int) -> np.ndarray:
        counts[i] += 1
        return image(self, i)

    def begin(*args: Any) -> Any:
        counts.clear()
        monkeypatch.setattr(sc.Source, "image", counted)
        return build_blocks(*args)

    def end(*args: Any) -> None:
        monkeypatch.setattr(sc.Source, "image", image)
        finish(*args)

    build_blocks, finish = loop.run, builder.finish
    monkeypatch.setattr(loop, "run", begin)
    monkeypatch.setattr(builder, "finish", end)
    cache = make(tmp_path / "roomy", samples=40, recipe=recipe, workers=1)
    assert counts == dict.fromkeys(range(40), 1)
    monkeypatch.setattr(job, "ROOM", 0)
    tight = make(tmp_path / "tight", samples=40, recipe=recipe, workers=1)
    # its own once for all views, and what it is shown with in each, but for what one row shows twice
    assert 40 * (1 + 3 * a_row) * 0.9 <= sum(counts.values()) <= 40 * (1 + 3 * a_row)
    assert (tight.path / m.MANIFEST).read_bytes() == (cache.path / m.MANIFEST).read_bytes()


def test_a_pilot_keeps_as_many_images_as_the_build_will_of_so_few(monkeypatch: pytest.MonkeyPatch):
    rooms = []
    monkeypatch.setattr(job, "Kept", lambda source, room: rooms.append(room) or Kept(source, room))
    options = {
        "source": testing.ToyImages(80),
        "teacher": testing.toy_teacher(),
        "batch": 8,
        "progress": False,
    }
    plan(pilot=8, recipe="crop(8)|mosaic", **options)
    plan(pilot=8, recipe="crop(8)", **options)
    assert rooms == [(256 << 20) // 10, 0]


# --- damage -----------------------------------------------------------------------------------------------------

FRAME = [16000, 16000, 4096, 114, 0, 0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tiles", [ODD, 1, 2, 1, 3, 1]),
        ("tiles", [1, 1, 1 << 40, 1, 3, 1]),
        ("tiles", [1, 1, 2, 1, 5, 1]),  # itself
        ("tiles", [1, 1, 2, 1, -1, -1]),
        ("tiles", [-1, -1, 2, 1, 3, 1]),
        ("tiles", [-2, 1, 2, 1, 3, 1]),
        ("tiles", [-1] * 6),
        ("tiles", [1, 3, 2, 1, 3, 1]),
        ("tiles", [1, 1, 2, -1, 3, 1]),
        ("mosaic", [0] * 6),
        ("mosaic", [-1, *FRAME[1:]]),
        ("mosaic", [16000, -5, 4096, 114, 0, 0]),
        ("mosaic", [16000, 16000, 0, 114, 0, 0]),
        ("mosaic", [16000, 16000, 16385, 114, 0, 0]),
        ("mosaic", [16000, 16000, 4096, 256, 0, 0]),
        ("mosaic", [16000, 16000, 4096, -1, 0, 0]),
        ("mosaic", [16000, 16000, 4096, 114, 64, 0]),
        ("mosaic", [16000, 16000, 4096, 114, 0, 64]),
        ("mosaic", [16000, 16000, 4096, 114, -64, -64]),
    ],
)
def test_a_mosaic_that_cannot_be_is_damage_and_its_row_is_named(copy: Path, name: str, values: list[int]):
    cache, sample = sc.open(copy), 5
    if cache.read_views(1, np.array([sample]))[0].mosaic is None:
        pytest.fail("the sample of this test has to be a mosaic: choose another")
    rewrite(cache, name, sample, values)
    cache = sc.open(copy)
    with pytest.raises(
        DamageError, match=rf"view 1 of {cache.ids[sample]!r} .* is a mosaic of what cannot"
    ) as e:
        cache.read_views(1, np.arange(ODD))
    assert e.value.exit_code == 2 and str(values) in str(e.value)
    assert sc.verify(copy, read_data=True)[0].file.startswith(f"view/{name}/")


def test_an_invalid_partner_is_damage_also_in_the_mosaic_of_a_partner(tmp_path: Path):
    images = Holes(ODD)
    images.holes = (4,)
    cache = sc.build(
        tmp_path / "c", source=sc.Source(images), recipe="mosaic|mixup", skip_corrupt=True, **OPTIONS
    )
    good = np.setdiff1d(np.arange(ODD), 4)
    views = zip(good.tolist(), cache.read_views(1, good), strict=True)
    sample, partner = next((i, v.mix.partner) for i, v in views if v.mix)
    rewrite(cache, "tiles", partner, [1, 1, 4, 1, 3, 1])
    for finished in (True, False):
        if not finished:
            (tmp_path / "c" / m.MANIFEST).unlink()
        cache = sc.open(tmp_path / "c")
        for one in (partner, sample):
            with pytest.raises(
                DamageError, match=rf"view 1 of {cache.ids[partner]!r} .* is a mosaic of what"
            ):
                cache.read_views(1, np.array([one]))


@pytest.mark.parametrize("name", ["tiles", "partner_tiles"])
@pytest.mark.parametrize("values", [[ODD, 0, 1, 0, 2, 0], [-5] * 6, [0, 99, 1, 0, 2, 0]])
def test_canaries_with_impossible_tiles_are_damage(copy: Path, name: str, values: list[int]):
    cache = sc.open(copy)
    assert cache.manifest
    array = cache.manifest.constants[f"canary/{name}"].array(f"canary/{name}")
    rows = cache.constant(f"canary/{name}").copy()
    mixed = np.flatnonzero(cache.constant("canary/partner")[:, 0] >= 0)
    rows[mixed[0]] = values
    cache.store.path(array.file()).write_bytes(array.encode(rows))
    with pytest.raises(DamageError, match="not what a build writes"):
        sc.pair(sc.open(copy), sc.Source(testing.ToyImages(ODD)))


def test_the_canaries_see_their_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Changed(testing.ToyImages):
        """The image of one sample is negative."""

        def __init__(self, n: int, which: int):
            super().__init__(n)
            self.which = which

        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            image, label = super().__getitem__(i)
            return (255 - image if i == self.which else image), label

    cache = make(tmp_path / "c", samples=60, recipe="crop(8)|mosaic(scale=(1, 1.5))|mixup(alpha=8)")
    direct = set(cache.constant("canary/sample").tolist()) | set(
        cache.constant("canary/partner")[:, 0].tolist()
    )
    tiles = set(cache.constant("canary/tiles")[:, ::2].ravel().tolist())
    theirs = set(cache.constant("canary/partner_tiles")[:, ::2].ravel().tolist())
    for seen_in in (tiles - theirs - direct, theirs - tiles - direct):
        with pytest.raises(MismatchError, match="levels on average"):
            sc.pair(cache, sc.Source(Changed(60, min(seen_in))))
    sc.pair(cache, sc.Source(Changed(60, min(set(range(60)) - direct - tiles - theirs))))

    source = sc.Source(testing.ToyImages(60))
    image = source.image

    def broken(i: int) -> np.ndarray:
        if i == min(tiles - direct):
            raise UnreadableImage(f"cannot read {i}")
        return image(i)

    monkeypatch.setattr(source, "image", broken)
    with pytest.raises(MismatchError, match="cannot be rendered"):
        sc.pair(cache, source)


def test_caches_are_opened_together_where_their_partners_are_the_same(tmp_path: Path):
    recipe = "crop(8)|mosaic"
    cache = make(tmp_path / "one", recipe=recipe)
    make(tmp_path / "same", recipe=recipe, teacher=testing.toy_teacher(), targets={"logits": "full(f16)"})
    both = sc.open([tmp_path / "one", tmp_path / "same"])
    assert both.read_views(1, np.arange(ODD)) == cache.read_views(1, np.arange(ODD))
    backwards = sc.Source(testing.ToyImages(ODD))
    backwards._take(list(reversed(backwards._rows)))
    sc.build(tmp_path / "backwards", source=backwards, recipe=recipe, **OPTIONS)
    with pytest.raises(MismatchError, match=r"order of the ids differ: .* draws partners by their number"):
        sc.open([tmp_path / "one", tmp_path / "backwards"])
