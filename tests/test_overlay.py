"""``overlay``: what is drawn stands where the thing is, nothing is written over that is not ours, bad input is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import softcache as sc
from softcache.cli import main
from softcache.drawing import marks, words
from softcache.drawing.panel import BLACK, LEAST, LINE, WHITE, Mark, Panel, color_of, drawing, place, sheet
from softcache.errors import InvalidRow, MismatchError, SourceError, SpecError, StoreError
from softcache.recipe import View
from softcache.recipe.mix import Blend, Mix
from softcache.targets import Items, Layout, request
from softcache.testing import ToyImages, make_image_folder, toy_teacher

NAMES = ("lamp", "table", "crowd")
PAINT, GROUND = (255, 0, 255), 77
SIZE = 320  # so that the sheet shows pixels as they were rendered
LAYOUT = Layout({"logits": 3, "boxes": 4}, levels=((2, 2),))


class Finder:
    """Finds the painted rectangle by its pixels alone: a table, said twice, and once where nothing is."""

    input_spec = {"size": (SIZE, SIZE)}  # noqa: RUF012 - what a user's teacher carries
    weights_digest = "0" * 64
    classes = NAMES

    def __init__(self, logit: float = 3.0):
        self.layouts, self._logit = {"detections": LAYOUT}, logit

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = np.zeros((len(pixels), 4, 7), np.float32)
        found[:, :, :3] = -9
        for row, image in zip(found, pixels, strict=True):
            rows, columns = np.nonzero(painted(image))
            if len(rows):
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                row[1:3, 3:], row[1:3, 1] = np.array(box) / SIZE, (self._logit, self._logit - 1)
            row[0, 3:] = 0.05, 0.05, 0.2, 0.2
        return {"detections": found}


def painted(image: np.ndarray) -> np.ndarray:
    return np.all(np.abs(image.astype(int) - PAINT) < 40, axis=-1)


def write_coco(root: Path, boxes: Mapping[str, Sequence[Sequence[float]]], crowd: bool = False) -> Path:
    """Images of 200x120 by name, grey, the first box ``x, y, w, h`` painted; the annotations are tables."""
    said: dict[str, Any] = {"images": [], "annotations": []}
    said["categories"] = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)]
    for i, (name, theirs) in enumerate(boxes.items()):
        image = np.full((120, 200, 3), GROUND, np.uint8)
        if theirs:
            x, y, w, h = map(int, theirs[0])
            image[y : y + h, x : x + w] = PAINT
        file = root / "images" / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file, "PNG")
        said["images"].append({"id": i, "file_name": name, "width": 200, "height": 120})
        for box in theirs:
            one = {"id": len(said["annotations"]), "image_id": i, "category_id": 20, "bbox": list(box)}
            said["annotations"].append(one | {"iscrowd": int(crowd), "area": box[2] * box[3]})
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(said))
    return root


BOXES = {"a.png": [(40, 30, 70, 50)], "deep/b c#é.png": [(0, 0, 90, 119)], "none.png": []}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco", BOXES)


def build(out: Path, source: Any, teacher: Any = None, **options: Any) -> sc.Cache:
    said = {"recipe": f"letterbox({SIZE})|flip", "views": 4, "targets": {"detections": "all"}}
    return sc.build(out, source=source, teacher=teacher or Finder(), progress=False, **said | options)


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def framed(image: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Of the only painted rectangle in ``image``: the share of each side that has one of the colours within 2 pixels."""
    rows, columns = np.nonzero(painted(image))
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    line = np.any([(np.abs(image.astype(int) - c) < 8).all(axis=-1) for c in colors], axis=0)
    across, down = slice(left, right), slice(top, bottom)
    bands = [line[max(at - 2, 0) : at + 2, across].any(axis=0) for at in (top, bottom)]
    bands += [line[down, max(at - 2, 0) : at + 2].any(axis=1) for at in (left, right)]
    return np.array([band.mean() for band in bands])


# -- where things are drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("view", range(4))
@pytest.mark.parametrize("id", ["a.png", "deep/b c#é.png"])
def test_what_is_painted_is_framed_by_the_sources_box(tmp_path: Path, coco: Path, id: str, view: int):
    """Its place in the picture comes from the pixels, that of the line from the annotation and the view."""
    cache, source = build(tmp_path / "c", coco, Finder(logit=-9)), sc.Source(coco)
    (path,) = sc.overlay(cache, source, tmp_path / "out", ids=[id], views=[view])
    assert framed(opened(path), [WHITE, BLACK]).min() > 0.6
    assert framed(opened(path), [color_of(1)]).max() < 0.05


@pytest.mark.parametrize("view", range(4))
def test_what_is_painted_is_framed_by_the_teachers_box(tmp_path: Path, coco: Path, view: int):
    """The source is the same images without their boxes."""
    folder = coco / "images" / "train"
    cache = build(tmp_path / "c", folder, layout="folder", ignore_labels=True)
    (path,) = sc.overlay(
        cache, sc.Source(folder, layout="folder"), tmp_path / "out", ids=["a.png"], views=[view]
    )
    assert framed(opened(path), [color_of(1)]).min() > 0.95
    assert framed(opened(path), [BLACK]).max() < 0.1


def test_a_mixed_view_has_the_boxes_of_both(tmp_path: Path):
    root = write_coco(tmp_path / "coco", {"a.png": [(10, 10, 40, 30)], "b.png": [(120, 70, 50, 40)]})
    cache = build(tmp_path / "c", root, Finder(-9), recipe=f"letterbox({SIZE})|mixup(alpha=1, p=1)", views=1)
    source = sc.Source(root)
    view = cache.read_views(0, np.array([0]))[0]
    found = marks.truth(view, 0, source.boxes, source.classes, (SIZE, SIZE))
    scale = SIZE / 200  # a letterbox of 200x120
    corners = [np.array([(10, 10), (50, 40)]), np.array([(120, 70), (170, 110)])]
    wanted = [(c * scale + [0, (SIZE - 120 * scale) / 2]).ravel() / SIZE for c in corners]
    assert [m.text for m in found] == ["table", "table"]
    for mark, box in zip(found, wanted, strict=True):
        assert mark.box == pytest.approx(box, abs=1e-3)
    for path in sc.overlay(cache, source, tmp_path / "out"):
        opened(path)


def test_a_mosaic_has_the_boxes_of_its_tiles(tmp_path: Path):
    root = write_coco(tmp_path / "coco", {"a.png": [(10, 10, 40, 30)], "b.png": [(120, 70, 50, 40)]})
    recipe = f"letterbox({SIZE})|mosaic(scale=(0.5, 0.5), center=(0.5, 0.5))|mixup(alpha=1)"
    cache, source = build(tmp_path / "c", root, Finder(-9), recipe=recipe, views=1), sc.Source(root)
    view = cache.read_views(0, np.array([0]))[0]
    found = marks.truth(view, 0, source.boxes, source.classes, (SIZE, SIZE))
    assert len(found) == 8 and all(mark.text == "table" for mark in found)
    places = [tuple((mark.box.reshape(2, 2).mean(axis=0) > 0.5).tolist()) for mark in found]
    assert (
        sorted(places[:4])
        == sorted(places[4:])
        == sorted({(a, b) for a in (True, False) for b in (True, False)})
    )
    told = words.tell(view, cache.ids)
    assert told.count("in a mosaic with view 0 of ") == 2 and told.count("mixed, ") == 1
    assert marks.labelled(view, 0, np.array([0, 0]), source.classes) is None
    for path in sc.overlay(cache, source, tmp_path / "out"):
        opened(path)


def test_a_crowd_is_dotted_and_named(tmp_path: Path):
    root = write_coco(tmp_path / "coco", {"a.png": [(40, 30, 70, 50)]}, crowd=True)
    source = sc.Source(root)
    cache = build(tmp_path / "c", root)
    (mark,) = marks.truth(cache[cache.ids[0], 0].view, 0, source.boxes, source.classes, (SIZE, SIZE))
    assert mark.dotted and mark.color is None and mark.text == "crowd: table"
    lit = [
        (drawing(Panel(np.full((SIZE, SIZE, 3), GROUND, np.uint8), [Mark(mark.box, "", None, d)])))
        for d in (False, True)
    ]
    dashed, dotted = ((np.array(one)[:SIZE] != GROUND).any(axis=-1).sum() for one in lit)
    assert 0 < dotted < 0.75 * dashed


@pytest.mark.parametrize(
    ("box", "at"),
    [
        ((0.25, 0.5, 0.75, 1.0), (24, 49, 76, 100)),
        ((0, 0, 1, 1), (0, 0, 100, 100)),
        ((-0.5, -9, 1.5, 9), (0, 0, 100, 100)),
        ((1.2, 1.2, 1.4, 1.4), (98, 98, 100, 100)),
        ((0.5, 0.5, 0.5, 0.5), (49, 49, 51, 51)),
    ],
)
def test_a_line_lies_half_outside_its_box_and_never_outside_the_picture(box: tuple, at: tuple):
    assert place(np.array(box, float), 100, 100) == at


def test_a_line_is_drawn_at_its_place_and_nowhere_else():
    pixels = np.full((400, 400, 3), GROUND, np.uint8)
    drawn = np.array(drawing(Panel(pixels, [Mark(np.array([0.25, 0.25, 0.5, 0.75]), "", (0, 255, 0))])))
    expected = np.zeros((400, 400), bool)
    expected[99:301, 99:201] = True
    expected[99 + LINE : 301 - LINE, 99 + LINE : 201 - LINE] = False
    assert ((drawn[:400] == (0, 255, 0)).all(axis=-1) == expected).all()
    assert (drawn[:400][~expected] == GROUND).all() and (pixels == GROUND).all()


def test_texts_do_not_cover_each_other_and_stay_inside():
    """Every mark is at the same place, in a colour of its own: what is seen of each is a whole label, or nothing."""
    box = np.array([0.9, 0.0, 1.0, 0.02])
    many = [Mark(box, f"a long name {i}", (i, 200, 0)) for i in range(30)]
    drawn = np.array(drawing(Panel(np.full((LEAST, LEAST, 3), GROUND, np.uint8), many)))[:LEAST]
    sizes = {int((drawn == (i, 200, 0)).all(axis=-1).sum()) for i in range(29)}  # of the last the outline too
    assert len(sizes) <= 3  # none, and two widths of figures at most


def test_one_pixel_can_be_shown():
    whole = sheet(
        [Panel(np.zeros((1, 1, 3), np.uint8), [Mark(np.array([0, 0, 1, 1]), "x", WHITE)])] * 3, 2, ["one"]
    )
    assert whole.width > 2 * LEAST and whole.height > 2 * LEAST


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (7, 3)])
def test_pictures_of_any_proportion_are_shown(shape: tuple[int, int]):
    maps = [
        ("layer with a very long name " * 3, np.zeros((1, 1))),
        ("b", np.random.default_rng(0).random((5, 2))),
    ]
    one = drawing(
        Panel(np.zeros((*shape, 3), np.uint8), maps=maps, lines=["word " * 60, "x" * 400, "", "\0\n"])
    )
    assert one.width == max(LEAST, shape[1] * -(-LEAST // max(shape)) if max(shape) < LEAST else shape[1])


# -- what a teacher said -----------------------------------------------------------------------------------


def items(layout: Layout, values: np.ndarray) -> Items:
    return Items.whole(layout, values.astype(np.float32))


def test_items_are_chosen_by_score_and_drawn_best_last():
    target = request("detections=all").resolve((4, 7), LAYOUT)
    said = marks.said(
        target, items(LAYOUT, Finder()(np.full((1, 9, 9, 3), PAINT, np.uint8))["detections"][0]), NAMES, 0.3
    )
    assert [m.text for m in said.marks] == ["table 0.95"] and said.marks[0].color == color_of(1)
    assert said.line == "detections: 2 of 4 items at 0.3 or more, 1 without overlaps"


def test_queries_are_those_of_the_last_layer_and_overlap():
    layout = Layout({"logits": 3, "boxes": 4}, layers=2)
    values = np.zeros((4, 7))
    values[:, 3:] = 0.1, 0.1, 0.9, 0.9
    values[:, :3] = -9
    values[0, 0], values[2, 2], values[3, 2] = 5, 1, 4
    said = marks.said(request("queries=all").resolve((4, 7), layout), items(layout, values), NAMES, 0.5)
    assert [m.text for m in said.marks] == ["crowd 0.73", "crowd 0.98"]
    assert said.line == "queries: 2 of 2 items of the last of 2 layers at 0.5 or more"


def test_proposals_without_scores_and_queries_without_boxes():
    layout = Layout({"boxes": 4})
    said = marks.said(
        request("proposals=all").resolve((50, 4), layout), items(layout, np.full((50, 4), 0.5)), NAMES, 0.3
    )
    assert len(said.marks) == marks.UNSCORED and "no scores" in said.line
    layout = Layout({"embedding": 4})
    said = marks.said(
        request("queries=all").resolve((5, 4), layout), items(layout, np.ones((5, 4))), NAMES, 0.3
    )
    assert said == marks.Said([], "queries: without boxes")


def test_classes_of_another_number_have_no_names_and_no_more_than_a_hundred_are_drawn():
    layout = Layout({"logits": 5, "boxes": 4})
    values = np.concatenate([np.full((150, 5), 2.0), np.random.default_rng(0).random((150, 4))], axis=1)
    values[7, 0], values[:, 5:] = np.nan, np.sort(values[:, 5:])
    said = marks.said(request("detections=all").resolve((150, 9), layout), items(layout, values), NAMES, 0.3)
    assert len(said.marks) == marks.MOST and said.marks[0].text == "class 0 0.88"
    assert said.line.endswith("the best 100 drawn")


def test_suppression_is_that_of_torchvision():
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torchvision.ops")
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.random((400, 2, 2)), axis=1).reshape(400, 4) * 0.5 + rng.random((400, 1)) * 0.2
    label = rng.integers(0, 3, 400)
    scores = torch.linspace(1, 0, 400, dtype=torch.float64)
    theirs = ops.batched_nms(torch.from_numpy(boxes), scores, torch.from_numpy(label), 0.4)
    assert marks.suppressed(boxes, label, 0.4).tolist() == theirs.tolist()
    assert 20 < len(theirs) < 380
    assert marks.suppressed(np.zeros((0, 4)), np.zeros(0, int)).tolist() == []


def test_probabilities_and_labels_are_told(small_cache: sc.Cache):
    row = small_cache[small_cache.ids[0], 0]
    p = np.exp(row["logits"].dense(1.0))
    best = np.argsort(-p)[:3]
    told = marks.decided("logits", row["logits"], small_cache.classes)
    assert told == "logits: " + ", ".join(f"{ToyImages.classes[i]} {p[i]:.2f}" for i in best)
    view = row.view
    mixed = replace(view, mix=Mix(1, 0, view, Blend(32767 // 4 * 3)))
    labels = np.array([2, 0, -1])
    assert marks.labelled(view, 0, labels, ToyImages.classes) == "label: cow"
    assert marks.labelled(view, 2, labels, ToyImages.classes) is None
    assert marks.labelled(mixed, 0, labels, ToyImages.classes) == "label: cow 0.75, ant 0.25"


@pytest.mark.parametrize(
    ("codec", "classes", "probable"),
    [
        ("argmax", 1, False),
        ("topk(2)", 2, True),
        ("topk(2, at=(2, 4))", 1, False),
        ("packed(12)", 3, True),
        ("full(f16)", 3, True),
    ],
)
def test_logits_of_every_codec_are_told(tmp_path: Path, codec: str, classes: int, probable: bool):
    images, targets = ToyImages(3), {"logits": codec}
    cache = sc.build(tmp_path / "c", source=images, teacher=toy_teacher(), targets=targets, progress=False)
    row = cache[cache.ids[0], 0]["logits"]
    told = marks.decided("logits", row, None).removeprefix("logits: ").split(", ")
    assert len(told) == classes and told[0].startswith(f"class {int(row.top1())}")
    assert ("." in told[0]) == probable
    assert len(sc.overlay(cache, sc.Source(images), tmp_path / "out")) == 3


# -- a view in words ---------------------------------------------------------------------------------------


def test_a_view_is_told_in_words():
    ids = ("one", "two")
    assert words.tell(View(0, 0, 64, 48, 64, 48, False), ids) == "the whole 64x48"
    assert words.tell(View(-4, 0, 72, 48, 64, 48, True), ids) == "the whole 64x48, bordered, mirrored"
    cut = View(10, -2, 20, 30, 64, 48, False, (17, 114, 5, 12, 0, 19, 1, 2, 3, 4, 5, 6, 0, 0))
    assert words.tell(cut, ids) == "x 10 to 30, y -2 to 28 of 64x48, bordered, hue, affine"
    mixed = View(0, 0, 64, 48, 64, 48, False, mix=Mix(1, 3, cut, Blend(32767 // 2)))
    assert words.tell(mixed, ids).startswith(
        "the whole 64x48, mixed, 0.50 its own, with view 3 of two: x 10 to 30"
    )


# -- rows, views, files ------------------------------------------------------------------------------------


def test_a_classification_cache_is_drawn_with_its_maps(
    small_cache: sc.Cache, small_folder: Path, tmp_path: Path
):
    source = sc.Source(small_folder)
    first = sc.overlay(small_cache, source, tmp_path / "new" / "out", rows=3)
    assert [p.name for p in first] == sorted(p.name for p in first) and len(set(first)) == 3
    more = sc.overlay(small_cache, source, tmp_path / "more", rows=5)
    assert {p.name for p in first} < {p.name for p in more}
    assert all(opened(p).shape[1] > 2 * LEAST for p in first)  # both views, side by side
    assert opened(more[0]).tobytes() != opened(more[1]).tobytes()
    assert len(sc.overlay(small_cache, source, tmp_path / "all", rows=99)) == 20


def test_names_of_files_are_plain_and_never_the_same(tmp_path: Path):
    names = ["a/x.png", "a_x.png", "../up.png", "-rf *.png", "ü" * 90 + ".png", "\n.png"]
    images = ToyImages(len(names))
    cache = sc.build(
        tmp_path / "c", source=sc.Source(images, ids=names), teacher=toy_teacher(), progress=False
    )
    found = sc.overlay(cache, sc.Source(images, ids=names), tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == found and len(set(found)) == len(names)
    for path in found:
        assert path.name.isascii() and path.name[:7].strip("0123456789") == "-" and len(path.name) < 100
        assert not set(path.name) & set("/\\ *\n")


def test_ten_views_evenly_spread_with_the_first_and_the_last(tmp_path: Path):
    cache = sc.build(tmp_path / "c", source=ToyImages(2), teacher=toy_teacher(), views=31, progress=False)
    source = sc.Source(ToyImages(2))
    (every,) = sc.overlay(cache, source, tmp_path / "a", rows=1)
    (same,) = sc.overlay(cache, source, tmp_path / "b", rows=1, views=range(0, 31, 3)[:10])
    (last,) = sc.overlay(cache, source, tmp_path / "d", rows=1, views=[0, 3, 6, 10, 13, 16, 20, 23, 26, 30])
    assert opened(every).tobytes() != opened(same).tobytes()
    assert opened(every).tobytes() == opened(last).tobytes()


def test_a_size_is_that_of_the_longer_side(tmp_path: Path, coco: Path):
    cache, source = build(tmp_path / "c", coco, views=1), sc.Source(coco)
    (path,) = sc.overlay(cache, source, tmp_path / "out", ids=["a.png"], size=500)
    image = opened(path)
    assert image.shape[1] == 500 + 16
    columns = np.nonzero(painted(image))[1]
    assert columns.max() + 1 - columns.min() == pytest.approx(70 * 500 / 200, abs=5)
    assert framed(image, [WHITE, BLACK]).min() > 0.6


def test_our_own_files_are_drawn_again_and_others_are_left(tmp_path: Path, coco: Path):
    cache, source, out = build(tmp_path / "c", coco, views=1), sc.Source(coco), tmp_path / "out"
    first, *others = sc.overlay(cache, source, out)
    before = first.read_bytes()
    assert sc.overlay(cache, source, out, min_score=1)[0] == first and first.read_bytes() != before
    assert sorted(out.iterdir()) == [first, *others]  # nothing unfinished is left
    Image.new("RGB", (3, 3)).save(others[0])
    kept, mine = others[0].read_bytes(), first.read_bytes()
    with pytest.raises(SpecError, match="no overlay of softcache"):
        sc.overlay(cache, source, out)
    assert others[0].read_bytes() == kept and first.read_bytes() == mine
    others[0].unlink()
    others[0].symlink_to(first)
    with pytest.raises(SpecError, match="no overlay of softcache"):
        sc.overlay(cache, source, out)


def test_samples_that_could_not_be_read_are_not_drawn(tmp_path: Path):
    folder = make_image_folder(tmp_path / "images", per_class=2)
    bad = sorted(folder.rglob("*.png"))[0]
    bad.write_bytes(b"no image")
    cache = sc.build(
        tmp_path / "c",
        source=folder,
        teacher=toy_teacher(),
        skip_corrupt=True,
        progress=False,
        targets={"logits": "full(u8)"},
    )
    source = sc.Source(folder)
    assert len(sc.overlay(cache, source, tmp_path / "out")) == 7
    with pytest.raises(InvalidRow):
        sc.overlay(cache, source, tmp_path / "out", ids=[cache.ids[int(cache.invalid[0])]])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"rows": 0}, SpecError, "at least 1"),
        ({"rows": True}, SpecError, "at least 1"),
        ({"size": 0}, SpecError, "longer side"),
        ({"size": 99_999}, SpecError, "longer side"),
        ({"min_score": float("nan")}, SpecError, "from 0 to 1"),
        ({"views": [2]}, SpecError, "from 0 to 1"),
        ({"views": []}, SpecError, "at least"),
        ({"ids": ["nobody"]}, SourceError, "no id 'nobody'"),
    ],
)
def test_what_cannot_be_is_refused(
    small_cache: sc.Cache,
    small_folder: Path,
    tmp_path: Path,
    options: dict,
    error: type[Exception],
    says: str,
):
    with pytest.raises(error, match=says):
        sc.overlay(small_cache, sc.Source(small_folder), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_another_source_is_refused(small_cache: sc.Cache, tmp_path: Path):
    other = make_image_folder(tmp_path / "other", per_class=5, seed=1)
    with pytest.raises(MismatchError):
        sc.overlay(small_cache, sc.Source(other), tmp_path / "out")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(
    small_cache: sc.Cache, small_folder: Path, tmp_path: Path
):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot make the folder"):
        sc.overlay(small_cache, sc.Source(small_folder), tmp_path / "closed" / "out")


def test_a_file_in_the_way_of_the_folder_is_one_line(
    small_cache: sc.Cache, small_folder: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the folder"):
        sc.overlay(small_cache, sc.Source(small_folder), tmp_path / "file")
    with pytest.raises(SpecError, match="inside the cache"):
        sc.overlay(small_cache, sc.Source(small_folder), small_cache.path / "pictures")


# -- the command -------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["show", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_draws_and_prints_the_paths(small_path: Path, small_folder: Path, tmp_path: Path, capsys):
    plain, as_json = run(capsys, small_path)[1], run(capsys, small_path, "--json")[1]
    drawn = ("--overlay", tmp_path / "out", "--source", small_folder, "--rows", 2, "--size", 64)
    status, out, err = run(capsys, small_path, *drawn)
    paths = [str(p) for p in sorted((tmp_path / "out").iterdir())]
    assert (status, out, err) == (0, plain + "\n".join(paths) + "\n", "")
    assert run(capsys, small_path, *drawn, "--json") == (0, as_json, "\n".join(paths) + "\n")
    id = sc.open(small_path).ids[3]
    status, out, _ = run(capsys, small_path, *drawn[:4], "--id", id, "--min-score", 0.5)
    assert status == 0 and out.splitlines()[-1].startswith(str(tmp_path / "out" / "000003-"))


@pytest.mark.parametrize(
    ("said", "status", "says"),
    [
        (["--overlay", "out"], 1, "--overlay needs --source"),
        (["--rows", "3"], 1, "--rows is for --overlay"),
        (["--id", "x"], 1, "--id is for --overlay"),
        (["--source", "x"], 1, "--source is for --overlay"),
        (["--overlay", "out", "--source", "nowhere"], 1, "there is no nowhere"),
        (["--overlay", "out", "--source", "{folder}", "--rows", "0"], 1, "at least 1"),
        (["--overlay", "out", "--source", "{folder}", "--id", "x"], 1, "no id 'x'"),
        (["--overlay", "out", "--source", "{other}"], 3, "ids are not in"),
    ],
)
def test_a_bad_flag_is_one_line(
    small_path: Path,
    small_folder: Path,
    tmp_path: Path,
    capsys,
    monkeypatch,
    said: list[str],
    status: int,
    says: str,
):
    monkeypatch.chdir(tmp_path)
    other = make_image_folder(tmp_path / "other", per_class=1)
    found, out, err = run(capsys, small_path, *(s.format(folder=small_folder, other=other) for s in said))
    assert (found, out) == (status, "") and says in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# -- a real detector ---------------------------------------------------------------------------------------


def test_a_real_teacher_and_real_boxes_agree(shared_data: Path, tmp_path: Path):
    """Most large boxes of COCO have one of the teacher's nearby: drawn boxes belong to the picture."""
    pytest.importorskip("onnxruntime")
    root, weights = shared_data / "coco356", shared_data / "weights" / "deimv2_atto_coco_320.onnx"
    cache = build(
        tmp_path / "c",
        root,
        f"onnx:{weights}",
        split="val2017",
        limit=6,
        recipe=f"resize({SIZE})|flip",
        views=1,
    )
    source = sc.Source(root, split="val2017")
    assert len(sc.overlay(cache, source, tmp_path / "out")) == 6
    near, large = 0, 0
    for id in cache.ids:
        row, at = cache[id, 0], source.index(id)
        truth = marks.truth(row.view, at, source.boxes, source.classes, (SIZE, SIZE))
        theirs = marks.said(cache.targets["detections"], row["detections"], cache.classes, 0.3).marks
        for mark in truth:
            if np.prod(mark.box[2:] - mark.box[:2]) > 0.1 and not mark.dotted:
                large += 1
                near += any(
                    one.text.startswith(mark.text) and np.abs(one.box - mark.box).max() < 0.08
                    for one in theirs
                )
    assert large > 3 and near >= 0.6 * large
