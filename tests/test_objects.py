"""Codecs that ask what a view shows are given it, row by row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import softcache as sc
from softcache import codecs
from softcache.codecs import NOTHING, Field, Fields, Objects
from softcache.errors import SpecError
from softcache.geometry import seen_in_all
from softcache.source import Boxes
from softcache.targets import Target
from softcache.testing import ToyImages, toy_detector

PLACES = 300


@dataclass(frozen=True)
class Told:
    """Keeps nothing but what it was told."""

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("feature_map",)
    limit: ClassVar[float] = 65504.0
    boxed: ClassVar[bool] = True

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        return Field("boxes", "float32", (PLACES, 4)), Field("label", "int64", (PLACES,))

    def encode(self, values: np.ndarray, objects: Sequence[Objects]) -> Fields:
        found = {
            "boxes": np.zeros((len(values), PLACES, 4), np.float32),
            "label": np.full((len(values), PLACES), -1),
        }
        for row, shown in enumerate(objects):
            found["boxes"][row, : len(shown)] = shown.boxes
            found["label"][row, : len(shown)] = shown.label
        return found

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        return np.concatenate([fields["boxes"], fields["label"][..., None]], axis=-1)

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(len(fields["label"]), np.inf)

    def exact(self, values: np.ndarray) -> np.ndarray:
        return np.zeros((len(values), PLACES, 5))


@dataclass(frozen=True)
class ToldClasses(Told):
    labelled: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(codecs.CODECS, "told", Told)
    monkeypatch.setitem(codecs.CODECS, "told_classes", ToldClasses)


def build(path: Path, source: Any, **more: Any) -> sc.Cache:
    options: dict[str, Any] = {
        "teacher": toy_detector(), "targets": {"p3": "told"}, "views": 3, "batch": 4, "ignore_labels": True,
        "block_rows": 8, "progress": False, "recipe": "letterbox(16)",
    }  # fmt: skip
    return sc.build(path, source=source, **(options | more))


@pytest.mark.parametrize(
    "recipe",
    [
        "letterbox(16)",
        "crop(100, pad=10)|flip",
        "1: letterbox(16)|flip|mosaic|mixup(alpha=8, p=0.7); letterbox(16)",
    ],
)
def test_every_row_is_given_what_its_view_shows(shared_data: Path, tmp_path: Path, recipe: str):
    source = sc.Source(shared_data / "coco356", split="val2017", limit=13)
    cache = build(tmp_path / "c", source, recipe=recipe)
    crowds = 0
    for k in range(3):
        given = cache.read(k, np.arange(13), ["p3"])["p3"].values
        for sample, view in enumerate(cache.read_views(k, np.arange(13))):
            theirs = {i: source.boxes(i) or Boxes.empty() for i in (sample, *view.others)}
            shown = seen_in_all(view, sample, theirs, size=(16, 16))
            there = [i for i in range(len(shown.label)) if not (shown.crowd[i] or shown.ignore[i])]
            crowds += len(shown.label) - len(there)
            row = given[sample][given[sample][:, 4] >= 0]
            assert np.allclose(row[:, :4], shown.boxes[there], atol=1e-6) and row[:, 4].tolist() == [
                shown.label[i] for i in there
            ]
    assert crowds


def test_rows_without_an_image_are_given_nothing(shared_data: Path, tmp_path: Path):
    data = tmp_path / "coco"
    with_boxes = sc.Source(shared_data / "coco356", split="val2017", limit=6)
    (data / "annotations").mkdir(parents=True)
    (data / "val2017").mkdir()
    for id in with_boxes.ids:
        shutil.copy(shared_data / "coco356" / "images" / "val2017" / id, data / "val2017" / id)
    said = json.loads((shared_data / "coco356/annotations/instances_val2017.json").read_text())
    said["images"] = [one for one in said["images"] if one["file_name"] in with_boxes.ids]
    numbers = {one["id"] for one in said["images"]}
    said["annotations"] = [one for one in said["annotations"] if one["image_id"] in numbers]
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(said))
    file = data / "val2017" / with_boxes.ids[2]
    file.write_bytes(file.read_bytes()[:400])
    cache = build(tmp_path / "c", sc.Source(data, split="val2017"), skip_corrupt=True)
    assert cache.invalid.tolist() == [2]
    kept = cache.reader.fields("targets/p3", 1, cache.grid.positions(np.arange(6)), False)
    assert (kept["label"][2] == -1).all() and (kept["label"][:2, 0] >= 0).all()


def test_boxes_of_no_source_and_classes_of_no_order_are_refused(shared_data: Path, tmp_path: Path):
    with pytest.raises(
        SpecError, match=r"'told' asks where the boxes are, and .* has none: name a source with boxes"
    ):
        build(tmp_path / "c", ToyImages(8))
    source = sc.Source(shared_data / "coco356", split="val2017", limit=4)
    with pytest.raises(
        SpecError, match="'told_classes' compares the boxes' classes with the teacher's, and ignore_labels"
    ):
        build(tmp_path / "c", source, targets={"p3": "told_classes"})
    assert not (tmp_path / "c").exists()


def test_a_codec_that_does_not_ask_is_given_nothing():
    target = Target("p3", "feature_map", (6, 5, 7), "int8", codecs.parse("int8").codec)
    values = np.random.default_rng(0).normal(size=(2, 6, 5, 7)).astype(np.float32)
    assert not target.boxed
    found, alone = target.encode(values, [NOTHING] * 2, {}), target.codec.encode(values)
    assert all(np.array_equal(found[name], alone[name]) for name in alone)
