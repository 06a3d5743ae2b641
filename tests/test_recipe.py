from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from softcache.errors import MismatchError, SpecError
from softcache.recipe import OPS, Recipe, View, render

SPECS = [
    "crop(32, pad=4)|flip",
    "flip|crop((20, 28), pad=9)|flip",
    "random_resized_crop(24)",
    "resize(40)|center_crop(32)|flip",
    "resize((50, 60))|crop(32)",
    "identity",
]

int16 = st.integers(-32767, 32767)
sides = st.integers(1, 60)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    channels = [255 * x / width, 255 * y / height, 127 * (x / width + y / height)]
    return np.stack(channels, axis=-1).astype(np.uint8)


# --- View ---------------------------------------------------------------------------------------


@given(st.builds(View, int16, int16, *[st.integers(1, 32767)] * 4, st.booleans()))
def test_a_view_survives_its_int16_row(view: View):
    row = np.array(view.pack(), np.int16)
    assert row.shape == (View.FIELDS,)
    again = View.unpack(row)
    assert again == view
    assert type(again.x) is int and type(again.flip) is bool


def test_an_image_too_large_for_a_view_is_refused():
    assert Recipe("identity", 0).view("a", 0, 32767, 1).image_width == 32767
    with pytest.raises(SpecError, match="32767"):
        Recipe("identity", 0).view("a", 0, 32768, 1)


# --- Recipe: a pure function --------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@given(data=st.data())
def test_views_depend_on_their_keys_and_never_on_order(spec: str, data: st.DataObject):
    keys = [(f"id{i}", k) for i in range(4) for k in range(3)]
    shuffled = data.draw(st.permutations(keys))
    recipe, again = Recipe(spec, 7), Recipe(spec, 7)
    one = {key: recipe.view(*key, 48, 36) for key in keys}
    assert {key: again.view(*key, 48, 36) for key in shuffled} == one


def test_seed_id_view_and_position_each_change_the_draws():
    recipe = Recipe("crop(8)|crop(4)", 0)
    base = [recipe.view(f"id{i}", 0, 4096, 4096) for i in range(8)]
    assert base != [Recipe("crop(8)|crop(4)", 1).view(f"id{i}", 0, 4096, 4096) for i in range(8)]
    assert base != [recipe.view(f"id{i}", 1, 4096, 4096) for i in range(8)]
    assert len(set(base)) == 8


def test_a_known_view_stays_what_it_is():
    # stored caches depend on these: a change here needs a new op version
    assert Recipe("crop(32, pad=4)|flip", 0).view("a", 0, 40, 40).pack() == (
        11,
        -1,
        32,
        32,
        40,
        40,
        0,
    )
    assert Recipe("random_resized_crop(24)", 3).view("b", 5, 100, 80).pack() == (
        42,
        22,
        47,
        53,
        100,
        80,
        0,
    )


@pytest.mark.parametrize(
    ("spec", "canonical", "size"),
    [
        ("crop(size=32, pad=4) | flip()", "crop(32, pad=4)|flip", (32, 32)),
        ("crop(32, pad=0)|flip(p=0.5)", "crop(32)|flip", (32, 32)),
        ("flip(p=1.0)", "flip(p=1)", None),
        (
            "random_resized_crop((16, 24), scale=[0.5, 1.0])",
            "random_resized_crop((16, 24), scale=(0.5, 1))",
            (16, 24),
        ),
        ("resize(40)", "resize(40)", None),
        ("resize((20, 30))|resize(10)", "resize((20, 30))|resize(10)", (10, 15)),
        ("resize(256)|center_crop(224)|flip", "resize(256)|center_crop(224)|flip", (224, 224)),
        ("identity", "identity", None),
    ],
)
def test_canonical_spec_and_size(spec: str, canonical: str, size: tuple[int, int] | None):
    recipe = Recipe(spec, 0)
    assert (recipe.spec, recipe.size) == (canonical, size)
    assert Recipe(canonical, 0) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_identity_is_json_and_names_what_changes_pixels():
    identity = Recipe("crop(32, pad=4)|flip", 5).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["ops"] == {"crop": 1, "flip": 1}
    assert identity["spec"] == "crop(32, pad=4)|flip" and identity["seed"] == 5
    assert set(identity["render"]) == {"version", "pillow"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "identity"),
        ("cropp(32)", "did you mean 'crop'"),
        ("crop", "size"),
        ("crop(0)", "at least 1"),
        ("crop(True)", "whole number"),
        ("crop(3.5)", "whole number"),
        ("crop((1, 2, 3))", "height, width"),
        ("crop(3, pad=-1)", "at least 0"),
        ("crop(3, padding=1)", "pad"),
        ("flip(p=1.5)", "probability"),
        ("flip(p=yes)", "probability"),
        ("resize(-1)", "at least 1"),
        ("center_crop(big)", "whole number"),
        ("random_resized_crop(8, scale=(0.5, 2.0))", "at most 1"),
        ("random_resized_crop(8, scale=(0.0, 1.0))", "0 < low"),
        ("random_resized_crop(8, ratio=(2, 1))", "low <= high"),
        ("random_resized_crop(8, ratio=3)", "low, high"),
        ("random_resized_crop(8, ratio=(3/4, 4/3))", "3 / 4"),
    ],
)
def test_specs_that_cannot_be_understood(spec: str, says: str):
    with pytest.raises(SpecError, match=says):
        Recipe(spec, 0)


def test_a_crop_larger_than_its_image_names_both():
    with pytest.raises(SpecError, match=r"'cat/1.png'.*32x30.*pad=1"):
        Recipe("crop(33, pad=1)", 0).view("cat/1.png", 0, 32, 30)


def test_every_op_says_which_version_it_is():
    assert all(isinstance(op.version, int) for op in OPS.values())


# --- geometry -----------------------------------------------------------------------------------


def by_pixel(image: np.ndarray, view: View) -> np.ndarray:
    """The definition of an unresampled view, one pixel at a time."""
    out = np.zeros((view.height, view.width, 3), np.uint8)
    for row in range(view.height):
        for column in range(view.width):
            from_left = view.width - 1 - column if view.flip else column
            y, x = view.y + row, view.x + from_left
            if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
                out[row, column] = image[y, x]
    return out


@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    x=st.integers(-15, 15),
    y=st.integers(-15, 15),
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    flip=st.booleans(),
)
def test_render_is_crop_zeros_and_mirror(height, width, x, y, rows, columns, flip):
    image = picture(height, width)
    view = View(x, y, columns, rows, width, height, flip)
    pixels = render(image, view, (rows, columns))
    assert np.array_equal(pixels, by_pixel(image, view))
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert not np.shares_memory(pixels, image)


@given(
    height=sides,
    width=sides,
    seed=st.integers(0, 99),
    crop=st.tuples(sides, sides),
    pad=st.integers(0, 9),
)
def test_crops_without_a_resize_are_exact_on_any_chain(height, width, seed, crop, pad):
    """Ops on pixels, one after the other, against ops on the canvas."""
    crop = min(crop[0], height + 2 * pad), min(crop[1], width + 2 * pad)
    inner = max(1, crop[0] // 2), max(1, crop[1] // 2)
    spec = f"flip(p=1)|crop({crop}, pad={pad})|flip(p=1)|center_crop({inner})"
    view = Recipe(spec, seed).view("a", 0, width, height)
    outer = Recipe(f"flip(p=1)|crop({crop}, pad={pad})", seed).view("a", 0, width, height)
    image = picture(height, width)
    once = render(image, outer, crop)[:, ::-1]
    top, left = round((crop[0] - inner[0]) / 2), round((crop[1] - inner[1]) / 2)
    expected = once[top : top + inner[0], left : left + inner[1]]
    assert np.array_equal(render(image, view, inner), expected)


def test_a_later_crop_falls_where_the_flipped_image_has_it():
    image = picture(10, 10)
    view = Recipe("flip(p=1)|crop(4)", 0).view("a", 3, 10, 10)
    straight = Recipe("flip(p=0)|crop(4)", 0).view("a", 3, 10, 10)  # the same draws
    y, x = straight.y, straight.x
    assert np.array_equal(render(image, view, (4, 4)), image[:, ::-1][y : y + 4, x : x + 4])


@given(height=sides, width=sides, size=st.tuples(sides, sides))
def test_center_crop_is_torchvisions(height, width, size):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = picture(height, width)
    view = Recipe(f"center_crop({size})", 0).view("a", 0, width, height)
    expected = functional.center_crop(Image.fromarray(image), list(size))
    assert np.array_equal(render(image, view, size), np.asarray(expected))


@given(seed=st.integers(0, 50), height=st.integers(20, 40), width=st.integers(20, 40))
def test_padded_crop_and_flip_are_torchvisions(seed, height, width):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = picture(height, width)
    view = Recipe("crop((22, 24), pad=4)|flip", seed).view("a", 0, width, height)
    padded = functional.pad(Image.fromarray(image), [4])
    expected = functional.crop(padded, view.y + 4, view.x + 4, 22, 24)
    if view.flip:
        expected = functional.hflip(expected)
    assert np.array_equal(render(image, view, (22, 24)), np.asarray(expected))


@pytest.mark.parametrize("spec", ["resize(20)", "resize((17, 40))", "resize(50)", "identity"])
def test_resizing_the_whole_image_is_pillows(spec: str):
    image = picture(37, 29)
    recipe = Recipe(spec, 0)
    view = recipe.view("a", 0, 29, 37)
    assert view.pack() == (0, 0, 29, 37, 29, 37, 0)
    height, width = recipe.size or (25, 20)
    expected = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    assert np.array_equal(render(image, view, (height, width)), np.asarray(expected))


def test_resize_then_center_crop_shows_the_middle():
    view = Recipe("resize(256)|center_crop(224)", 0).view("a", 0, 512, 512)
    assert view.pack() == (32, 32, 448, 448, 512, 512, 0)


@pytest.mark.parametrize("spec", ["crop(32, pad=4)|flip", "random_resized_crop(32)|flip"])
def test_the_same_view_at_twice_the_size_is_the_same_geometry(spec: str):
    image = gradient(96, 96)
    for k in range(10):
        view = Recipe(spec, 0).view("a", k, 96, 96)
        small, large = render(image, view, (32, 32)), render(image, view, (64, 64))
        halved = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        inner = np.s_[2:-2, 2:-2]  # at the edges the filter has less to look at
        if view.x >= 0 and view.y >= 0 and view.x + view.width <= 96 and view.y + view.height <= 96:
            assert np.abs(halved - small)[inner].max() <= 3


def test_a_view_never_becomes_empty():
    view = Recipe("resize(900)|crop(1)", 0).view("a", 0, 3, 2)
    assert view.width == view.height == 1
    assert 0 <= view.x < 3 and 0 <= view.y < 2


def test_an_image_of_another_size_is_refused():
    view = Recipe("identity", 0).view("a", 0, 32, 32)
    with pytest.raises(MismatchError, match=r"32x32.*31x32"):
        render(picture(32, 31), view, (32, 32))


def test_one_number_is_a_square_and_no_size_is_refused():
    view = Recipe("identity", 0).view("a", 0, 32, 32)
    assert np.array_equal(render(picture(32, 32), view, 8), render(picture(32, 32), view, (8, 8)))
    for wrong in (0, (0, 3), (8, 8, 3), 8.0, True, "8", None):
        with pytest.raises(
            SpecError, match="it is \\(h, w\\) in whole pixels, at least 1, or both in one number"
        ):
            render(picture(32, 32), view, wrong)


# --- statistics ---------------------------------------------------------------------------------


def test_random_resized_crop_keeps_to_its_ranges():
    recipe = Recipe("random_resized_crop(64, scale=(0.2, 0.8))", 0)
    views = [recipe.view(str(i), 0, 400, 300) for i in range(1500)]
    areas = np.array([v.width * v.height for v in views]) / (400 * 300)
    ratios = np.array([v.width / v.height for v in views])
    assert areas.min() > 0.195 and areas.max() < 0.805
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    assert all(v.x >= 0 and v.x + v.width <= 400 for v in views)
    assert all(v.y >= 0 and v.y + v.height <= 300 for v in views)


def test_random_resized_crop_is_distributed_as_torchvisions():
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    recipe = Recipe("random_resized_crop(64)", 0)
    views = [recipe.view(str(i), 0, 400, 300) for i in range(3000)]
    ours = np.array([(v.y, v.x, v.height, v.width) for v in views])
    torch.manual_seed(0)
    image, ranges = Image.new("RGB", (400, 300)), ([0.08, 1.0], [3 / 4, 4 / 3])
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, *ranges) for _ in range(3000)])
    for percent in (10, 50, 90):
        difference = np.percentile(ours, percent, axis=0) - np.percentile(theirs, percent, axis=0)
        assert np.abs(difference).max() < 12


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000)])
def test_random_resized_crop_falls_back_to_the_middle(width: int, height: int):
    view = Recipe("random_resized_crop(64, scale=(1.0, 1.0))", 0).view("a", 0, width, height)
    assert (view.width, view.height) in [(13, 10), (10, 13)]
    assert abs(2 * view.x + view.width - width) <= 1
    assert abs(2 * view.y + view.height - height) <= 1


@pytest.mark.parametrize(("p", "low", "high"), [(0.5, 0.46, 0.54), (0.1, 0.07, 0.13), (0, 0, 0), (1, 1, 1)])
def test_flip_frequency(p: float, low: float, high: float):
    recipe = Recipe(f"flip(p={p})", 0)
    share = np.mean([recipe.view(str(i), 0, 8, 8).flip for i in range(2000)])
    assert low <= share <= high


def test_crop_positions_cover_the_padded_canvas_evenly():
    recipe = Recipe("crop(32, pad=4)", 0)
    xs = [recipe.view(str(i), 0, 32, 32).x for i in range(3600)]
    counts = np.bincount(np.array(xs) + 4, minlength=9)
    assert len(counts) == 9 and counts.min() > 320 and counts.max() < 480
