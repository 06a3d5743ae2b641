"""Promise 6: a cache is not paired with what it was not built from."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_manifest import at, sign

import softcache as sc
from softcache import canary
from softcache.cache import Cache
from softcache.errors import MismatchError
from softcache.recipe import OPS
from softcache.source import Source


@pytest.fixture
def images(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the images, to be changed."""
    return Path(shutil.copytree(small_folder, tmp_path / "images"))


def redraw(images: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            changed = change(image.convert("RGB"))
        changed.save(path)


def shifted(by: int) -> Callable[[Image.Image], Image.Image]:
    """Every value moved by ``by`` levels, within 0…255."""

    def change(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image).astype(np.int16)
        return Image.fromarray(np.where(pixels > 127, pixels - by, pixels + by).astype(np.uint8))

    return change


def recompressed(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return Image.open(data).convert("RGB")


# -- the right source ------------------------------------------------------------------------------------------


def test_the_source_it_was_built_from_is_paired(small_cache: Cache, small_folder: Path):
    pairing = sc.pair(small_cache, Source(small_folder))
    assert pairing.index.tolist() == list(range(20))
    assert pairing.classes is not None and pairing.classes.tolist() == [0, 1, 2, 3]
    assert "20 ids found" in pairing.message and "pixels equal" in pairing.message


def test_a_copy_elsewhere_is_the_same_source(small_cache: Cache, images: Path):
    assert "pixels equal" in sc.pair(small_cache, Source(images)).message


class Answers:
    """A source of its own making: ids, classes and images as given."""

    def __init__(self, source: Source, ids, classes, order):
        self.ids, self.classes, self._source, self._order = tuple(ids), classes, source, order
        self.ids_digest = "0" * 64
        self.labels = np.full(len(ids), -1)

    def image(self, i: int) -> np.ndarray:
        return self._source.image(self._order[i])

    def describe(self) -> str:
        return "a source of a test"


def test_samples_are_found_by_id_wherever_they_stand(small_cache: Cache, small_folder: Path):
    source = Source(small_folder)
    order = np.random.default_rng(0).permutation(20).tolist()
    mixed = Answers(source, [source.ids[i] for i in order], source.classes, order)
    pairing = sc.pair(small_cache, mixed)  # type: ignore[arg-type]
    assert [mixed.ids[i] for i in pairing.index] == list(small_cache.ids)


def test_a_source_with_more_samples_will_do(small_cache: Cache, images: Path):
    shutil.copy(images / "ant" / "0000.png", images / "ant" / "a-new-one.png")
    source = Source(images)
    pairing = sc.pair(small_cache, source)
    assert len(source) == 21 and [source.ids[i] for i in pairing.index] == list(small_cache.ids)


def test_other_labels_are_told(small_cache: Cache, images: Path):
    class Relabelled(Source):
        labels = np.zeros(20, np.int64)  # type: ignore[assignment]

    assert "labels are not those" in sc.pair(small_cache, Relabelled(images)).message
    assert "labels" not in sc.pair(small_cache, Source(images)).message


def test_every_image_is_compared_when_asked(small_cache: Cache, images: Path):
    assert "every image the same" in sc.pair(small_cache, Source(images), every=True).message
    canaries = {small_cache.ids[i] for i in small_cache.constant("canary/sample").tolist()}
    other = next(id for id in small_cache.ids if id not in canaries)
    shutil.copy(images / next(iter(canaries)), images / other)
    sc.pair(small_cache, Source(images))  # the canaries alone do not see it
    with pytest.raises(MismatchError, match="is not what it was when the cache"):
        sc.pair(small_cache, Source(images), every=True)


# -- another source --------------------------------------------------------------------------------------------


def test_missing_ids_are_refused_and_counted(small_cache: Cache, images: Path):
    (images / "bee" / "0005.png").unlink()
    (images / "bee" / "0009.png").unlink()
    with pytest.raises(
        MismatchError, match=r"2 of the cache's 20 ids are not in .*'bee/0005\.png'"
    ) as caught:
        sc.pair(small_cache, Source(images))
    assert caught.value.exit_code == 3


def test_classes_are_matched_by_name_and_the_mapping_is_told(small_cache: Cache, small_folder: Path):
    source = Source(small_folder)
    other = Answers(source, source.ids, ("dog", "bee", "ant", "cow"), range(20))
    pairing = sc.pair(small_cache, other)  # type: ignore[arg-type]
    assert pairing.classes is not None and pairing.classes.tolist() == [3, 1, 0, 2]
    assert "classes matched by name: dog 0→3, ant 2→0, cow 3→2" in pairing.message


def test_a_source_may_lack_classes_of_the_cache(small_cache: Cache, small_folder: Path):
    source = Source(small_folder)
    pairing = sc.pair(small_cache, Answers(source, source.ids, ("bee", "dog"), range(20)))  # type: ignore[arg-type]
    assert pairing.classes is not None and pairing.classes.tolist() == [1, 3]


def test_a_class_the_cache_does_not_know_is_refused(small_cache: Cache, small_folder: Path):
    source = Source(small_folder)
    other = Answers(source, source.ids, ("ant", "bee", "cow", "eel"), range(20))
    with pytest.raises(MismatchError, match=r"class 'eel' is not one of the cache's: ant, bee, cow, dog"):
        sc.pair(small_cache, other)  # type: ignore[arg-type]


def test_a_source_without_class_names_is_paired_by_id_alone(small_cache: Cache, small_folder: Path):
    source = Source(small_folder)
    pairing = sc.pair(small_cache, Answers(source, source.ids, None, range(20)))  # type: ignore[arg-type]
    assert pairing.classes is None and "no class names" in pairing.message


# -- other pixels ----------------------------------------------------------------------------------------------


def test_resized_images_are_refused(small_cache: Cache, images: Path):
    redraw(images, lambda image: image.resize((image.width * 2, image.height)))
    with pytest.raises(MismatchError, match="resized"):
        sc.pair(small_cache, Source(images))


def test_images_compressed_again_are_refused(small_cache: Cache, images: Path):
    redraw(images, recompressed)
    with pytest.raises(MismatchError, match=r"differ by .* levels .*compressed again"):
        sc.pair(small_cache, Source(images))


def test_images_that_changed_places_are_refused(small_cache: Cache, small_folder: Path):
    """The ids are right and every image is a good one, of another sample and perhaps another size."""
    source = Source(small_folder)
    wrong = Answers(source, source.ids, source.classes, [(i + 1) % 20 for i in range(20)])
    with pytest.raises(MismatchError):
        sc.pair(small_cache, wrong)  # type: ignore[arg-type]


def test_channels_that_changed_places_are_refused(small_cache: Cache, images: Path):
    redraw(images, lambda image: Image.fromarray(np.asarray(image)[:, :, ::-1]))
    with pytest.raises(MismatchError, match="levels"):
        sc.pair(small_cache, Source(images))


@pytest.mark.parametrize(("by", "allowed"), [(1, True), (3, False)])
def test_a_tiny_difference_is_told_and_allowed_and_a_larger_one_is_not(
    small_cache: Cache, images: Path, by: int, allowed: bool
):
    redraw(images, shifted(by))
    if not allowed:
        with pytest.raises(MismatchError, match=r"differ by .* levels on average \(at most 1 is allowed"):
            sc.pair(small_cache, Source(images))
        return
    message = sc.pair(small_cache, Source(images)).message
    assert "pixels differ by" in message and "(allowed: 1)" in message


def test_the_tolerance_can_be_none_at_all(small_cache: Cache, images: Path):
    redraw(images, shifted(1))
    with pytest.raises(MismatchError):
        sc.pair(small_cache, Source(images), tolerance=0)


def test_a_canary_that_cannot_be_decoded_is_refused(small_cache: Cache, images: Path):
    for path in images.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(MismatchError, match="canary"):
        sc.pair(small_cache, Source(images))


# -- other operations ------------------------------------------------------------------------------------------


def test_an_op_of_another_version_is_refused(small_cache: Cache, small_folder: Path, monkeypatch):
    newer = dataclasses.make_dataclass("Newer", [], bases=(OPS["flip"],), frozen=True)
    newer.version = 2
    monkeypatch.setitem(OPS, "flip", newer)
    with pytest.raises(MismatchError, match="version 1 of 'flip', and this softcache has 2"):
        sc.pair(small_cache, Source(small_folder))


def test_another_way_to_render_is_refused(small_cache: Cache, small_folder: Path, monkeypatch):
    monkeypatch.setattr(canary, "RENDER_VERSION", 2)
    with pytest.raises(MismatchError, match="version 1 of 'render', and this softcache has 2"):
        sc.pair(small_cache, Source(small_folder))


def test_an_op_this_version_does_not_have_is_refused(small_copy: Path, small_folder: Path):
    sign(small_copy, at("identity", "recipe", "ops", "hue", to=1))
    with pytest.raises(MismatchError, match="'hue', and this softcache has none"):
        sc.pair(sc.open(small_copy), Source(small_folder))


# -- which rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "views", "invalid"), [(20, 2, []), (3, 1, []), (1, 1, []), (9, 3, [0, 4, 8])]
)
def test_canaries_are_valid_rows_and_never_twice(samples: int, views: int, invalid: list[int]):
    rows = canary.choose(samples, views, invalid, seed=5)
    assert len(rows) == len(set(rows)) == min(canary.COUNT, (samples - len(invalid)) * views)
    assert all(0 <= s < samples and 0 <= v < views and s not in invalid for s, v in rows)
    assert rows == canary.choose(samples, views, invalid, seed=5)


def test_canary_pixels_are_what_the_teacher_saw(small_cache: Cache, small_folder: Path):
    source = Source(small_folder)
    rows = canary.choose(20, 2, [], seed=0)
    assert small_cache.constant("canary/sample").tolist() == [s for s, _ in rows]
    for (sample, k), pixels in zip(rows, small_cache.constant("canary/pixels"), strict=True):
        view = small_cache.read_views(k, np.array([sample]))[0]
        assert np.array_equal(sc.render(source.image(sample), view, (8, 8)), pixels)
