"""Boxes to probe are a pure function of what a cache names, stand on the codec's grid, and come back from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import detectors
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import softcache as sc
from softcache import probes
from softcache.codecs.fixed import Fixed
from softcache.errors import MismatchError
from softcache.geometry import to_view
from softcache.recipe import Recipe
from softcache.source import Boxes


def some(n: int, seed: int = 0) -> np.ndarray:
    """float64 ``(n, 4)`` in the unit square, none smaller than a fiftieth."""
    rng = np.random.default_rng(seed)
    side = rng.uniform(0.02, 0.4, (n, 2))
    corner = rng.uniform(0, 1 - side)
    return np.concatenate([corner, corner + side], axis=1)


def whole(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and sides."""
    return (found[:, :2] + found[:, 2:]) / 2, found[:, 2:] - found[:, :2]


@given(
    n=st.integers(0, 130), seed=st.integers(0, 2**40), k=st.integers(0, 99), id=st.text(max_size=8),
    count=st.integers(1, 120),
)  # fmt: skip
def test_points_are_boxes_about_the_view_the_same_every_time(n: int, seed: int, k: int, id: str, count: int):
    boxes = some(n, seed)
    found = probes.points(seed, id, k, boxes, count)
    assert found.shape == (count, 4) and found.dtype == np.float32
    centre, side = whole(found)
    assert (centre > 0).all() and (centre < 1).all() and (side > 0).all() and (side < 1).all()
    assert np.array_equal(found, probes.points(seed, id, k, boxes, count))
    coded = Fixed()
    assert np.array_equal(coded.decode(coded.encode(found), (4,)), found)


def test_the_views_own_boxes_come_first_then_jittered_ones_then_any():
    boxes = some(10)
    found = probes.points(0, "a", 0, boxes)
    assert np.abs(found[:10] - boxes).max() <= 2.0**-15
    centre, side = whole(boxes)
    own = np.arange(45) % 10
    near_centre, near_side = whole(found[10:55])
    assert (np.abs(near_centre - centre[own]) <= 0.3 * side[own] + 2.0**-8).all()
    ratio = near_side / side[own]
    assert ratio.min() > 2**-0.5 - 0.01 and ratio.max() < 2**0.5 + 0.01 and ratio.std() > 0.1
    free_centre, free_side = whole(found[55:])
    assert free_centre.std(axis=0).min() > 0.2 and 1 / 65 < free_side.min() < free_side.max() < 0.76


def test_a_view_without_boxes_is_probed_anywhere_and_evenly():
    found = np.concatenate([probes.points(0, str(i), 0, np.zeros((0, 4))) for i in range(50)])
    centre, side = whole(found)
    assert np.abs(centre.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(np.log2(side).mean() - np.log2(0.75 / 64) / 2) < 0.1


def test_of_too_many_boxes_some_are_drawn_in_their_order():
    boxes = some(300)
    found = [probes.points(0, id, k, boxes, 40) for id, k in (("a", 0), ("a", 1), ("b", 0))]
    for points in found:
        apart = np.abs(points[:, None] - boxes).max(axis=2)
        assert apart.min(axis=1).max() < 2.0**-15
        assert (np.diff(apart.argmin(axis=1)) > 0).all()
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_every_key_counts():
    boxes = some(3)
    a, *others = (probes.points(*key, boxes) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)))
    for other in others:
        assert np.array_equal(a[:3], other[:3]) and not np.isclose(a[3:], other[3:]).all(axis=1).any()


def test_what_version_1_draws():
    """Written down once: caches name the version, and are read for ever."""
    found = probes.points(7, "000000000139", 2, np.array([[0.25, 0.5, 0.5, 0.75]]), 5)
    value = Fixed().encode(found)["value"].tolist()
    assert value == GOLDEN


GOLDEN = [
    [24576, 32768, 32768, 40959],
    [27129, 31130, 33480, 38898],
    [22555, 30852, 31219, 41304],
    [31940, 45383, 51869, 47931],
    [31141, 27619, 32001, 33158],
]


def test_visible_is_what_the_view_shows_of_both_without_crowds():
    def boxes(sample: int) -> Boxes:
        xyxy = np.array([[0, 0, 50, 40], [60, 10, 90, 70], [5, 5, 9, 9], [0, 0, 99, 79]]) + sample
        return Boxes(xyxy, np.array([3, 1, 2, 0]), np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0]))

    view = Recipe("crop(40)", 3).view("a", 0, 100, 80)
    found = probes.visible(view, 0, boxes, (40, 40))
    moved = to_view(view, boxes(0).xyxy[:2])
    assert len(found) and all(
        np.isclose(moved[[3, 1].index(label)].clip(0, 1), one).all()
        for one, label in zip(found.boxes, found.label, strict=True)
    )
    plain = Recipe("resize(40)", 0).view("a", 0, 100, 80)
    all_of = probes.visible(plain, 1, boxes, (40, 50))
    assert np.allclose(all_of.boxes, boxes(1).xyxy[:2] / [100, 80, 100, 80]) and all_of.label.tolist() == [
        3,
        1,
    ]
    assert probes.visible(plain, 0, lambda _: None, (40, 50)).boxes.shape == (0, 4)


# -- in a cache ------------------------------------------------------------------------------------------------


class Echo:
    """A teacher whose answer to a probe is the probe, one layer after the other."""

    input_spec = {"size": (64, 64)}  # noqa: RUF012
    weights_digest = "e" * 64
    layouts = {"probes": sc.Layout({"boxes": 4, "reference": 4, "logits": 3}, layers=2)}  # noqa: RUF012

    def __call__(self, pixels: np.ndarray, probes: np.ndarray | None = None) -> dict[str, np.ndarray]:
        if probes is None:
            return {}
        rows = np.concatenate([probes, probes, np.zeros((*probes.shape[:2], 3), np.float32)], axis=-1)
        return {"probes": np.concatenate([rows, rows * np.float32(0.5)], axis=1)}


@pytest.fixture
def built(shared_data: Path, tmp_path: Path):
    def build(**settings: Any) -> tuple[sc.Cache, sc.Source]:
        source = sc.Source(shared_data / "coco356", split="val2017", limit=6)
        given: dict[str, Any] = {
            "source": source, "teacher": Echo(), "targets": {"probes": "all"}, "views": 2, "batch": 4, "seed": 5,
            "recipe": "letterbox(64)|flip", "ignore_labels": True, "progress": False, **settings,
        }  # fmt: skip
        return sc.build(tmp_path / "cache", **given), source

    return build


@pytest.mark.parametrize("recipe", ["letterbox(64)|flip", "letterbox(64)|flip|mosaic|mixup(alpha=8)"])
def test_the_first_layers_references_are_the_points_to_the_last_bit(built, recipe: str):
    cache, source = built(recipe=recipe)
    assert cache.identity["probes"] == {"count": probes.COUNT, "version": probes.VERSION}
    shown = 0
    for sample, id in enumerate(cache.ids):
        for k in range(2):
            row = cache[id, k]
            boxes = probes.visible(row.view, sample, source.boxes, (64, 64)).boxes
            points = probes.points(5, id, k, boxes)
            first = row["probes"].layer(0)
            assert np.array_equal(first.parts["reference"], points)
            shown += len(boxes)
    assert shown > 20


def test_a_cache_with_probes_is_verified_against_its_teacher(built, monkeypatch):
    cache, source = built()
    from softcache.checker import verify_live
    from softcache.teachers import Options
    from softcache.teachers.ensemble import assemble

    teacher = assemble(Echo(), None, Options.like(cache.identity["teacher"], taps=("probes",)))
    found = verify_live(cache, source, teacher, 8)["probes"]
    assert found["cache"] == pytest.approx(found["control"], abs=1e-3)
    monkeypatch.setattr(probes, "VERSION", 2)
    with pytest.raises(
        MismatchError, match="drawn by version 1 of their rule, and this softcache has version 2"
    ):
        verify_live(cache, source, teacher, 8)


def live(cache: sc.Cache, source: sc.Source, teacher: Any, names: list[str], **options: Any) -> Any:
    """A loader with the teacher online, as the trainer loads it."""
    from softcache_train import Loader, online

    target_source = online.load(cache, teacher, None, names, "cpu")
    return Loader(cache, source, target_source=target_source, **{"global_batch": 6, "workers": 0, **options})


def cached(cache: sc.Cache, source: sc.Source, names: list[str], **options: Any) -> Any:
    from softcache_train import Loader

    return Loader(cache, source, targets=names, **{"global_batch": 6, "workers": 0, **options})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recipe", ["letterbox(64)|flip", "letterbox(64)|flip|mosaic|mixup(alpha=8)"])
def test_a_live_teacher_is_asked_where_the_caches_was(built, recipe: str, workers: int):
    cache, source = built(recipe=recipe)
    options: dict[str, Any] = {"workers": workers, "size": (32, 32)}
    one, other = (
        cached(cache, source, ["probes"], **options),
        live(cache, source, Echo(), ["probes"], **options),
    )
    for _ in range(2):
        (kept,), (said,) = one, other
        assert kept.index.tolist() == said.index.tolist() and kept.view == said.view
        a, b = kept["probes"].values, said["probes"].values
        assert a.keys() == b.keys()
        first = slice(0, probes.COUNT)
        assert np.array_equal(a["reference"][:, first], b["reference"][:, first])
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-3)
        shown = [
            probes.visible(v, int(i), source.boxes, (64, 64)).boxes
            for i, v in zip(said.index, said.views, strict=True)
        ]
        assert sum(map(len, shown)) > 10


def test_a_live_teacher_is_asked_at_the_boxes_of_fresh_views(built):
    cache, source = built()
    loader = live(cache, source, Echo(), ["probes"], recipe="crop(200)|flip")
    batch = loader.batch(3, 0)
    reference = batch["probes"].values["reference"][:, : probes.COUNT]
    for row, (sample, view) in enumerate(zip(batch.index.tolist(), batch.views, strict=True)):
        shown = probes.visible(view, sample, source.boxes, (64, 64)).boxes
        assert np.array_equal(reference[row], probes.points(5, cache.ids[sample], 0, shown))


def test_a_live_teacher_that_needs_boxes_is_given_no_source_without(built, shared_data: Path):
    cache, _ = built()
    plain = sc.Source(shared_data / "coco356" / "images" / "val2017", layout="folder")
    renamed = sc.Source(Listed([plain.image(plain.ids.index(i)) for i in cache.ids]), ids=list(cache.ids))
    with pytest.raises(MismatchError, match=r"is asked at boxes, and .* has none"):
        live(cache, renamed, Echo(), ["probes"])


class Listed(list[np.ndarray]):
    """Pictures alone."""


def test_what_is_made_of_a_teachers_answers_is_made_of_a_live_ones(built):
    """Maps pooled, or made attention: their names are not those of the teacher's answers."""
    from softcache.testing import toy_detector

    targets = {"p3": "pool(2)|f16", "p3.attention": "attention", "detections": "all", "queries": "all"}
    cache, source = built(teacher=toy_detector(), targets=targets)
    (kept,), (said,) = (
        cached(cache, source, list(targets)),
        live(cache, source, toy_detector(), list(targets)),
    )
    for name in targets:
        a, b = kept[name], said[name]
        assert type(a) is type(b)
        pairs = [(a.values, b.values)] if name == "p3" else [(a.values[n], b.values[n]) for n in a.values]
        for x, y in pairs:
            np.testing.assert_allclose(x, y, atol=0.1)


def test_without_probes_no_cache_says_anything_of_them(built):
    class Plain(Echo):
        layouts = {"queries": Echo.layouts["probes"]}  # noqa: RUF012

        def __call__(self, pixels: np.ndarray, probes: np.ndarray | None = None) -> dict[str, np.ndarray]:
            assert probes is None
            return {"queries": np.zeros((len(pixels), 4, 11), np.float32)}

    cache, _ = built(teacher=Plain(), targets={"queries": "all"})
    assert cache.identity.get("probes") is None


def test_of_several_teachers_only_those_asked_are_given_points(built):
    cache, _ = built(teacher=[Echo(), Echo()], targets={"1.probes": "all"}, weights=None)
    assert cache[cache.ids[0], 0]["1.probes"].layer(0).parts["boxes"].shape == (probes.COUNT, 4)


# -- real networks ---------------------------------------------------------------------------------------------

SIZE = (128, 128)
FAMILIES = {
    "rt-detr": {"detections": "top(5, background=2)", "queries": "all", "probes": "all", "p4": "int8"},
    "deformable-two-stage": {"queries": "all", "probes": "all"},
    "detr": {"detections": "all", "queries": "all", "p5": "int8"},
    "retinanet_resnet50_fpn": {"detections": "top(50, background=10)", "p5": "int8"},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"proposals": "all", "proposals.embedding": "int8"},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_build_cache_read(kind: str, built):
    """What is read is what the network says of the view, within the codec's bound."""
    from softcache.recipe import render
    from softcache.teachers import Options, load

    pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    model = detectors.hf(kind) if kind in detectors.HF else detectors.torchvision(kind, SIZE, num_classes=7)
    targets = FAMILIES[kind]
    cache, source = built(
        teacher=model, targets=targets, input_size=SIZE, views=1, block_rows=4, recipe="letterbox(128)|flip"
    )
    assert sc.verify(cache, read_data=True) == []
    teacher = load(model, Options(taps=tuple(targets), input_size=SIZE))
    ids = [0, 1, 4, 5]
    views = [cache.read_views(0, np.array([i]))[0] for i in ids]
    pixels = np.stack([render(source.image(i), view, SIZE) for i, view in zip(ids, views, strict=True)])
    boxes = (probes.visible(view, i, source.boxes, SIZE).boxes for i, view in zip(ids, views, strict=True))
    points = np.stack([probes.points(5, cache.ids[i], 0, b) for i, b in zip(ids, boxes, strict=True)])
    said = teacher(pixels, **({"probes": points} if "probes" in targets else {}))
    for name, target in cache.targets.items():
        kept = cache.read(0, np.array(ids), [name])[name]
        fields = target.codec.encode(said[name])
        again = target.decode(fields)
        assert np.allclose(kept.dense(), again.dense(), atol=2e-2, rtol=2e-2), name
        if name == "probes":
            assert np.array_equal(kept.layer(0).parts["reference"], points)
        if name == "detections" and target.layout.levels:
            assert (np.diff(kept.scores().max(axis=-1)[:, :50], axis=1) <= 0.02).all()
