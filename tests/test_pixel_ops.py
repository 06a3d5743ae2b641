"""Pixel ops: drawn by the recipe, kept in the view, replayed bit for bit, at any size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import softcache as sc
from softcache import canary
from softcache import manifest as m
from softcache.errors import DamageError, SpecError
from softcache.recipe import Recipe, View, render
from softcache.source import Source
from softcache.testing import ToyImages

RECIPES = ["grayscale", "random_resized_crop(8)|flip|grayscale(p=0.4)|grayscale"]


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
    cache = build(tmp_path / "c", RECIPES[1])
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


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ops",
    [(17,), (-1,), (1,), (1, -1), (0, 7, 0), (7, 9), (5, 129), (16, 1, 2, 3), (16, 9, 0, 8, 9), (15, 18001)],
    ids=str,
)
def test_ops_that_no_recipe_draws_are_damage(ops: tuple[int, ...]):
    with pytest.raises(DamageError, match="which no recipe draws"):
        replayed(picture(8, 8), *ops)


def test_geometry_after_pixels_is_refused():
    with pytest.raises(SpecError, match="'flip' comes after 'grayscale'"):
        Recipe("crop(4)|grayscale|flip", 0)


def test_a_manifest_cannot_ask_for_more_numbers_than_a_recipe_draws():
    recipe = Recipe("identity", 0).identity() | {"parameters": 1025}
    with pytest.raises(ValueError, match="parameters"):
        m.RecipeId.model_validate(recipe)
