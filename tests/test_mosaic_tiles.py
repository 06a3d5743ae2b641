"""Mosaics of tiles that keep their own proportions: ``mosaic(size)``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from test_mixed_cache import Holes
from test_mosaic import ODD, boxes_of, by_hand, make, picture

import softcache as sc
from softcache import testing
from softcache.cache import Cache
from softcache.errors import SourceError, SpecError
from softcache.geometry import parts, seen_in_all
from softcache.recipe import Recipe, View, gather, render
from softcache.recipe.mix import ONE
from softcache.recipe.mosaic import Frame, Mosaic, Tile
from softcache.recipe.opcodes import FACTOR, Op

# --- what is drawn ----------------------------------------------------------------------------------------------


def test_it_is_written_and_read_in_one_way():
    recipe = Recipe("flip|mosaic(64, p=1)|mixup(p=0.1)", 0)
    assert recipe.spec == "flip|mosaic(size=64)|mixup(p=0.1)" == Recipe(recipe.spec, 0).spec
    assert recipe.size == (64, 64) and Recipe("mosaic((48, 64))", 0).size == (48, 64)
    assert Recipe("2: flip|mosaic(416); resize((416, 416))|flip", 0).size == (416, 416)
    frame, _ = Recipe("mosaic((48, 64), fill=9)", 0).mosaic("a", 0, 0, 9)  # type: ignore[misc]
    assert (frame.fill, frame.width, frame.height) == (9, 64, 48)
    assert replace(frame, width=0, height=0) == Recipe("mosaic(fill=9)", 0).mosaic("a", 0, 0, 9)[0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("letterbox(64)|mosaic(64)", "'letterbox' gives all views the same: leave out 'letterbox', or write"),
        ("resize((32, 64))|zoom_out|mosaic(64)", "'resize' gives all views the same"),
        ("random_resized_crop(64)|mosaic(64)", "'random_resized_crop' gives all views the same"),
        ("random_affine(degrees=5)|mosaic(64)", "'random_affine' that turns or shears leaves no rectangle"),
        ("random_affine(shear=5)|hsv_jitter|mosaic(64)", "'random_affine' that turns"),
        ("zoom_out(fill=0)|mosaic(64)", "one grey in a view, and 'zoom_out' with 0 and 'mosaic' with 114"),
        ("mosaic(0)", "at least 1"),
        ("mosaic((1, 2, 3))", "number or"),
        ("mosaic(40000)", "at most 32767"),
        ("1: flip|mosaic(64); flip|mosaic(32)", "one size"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, says: str):
    with pytest.raises(SpecError, match=says):
        Recipe(spec, 0)


def test_a_view_that_is_no_mosaic_is_letterboxed_before_its_pixels_are_painted():
    plain, sized = (
        Recipe("letterbox((48, 64), fill=7)|cutout(8)", 0),
        "cutout(8)|mosaic((48, 64), fill=7, p=0)",
    )
    for width, height in ((30, 90), (97, 20), (1, 1), (3000, 40), (64, 48)):
        expected = plain.view("a", 0, width, height)
        view = Recipe(sized, 0).view("a", 0, width, height)
        assert view.pack() == expected.pack() and view.ops[:3] == (Op.FILL, 7, Op.ERASE)
        left, top, right, bottom = (np.array(view.ops[3:]) * [64, 48, 64, 48] / 32767).tolist()
        assert all(abs(edge - round(edge)) < 2e-3 for edge in (left, top, right, bottom))
    one = Recipe("flip|hsv_jitter|mosaic(64, p=0.5)", 5)
    mosaics = [one.mosaic("a", k, 0, 9) is not None for k in range(40)]
    assert 5 < sum(mosaics) < 35
    for k, tiled in enumerate(mosaics):
        assert one.joins("a", k) == tiled and len(one.view("a", k, 30, 50).ops) == one.parameters
        assert one.view("a", k, 30, 50).pack()[:4] == ((0, 0, 30, 50) if tiled else (-10, 0, 50, 50))
        assert one.view("a", k, 30, 50, alone=True).pack()[:4] == (-10, 0, 50, 50)
    every = Recipe("letterbox(64)|mosaic(p=0.5)", 5)
    assert all(every.joins("a", k) for k in range(40))


def test_an_affine_before_it_works_on_the_image_and_keeps_its_proportions():
    recipe, middles = Recipe("random_affine(translate=0.2, scale=0.5)|flip|mosaic(640)", 1), []
    for k in range(60):
        view = recipe.view("a", k, 1000, 300)
        assert abs(view.width / view.height * 0.3 - 1) < 0.01 and view.ops[:2] == (Op.FILL, 114)
        assert 1000 / 1.5 - 1 <= view.width <= 2000 + 1
        middles.append((view.x + view.width / 2 - 500, view.y + view.height / 2 - 150))
    assert 100 < np.abs(middles).max(axis=0)[0] <= 401 and 30 < np.abs(middles).max(axis=0)[1] <= 121


# --- pixels and boxes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("canvas", [(640, 640), (384, 640)])
def test_the_layout_is_ultralytics_with_any_image(canvas: tuple[int, int]):
    """Very wide, very high, one pixel: written out by hand; edges at the full and half size agree within a pixel."""
    recipe, (height, width) = Recipe(f"flip|mosaic({canvas})", 2), canvas
    sizes = [(40, 3000), (1, 1), (480, 640), (700, 31)]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    for k in range(6):
        views = [recipe.view(f"{i}", k, size[1], size[0]) for i, size in enumerate(sizes)]
        frame, _ = recipe.mosaic("0", k, 0, 4)  # type: ignore[misc]
        view = replace(views[0], mosaic=Mosaic(tuple(Tile(i, k, views[i]) for i in (1, 2, 3)), frame))
        for size in (canvas, (height // 2, width // 2)):
            pixels = render(images[0], view, size, dict(enumerate(images)))
            assert np.array_equal(pixels, by_hand(images, views, frame, size))
        large, small = (np.array(frame.pixels(views, (height // n, width // n))) for n in (1, 2))
        assert np.abs(large - 2 * small).max() <= 1
        for (rows, columns), place in zip(sizes, frame.places(views), strict=True):
            wide, high = (place[2] - place[0]) * width, (place[3] - place[1]) * height
            assert Fraction(wide, high) == Fraction(columns, rows)
            assert max(wide / width, high / height) == Fraction(frame.scale, FACTOR)


COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])


@pytest.mark.parametrize("size", [(480, 640), (240, 320), (500, 500)])
def test_painted_boxes_are_found_where_they_are_seen(size: tuple[int, int]):
    recipe, rng, checked = (
        Recipe("flip|vflip(p=0.3)|random_affine(scale=0.3)|mosaic((480, 640), fill=0)", 7),
        np.random.default_rng(3),
        0,
    )
    for k in range(25):
        images, views, boxes = [], [], {}
        for i in range(4):
            rows, columns = (int(n) for n in rng.integers(150, 600, 2))
            low = rng.integers(0, (columns - 80, rows - 80))
            box = [*low, *(low + rng.integers(30, 80, 2))]
            images.append(np.zeros((rows, columns, 3), np.uint8))
            images[i][box[1] : box[3], box[0] : box[2]] = COLOURS[i]
            views.append(recipe.view(f"{i}", k, columns, rows))
            boxes[i] = boxes_of([box], label=i)
        frame, _ = recipe.mosaic("0", k, 0, 4)  # type: ignore[misc]
        view = replace(views[0], mosaic=Mosaic(tuple(Tile(i, k, views[i]) for i in (1, 2, 3)), frame))
        pixels = render(images[0], view, size, dict(enumerate(images)))
        known = seen_in_all(view, 0, boxes, min_visible=0)
        for i in range(4):
            mask = (np.abs(pixels.astype(int) - COLOURS[i]) < 128).all(axis=2)
            y, x = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            at = np.flatnonzero(known.sample == i)
            if not len(x) or not len(at):
                sides = (known.boxes[at, 2:] - known.boxes[at, :2]) * size[::-1]
                assert not len(x) and (sides.min(initial=0) < 2)
                continue
            found = np.array([x[0], y[0], x[-1] + 1, y[-1] + 1])
            expected = known.boxes[at[0]] * (size[::-1] * 2)
            assert np.abs(found - expected).max() <= 1.5, (k, i)
            left, top, right, bottom = parts(view, 0)[i].place
            box = boxes[i].xyxy[0]
            share = (box[2] - box[0]) * (box[3] - box[1]) / (views[i].width * views[i].height)
            area = share * (right - left) * (bottom - top) * size[0] * size[1] * known.visible[at[0]]
            assert abs(mask.sum() - area) <= 2 * (found[2] - found[0] + found[3] - found[1]) + 4
            checked += 1
    assert checked > 50


@pytest.fixture
def augment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ultralytics' own augmentations, with its settings in a folder of its own and off the network."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    return pytest.importorskip(
        "ultralytics.data.augment", reason="needs ultralytics: the extra 'ultralytics'"
    )


class Labels:
    """What Ultralytics' mosaic asks of a dataset."""

    cache = "ram"

    def __init__(self, images: list[np.ndarray]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def get_image_and_label(self, i: int) -> dict[str, Any]:
        return {"img": self.images[i], "resized_shape": self.images[i].shape[:2]}


def test_tiles_lie_where_the_installed_ultralytics_lays_them(augment: Any, monkeypatch: pytest.MonkeyPatch):
    """Its canvas is twice the size: there a tile's scale is a half."""
    side, rng = 320, np.random.default_rng(0)
    if not hasattr(augment.Mosaic, "get_params"):
        pytest.skip("this ultralytics draws a mosaic in another method")
    for _ in range(20):
        sizes = [tuple(int(n) for n in rng.integers(10, 900, 2)) for _ in range(4)]
        # as its load_image resizes: the longer side is that of the tile
        resized = [tuple(-(-n * side // max(size)) for n in size) for size in sizes]
        images = [np.full((*size, 3), 50 * i, np.uint8) for i, size in enumerate(resized)]
        centre = rng.integers(side // 2, side * 3 // 2, 2).tolist()
        uniform: Iterator[int] = iter(centre)
        choices: Iterator[int] = iter([1, 2, 3])
        monkeypatch.setattr(random, "uniform", lambda a, b, uniform=uniform: next(uniform))
        monkeypatch.setattr(random, "randint", lambda a, b, choices=choices: next(choices))
        mosaic, labels = augment.Mosaic(Labels(images), imgsz=side), Labels(images).get_image_and_label(0)
        params = mosaic.get_params(labels)
        theirs = mosaic.apply_image(labels, params)["img"]
        monkeypatch.undo()

        y, x = (round(at * ONE / (2 * side)) for at in centre)
        frame = Frame(x, y, FACTOR // 2, 114, 2 * side, 2 * side)
        views = [View(0, 0, w, h, w, h, False) for h, w in sizes]
        for one, place in zip(params["layout"], frame.pixels(views, (2 * side, 2 * side)), strict=True):
            (high, wide), (left, top) = one["img_shape"], (one["padw"], one["padh"])
            assert np.abs(np.array(place) - [left, top, left + wide, top + high]).max() <= 1
        pictures = [np.full((h, w, 3), 50 * i, np.uint8) for i, (h, w) in enumerate(sizes)]
        view = replace(views[0], mosaic=Mosaic(tuple(Tile(i, 0, views[i]) for i in (1, 2, 3)), frame))
        mine = render(pictures[0], view, (2 * side, 2 * side), dict(enumerate(pictures)))
        # a pixel along the edges, of at most a tile's length each
        assert (mine != theirs).any(axis=2).sum() <= 8 * side


# --- caches -------------------------------------------------------------------------------------------------------

RECIPE = "2: flip|color_jitter(0.2)|mosaic(8, p=0.6)|mixup(p=0.5); resize((8, 8))|flip"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make(tmp_path_factory.mktemp("tiles") / "cache", recipe=RECIPE)


def test_the_teacher_saw_what_is_stored_and_tiles_are_whole_images(cache: Cache):
    """The rows as plain Zarr gives them explain the pixels, and the row of every tile is that of a mosaic too."""
    source, group = sc.Source(testing.ToyImages(ODD)), zarr.open_group(cache.path, mode="r")
    stored = {name: np.asarray(group[f"view/{name}"]) for name in ("geometry", "tiles", "mosaic")}
    positions, kinds = cache.grid.positions(np.arange(ODD)), set()
    for k in range(3):
        said = cache.read(k, np.arange(ODD))["pixels"].values
        for sample, view in enumerate(cache.read_views(k, np.arange(ODD))):
            images = gather(sample, view, source.image)
            assert np.array_equal(
                render(images[sample], view, (8, 8), images), said[sample].transpose(1, 2, 0)
            )
            tiles, frame, geometry = (
                stored[n][k, positions[sample]].tolist() for n in ("tiles", "mosaic", "geometry")
            )
            x, y, width, height, columns, rows, _ = geometry
            kinds.add((k < 2, view.mosaic is not None, view.mix is not None))
            if tiles[0] < 0:
                assert k == 2 or abs(width - height) <= 4
                assert frame == [0] * 6
                continue
            assert frame[4:] == [8, 8] and (x, y, width, height) == (0, 0, columns, rows)
            assert (stored["tiles"][k, positions[tiles[::2]]] >= 0).all()
            x, y, scale, fill = frame[0] / ONE, frame[1] / ONE, frame[2] / FACTOR, frame[3]
            pixels = np.full((80, 80, 3), fill, np.uint8)  # the canvas is its middle
            for n, who in enumerate([sample, *tiles[::2]]):
                _, _, width, height, *_ = stored["geometry"][k, positions[who]].tolist()
                wide, high = (scale * side / max(width, height) for side in (width, height))
                left, top = x - (n % 2 == 0) * wide, y - (n < 2) * high
                edges = [int(np.floor(8 * e + 0.5)) for e in (left, top, left + wide, top + high)]
                left, top, right, bottom = edges
                alone = cache.read_views(k, np.array([who]))[0]
                tile = render(
                    source.image(who), replace(alone, mosaic=None, mix=None), (bottom - top, right - left)
                )
                pixels[36 + top : 36 + bottom, 36 + left : 36 + right] = tile
            unmixed = render(images[sample], replace(view, mix=None), (8, 8), images)
            assert np.array_equal(pixels[36:44, 36:44], unmixed)
    assert kinds == {(True, a, b) for a in (True, False) for b in (True, False)} | {(False, False, False)}


def test_it_is_whole_and_a_builder_more_changes_nothing(cache: Cache, tmp_path: Path):
    source = sc.Source(testing.ToyImages(ODD))
    assert sc.verify(cache, read_data=True) == []
    assert "pixels equal" in sc.pair(cache, source, every=True).message
    other = make(tmp_path / "c", recipe=RECIPE, block_rows=13, batch=13, workers=4)
    for k in range(3):
        assert other.read_views(k, np.arange(ODD)) == cache.read_views(k, np.arange(ODD))


def test_where_no_other_is_a_mosaic_there_is_none(tmp_path: Path):
    """Of two samples in eight views: a mosaic where both drew one, and else both are letterboxed."""
    cache = make(tmp_path / "c", samples=2, recipe="flip|mosaic(8, p=0.5)", views=12)
    recipe, kinds = Recipe("flip|mosaic(8, p=0.5)", cache.identity["recipe"]["seed"]), set()
    for k in range(12):
        drawn = [recipe.joins(id, k) for id in cache.ids]
        for view in cache.read_views(k, np.arange(2)):
            assert (view.mosaic is not None) == all(drawn)
            whole = view.pack()[:4] == (0, 0, view.image_width, view.image_height)
            assert whole == all(drawn)
        kinds.add(sum(drawn))
    assert kinds == {0, 1, 2}
    assert sc.verify(cache, read_data=True) == []


def test_the_only_readable_image_has_no_partner(tmp_path: Path):
    images = Holes(3)
    images.holes = (0, 2)
    options: dict[str, Any] = {
        "teacher": testing.toy_teacher(),
        "targets": {"logits": "full(u8)"},
        "views": 1,
    }
    with pytest.raises(SourceError, match="is the only image that can be read"):
        sc.build(tmp_path / "c", source=sc.Source(images), recipe="mosaic(8)", skip_corrupt=True, **options)
