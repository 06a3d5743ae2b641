"""An image is decoded once for several views, and no byte on disk tells."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache import builder, commission, loop
from softcache.block import Grid
from softcache.source import Source
from softcache.store import Store
from softcache.testing import ToyImages, make_image_folder, toy_teacher

BUILD: dict[str, Any] = {
    "recipe": "random_resized_crop(8)|flip|color_jitter(brightness=0.4)",
    "targets": {"logits": "full(u8)", "map": "int8"},
    "views": 5,
    "block_rows": 8,
    "batch": 3,
    "progress": False,
}
ONE_VIEW = (
    8 * (8 + 4096 + 32 + 14 + 4) + 2 * 3 * 8 * 8 * 3
)  # a block as it is encoded, and two batches of pixels


def build(out: Path, source: Any, **options: Any) -> sc.Cache:
    return sc.build(out, source=source, teacher=toy_teacher(), **BUILD | options)


def files(cache: sc.Cache) -> dict[str, bytes]:
    return {str(p.relative_to(cache.path)): p.read_bytes() for p in cache.path.rglob("*") if p.is_file()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each image was decoded for the blocks (not to try the recipe, and for the canaries at the end)."""
    counts: Counter[int] = Counter()
    image = Source.image

    def counted(self: Source, i: int) -> np.ndarray:
        counts[i] += 1
        return image(self, i)

    def uncounted(stage: Any) -> Any:
        def run(*args: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(Source, "image", image)
                return stage(*args)

        return run

    monkeypatch.setattr(Source, "image", counted)
    for where, stage in ((commission, "prepare"), (builder, "finish")):
        monkeypatch.setattr(where, stage, uncounted(getattr(where, stage)))
    return counts


ROOMS = [(1 << 28, 1), (5 * ONE_VIEW, 1), (5 * ONE_VIEW - 1, 2), (2 * ONE_VIEW, 3), (0, 5)]


@pytest.mark.parametrize(("room", "groups"), ROOMS)
def test_an_image_is_decoded_once_a_group_of_views_and_the_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: Counter[int], room: int, groups: int
):
    monkeypatch.setattr(loop, "_TOGETHER", 0)
    alone = build(tmp_path / "alone", ToyImages(21), workers=1)
    assert decoded == dict.fromkeys(range(21), 5)
    decoded.clear()
    monkeypatch.setattr(loop, "_TOGETHER", room)
    cache = build(tmp_path / "together", ToyImages(21), workers=3)
    assert decoded == dict.fromkeys(range(21), groups)
    assert files(cache) == files(alone)


def test_skipped_images_are_skipped_in_every_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = make_image_folder(tmp_path / "images", per_class=5)
    for name in ("ant/0000.png", "cow/0006.png", "bee/0005.png"):
        (images / name).write_bytes(b"no image")
    cache = build(tmp_path / "together", images, skip_corrupt=True)
    monkeypatch.setattr(loop, "_TOGETHER", 0)
    assert files(cache) == files(build(tmp_path / "alone", images, skip_corrupt=True))
    assert len(cache.invalid) == 3 and sc.verify(cache, read_data=True) == []


def test_a_build_goes_on_in_the_views_that_are_missing(tmp_path: Path, decoded: Counter[int]):
    cache = build(tmp_path / "c", ToyImages(21))
    whole = files(cache)
    decoded.clear()
    (cache.path / "softcache.json").unlink()
    for view in (1, 3):
        (cache.path / "receipts" / f"v{view:04d}-b000001.json").unlink()
    again = build(tmp_path / "c", ToyImages(21))
    block = cache.grid.samples_of(cache.grid.block(1, 1)).tolist()
    assert decoded == dict.fromkeys(block, 1) and again.teacher_rows == 2 * len(block)
    assert files(again) == whole


def test_a_view_that_another_builder_holds_is_left_to_it(tmp_path: Path):
    whole = build(tmp_path / "whole", ToyImages(21))
    store = Store(tmp_path / "c")
    with store.claim("v0002-b000001") as mine:
        assert mine
        thread = threading.Thread(target=build, args=(tmp_path / "c", ToyImages(21)))
        thread.start()
        until = time.monotonic() + 60
        while len(list(store.root.glob("receipts/v*.json"))) < 14 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        receipts = {p.stem for p in store.root.glob("receipts/v*.json")}
        assert len(receipts) == 14 and "v0002-b000001" not in receipts
    thread.join(60)
    assert files(sc.open(store.root)) == files(whole)


def groups_of(samples: int, views: int, world: int, row: int = 40, first: int = 0) -> list[list[Any]]:
    job: Any = SimpleNamespace(
        grid=Grid(samples, views, 1024, 0),
        teacher=SimpleNamespace(input_spec=SimpleNamespace(size=(224, 224))),
        arrays=[SimpleNamespace(row_bytes=row)],
        batch=64,
        bases=SimpleNamespace(views=first),
    )
    return loop.groups(job, world)


@pytest.mark.parametrize("first", [2, 6, 9])
@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("row", [40, 1 << 20])
def test_the_views_that_bases_are_made_of_are_in_one_group(first: int, world: int, row: int):
    groups = groups_of(5000, 9, world, row, first)
    assert sorted(b for group in groups for b in group) == list(Grid(5000, 9, 1024, 0).blocks())
    for group in groups:
        assert len({b.index for b in group}) == 1
        views = [b.view for b in group]
        assert views[0] >= first or (views[0] == 0 and views[-1] >= first - 1)


@pytest.mark.parametrize("views", [1, 2, 7, 10, 40])
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("row", [40, 16_384, 1 << 20])
def test_groups_are_all_blocks_of_the_same_samples_in_few_and_even_parts(views: int, world: int, row: int):
    groups = groups_of(5000, views, world, row)
    blocks = [b for group in groups for b in group]
    assert sorted(blocks) == list(Grid(5000, views, 1024, 0).blocks())
    assert all(len({b.index for b in group}) == 1 for group in groups)
    assert len(groups) >= min(world, len(blocks))
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1
    held = max(sizes) * (1024 * row + 2 * 64 * 224 * 224 * 3)
    assert max(sizes) == 1 or held <= 256 << 20


def test_a_small_dataset_of_many_views_still_feeds_every_builder():
    assert len(groups_of(1000, 10, 1)) == 1
    assert len(groups_of(1000, 10, 4)) >= 4


def test_what_a_build_holds_in_memory_does_not_grow_with_the_dataset(tmp_path: Path):
    def peak(samples: int) -> int:
        tracemalloc.start()
        try:
            build(tmp_path / str(samples), ToyImages(samples), block_rows=16, targets={"map": "int8"})
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)  # what is imported on the way
    assert peak(144) < 1.25 * peak(48)
