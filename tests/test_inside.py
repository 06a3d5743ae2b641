"""``top(n, background=m, inside=p)``: the items that lie best on the source's boxes, against a selection written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_items import DENSE, EVERYTHING, NARROW, answers, bound_to

import softcache as sc
from softcache import codecs
from softcache.codecs import NOTHING, Objects
from softcache.errors import CodecError, SpecError
from softcache.forecast import plan
from softcache.geometry import seen_in_all
from softcache.source import Boxes
from softcache.targets import Items, Layout


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union, side by side."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return wide * high / (sum(areas) - wide * high)


def selected(layout: Layout, row: np.ndarray, shown: Objects, n: int, p: int) -> list[int]:
    """The first n + p items of a row, one after the other, as the text of the codec has them."""
    said = {name: part.tolist() for name, part in layout.parts(row)}
    scores = layout.scores(dict(layout.parts(row))).tolist()
    everyone = sorted(range(len(row)), key=lambda i: (-max(scores[i]), i))
    kept = everyone[:n]
    ranked = []
    for box, label in zip(shown.boxes.tolist(), shown.label.tolist(), strict=True):
        lies = {i: overlap(said["boxes"][i], box) for i in everyone}
        alignment = {i: scores[i][label] ** 0.5 * lies[i] ** 6 for i in everyone if lies[i] > 0}
        ranked.append(sorted(alignment, key=lambda i: (-alignment[i], i)))
    for turn in range(len(row)):
        for mine in ranked:
            if turn < len(mine) and mine[turn] not in kept and len(kept) < n + p:
                kept.append(mine[turn])
    for i in everyone:
        if i not in kept and len(kept) < n + p:
            kept.append(i)
    return kept


def objects(count: int, seed: int, classes: int = 4) -> Objects:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.8, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.02, 0.2, (count, 2))], axis=1)
    return Objects(boxes, rng.integers(0, classes, count))


def sorted_boxes(layout: Layout, values: np.ndarray) -> np.ndarray:
    """Some boxes upright, others as they come: a fresh network says what it likes."""
    boxes = layout.part(values, "boxes")
    upright = np.sort(boxes.reshape(*boxes.shape[:-1], 2, 2), axis=-2).reshape(boxes.shape)
    boxes[:, 3:] = upright[:, 3:]
    return values


@pytest.mark.parametrize(
    "layout", [DENSE, EVERYTHING, replace(NARROW, columns={**NARROW.columns, "logits": 5})]
)
@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_it_is_the_selection_written_out(layout: Layout, data: Any, seed: int):
    items = 27
    n = data.draw(st.integers(1, items - 1))
    p = data.draw(st.integers(1, items - n))
    background = data.draw(st.integers(0, items - n - p))
    values = sorted_boxes(layout, answers(layout, 9, seed))
    values[:, 20:24] = values[:, 4:8]  # ties
    shown = [objects(count, seed + count) for count in (0, 1, 2, 5, 12, 40, 0, 1, 3)]
    shown[4] = Objects(shown[4].boxes[[0] * 12], shown[4].label[[0] * 12])  # the same object twelve times
    codec = bound_to(f"top({n}, background={background}, inside={p})", layout)
    kept = codec.decode(codec.encode(values, shown), values.shape[1:])
    for row, there in enumerate(shown):
        first = selected(layout, values[row], there, n, p)
        assert kept.index[row, : n + p].tolist() == first and (kept.weight[row, : n + p] == 1).all()
        scores = layout.scores(dict(layout.parts(values[row]))).max(axis=-1)
        rest = sorted(set(range(items)) - set(first), key=lambda i: (-scores[i], i))
        start = 0
        for place, size in zip(kept.index[row, n + p :], kept.weight[row, n + p :].astype(int), strict=True):
            assert rest[start + size // 2] == place
            start += size
        assert start == len(rest) * bool(background)


def test_an_object_that_the_teacher_hardly_sees_keeps_its_items():
    """Nine items of high score far away, three of low score on the object: its class counts, and how well they lie."""
    layout = Layout({"logits": 2, "boxes": 4})
    values = np.zeros((1, 14, 6), np.float32)
    values[0, :, :2] = -9
    values[0, :9, 0], values[0, :, 2:] = 4, [0.8, 0.8, 0.9, 0.9]
    for item, box, logit in ((9, 0.21, -3), (10, 0.2, -5), (11, 0.2, -3), (12, 0.25, -3)):
        values[0, item, 1], values[0, item, 2:] = logit, [0.1, 0.1, box, 0.2]
    shown = Objects(np.array([[0.1, 0.1, 0.2, 0.2]]), np.array([1]))
    codec = bound_to("top(3, inside=3)", layout)
    kept = codec.decode(codec.encode(values, [shown]), (14, 6))
    assert kept.index.tolist() == [[0, 1, 2, 11, 9, 10]]
    other = codec.decode(codec.encode(values, [replace(shown, label=np.array([0]))]), (14, 6))
    assert other.index.tolist() == [[0, 1, 2, 10, 11, 9]]  # by the other class all score alike
    none = codec.decode(codec.encode(values, [NOTHING]), (14, 6))
    assert none.index.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_rows_are_encoded_one_by_one():
    values, shown = answers(DENSE, 20), [objects(i % 5, i) for i in range(20)]
    codec = bound_to("top(3, inside=4, background=5)", DENSE)
    together = codec.encode(values, shown)
    for i in (0, 7, 8, 19):
        alone = codec.encode(values[i : i + 1], shown[i : i + 1])
        assert all(np.array_equal(together[f][i : i + 1], alone[f]) for f in together)
    assert together["index"].shape == (20, 12)
    assert {f.name: (20, *f.shape) for f in codec.fields((27, 9))} == {
        k: v.shape for k, v in together.items()
    }
    assert all(len(v) == 0 for v in codec.encode(values[:0], []).values())


def test_without_it_nothing_has_changed():
    codec, same = bound_to("top(3, background=5)", DENSE), bound_to("top(3, background=5, inside=0)", DENSE)
    values = answers(DENSE, 4)
    one, other = codec.encode(values), same.encode(values)
    assert all(np.array_equal(one[f], other[f]) for f in one) and one.keys() == other.keys()
    assert not codecs.is_boxed(codec) and codecs.is_boxed(bound_to("top(3, inside=1)", DENSE))
    assert codecs.parse("top(3, inside=2, background=5)").spec == "top(3, background=5, inside=2)"


@pytest.mark.parametrize(
    ("text", "layout", "told"),
    [
        (
            "top(20, inside=8)",
            DENSE,
            "keeps 20 items and 8 inside, and the teacher gives 27: at most 27 together",
        ),
        ("top(9, inside=9, background=10)", DENSE, "9 items and 9 inside and 10 of the background"),
        (
            "top(3, inside=2)",
            Layout({"objectness": 5, "boxes": 4} | {"objectness": 1, "embedding": 4}),
            "have no logits",
        ),
        ("top(3, inside=2)", Layout({"logits": 9}), "have no boxes: leave inside out"),
    ],
)
def test_what_cannot_be_chosen_is_refused(text: str, layout: Layout, told: str):
    with pytest.raises(CodecError, match=told):
        bound_to(text, layout).fields((27, layout.width))


def test_it_must_be_told_the_boxes_and_of_classes_that_there_are():
    codec, values = bound_to("top(3, inside=2)", DENSE), answers(DENSE, 2)
    with pytest.raises(CodecError, match="asks where the boxes are: of 2 rows, 0 are told"):
        codec.encode(values)
    strange = Objects(np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([5]))
    with pytest.raises(CodecError, match="classes up to 5, and the teacher's are 5"):
        codec.encode(values, [NOTHING, strange])
    for wrong in ("-1", "2.5", "yes"):
        with pytest.raises(SpecError, match="inside must be a whole number of at least 0"):
            codecs.parse(f"top(3, inside={wrong})")


# -- a real detector -------------------------------------------------------------------------------------------

RECIPE = "1: flip|mosaic(416)|mixup(alpha=32, p=0.5); letterbox(416, align=top_left)|flip"
OPTIONS: dict[str, Any] = {
    "targets": {"detections": "top(300, background=50, inside=40)"}, "recipe": RECIPE, "views": 2, "batch": 4,
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(shared_data: Path) -> str:
    pytest.importorskip("onnxruntime")
    return f"onnx:{shared_data / 'weights' / 'yolox_nano_coco_416.onnx'}"


@pytest.fixture(scope="module")
def built(
    shared_data: Path, teacher: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[sc.Cache, sc.Source]:
    source = sc.Source(shared_data / "coco356", split="val2017", limit=6)
    return sc.build(
        tmp_path_factory.mktemp("inside") / "c", source=source, teacher=teacher, **OPTIONS
    ), source


def test_a_cache_of_a_real_detector_holds_what_lies_best(built: tuple[sc.Cache, sc.Source], teacher: str):
    from softcache.recipe import gather, render
    from softcache.teachers import Options, layouts_of, load

    cache, source = built
    live = load(teacher, Options(taps=("detections",)))
    layout = layouts_of(live)["detections"]
    more = 0
    for k in range(2):
        kept = cache.read(k, np.arange(6), ["detections"])["detections"]
        assert kept.index.shape == (6, 390) and (kept.weight.sum(axis=1) == layout.cells).all()
        assert all(len(set(row)) == 390 for row in kept.index.tolist())
        for sample, view in enumerate(cache.read_views(k, np.arange(6))):
            images = gather(sample, view, source.image)
            values = live(render(images[sample], view, (416, 416), images)[None])["detections"][0]
            theirs = {i: source.boxes(i) or Boxes.empty() for i in (sample, *view.others)}
            seen = seen_in_all(view, sample, theirs)
            real = ~(seen.crowd | seen.ignore)
            wanted = selected(layout, values, Objects(seen.boxes[real], seen.label[real]), 300, 40)
            assert len({*wanted} ^ {*kept.index[sample, :340].tolist()}) <= 4  # other batches round otherwise
            scores = Items.whole(layout, values).scores().max(axis=-1)
            more += (scores[kept.index[sample, 300:340]] < np.sort(scores)[-340]).sum()
    assert more > 6 * 2 * 10  # items that top(340) would not have


def test_it_is_verified_resumed_and_planned(built: tuple[sc.Cache, sc.Source], teacher: str, tmp_path: Path):
    from softcache.checker import verify_live
    from softcache.teachers import Options
    from softcache.teachers.ensemble import assemble

    cache, source = built
    who = assemble(teacher, None, Options.like(cache.identity["teacher"], taps=("detections",)))
    found = verify_live(cache, source, who, 4)["detections"]
    assert found["cache"]["shared"] == 1 and found["cache"]["boxes"] < 1e-4
    assert found["cache"]["wrong"] == 0
    assert sc.verify(cache, read_data=True) == []
    again = sc.open(cache.path)
    assert again.targets["detections"].spec == "top(300, background=50, inside=40)"
    reckoned = plan(
        source=source, teacher=teacher, pilot=4, **{k: v for k, v in OPTIONS.items() if k != "progress"}
    )
    assert reckoned.bytes_per_row == cache.report.bytes_per_row
    row = sc.with_targets(source, cache)[3]["detections"]
    assert row["index"].shape == (390,) and row["weight"][300:340].tolist() == [1] * 40


def test_it_is_refused_where_classes_or_boxes_are_unknown(shared_data: Path, teacher: str, tmp_path: Path):
    boxed = sc.Source(shared_data / "coco356", split="val2017", limit=2)
    plain = sc.Source(shared_data / "coco356" / "images" / "val2017", layout="folder", limit=2)
    for source, more, told in (
        (boxed, {"ignore_labels": True}, "compares the boxes' classes with the teacher's, and ignore_labels"),
        (plain, {}, "asks where the boxes are, and .* has none"),
    ):
        with pytest.raises(SpecError, match=told):
            options: dict[str, Any] = OPTIONS | more
            sc.build(tmp_path / "c", source=source, teacher=teacher, **options)
    assert not (tmp_path / "c").exists()


def test_it_is_extended_as_it_is_built(shared_data: Path, teacher: str, tmp_path: Path):
    source = sc.Source(shared_data / "coco356", split="val2017", limit=3)
    more: dict[str, Any] = OPTIONS | {"source": source, "teacher": teacher, "recipe": "flip|mosaic(416)"}
    whole = sc.build(tmp_path / "whole", **more)
    fewer: dict[str, Any] = more | {"views": 1}
    sc.build(tmp_path / "c", **fewer)
    other: dict[str, Any] = {"source": source, "teacher": teacher, "progress": False}
    sc.extend(tmp_path / "c", views=2, **other)
    cache = sc.extend(tmp_path / "c", targets=OPTIONS["targets"], name="other", **other)
    for k in range(2):
        kept, found = (c.read(k, np.arange(3)) for c in (whole, cache))
        for name in ("detections", "other.detections"):
            assert np.array_equal(found[name].index, kept["detections"].index)
