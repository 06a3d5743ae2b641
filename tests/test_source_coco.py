"""COCO JSON: real annotations against pycocotools' own reading of them, every bad file, and a build that knows its boxes."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest

import softcache as sc
from softcache import canary, cli
from softcache.errors import MismatchError, SourceError, SpecError
from softcache.source import Boxes, Source
from softcache.testing import ToyTeacher, toy_teacher

Edit = Callable[[dict[str, Any]], object]


def edited(root: Path, edit: Edit, split: str = "train") -> Path:
    """``root`` again, its JSON file changed by ``edit``."""
    file = root / "annotations" / f"instances_{split}.json"
    said = json.loads(file.read_text())
    edit(said)
    file.write_text(json.dumps(said))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    layouts.write("coco", tmp_path / "pets")
    return tmp_path / "pets"


def test_boxes_are_asked_for_by_number(root: Path):
    source = Source(root, split="train")
    with pytest.raises(SpecError, match=r"asked for by number, 0 to 9, not 'x'"):
        source.boxes("x")
    with pytest.raises(IndexError, match="sample 10 of 10"):
        source.boxes(10)


def boxes(source: Source, id: str) -> Boxes:
    found = source.boxes(source.index(id))
    assert found is not None
    return found


# --- the real thing -----------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "images"), [("train2017", 192), ("val2017", 164)])
def test_coco_is_what_pycocotools_reads(shared_data: Path, split: str, images: int):
    coco = pytest.importorskip("pycocotools.coco")
    root = shared_data / "coco356"
    source = Source(root, split=split)
    assert (source.layout, source.split, len(source)) == ("coco", split, images)
    theirs = coco.COCO(root / "annotations" / f"instances_{split}.json")
    names = [c["name"] for c in theirs.loadCats(theirs.getCatIds())]
    assert source.classes == tuple(names) and len(names) == 80 and max(theirs.getCatIds()) == 90
    assert set(source.ids) == {i["file_name"] for i in theirs.imgs.values()}
    for id, image in theirs.imgs.items():
        wanted = theirs.loadAnns(theirs.getAnnIds([id]))
        found = boxes(source, image["file_name"])
        assert [names[i] for i in found.label] == [theirs.cats[a["category_id"]]["name"] for a in wanted]
        assert found.crowd.tolist() == [bool(a["iscrowd"]) for a in wanted] and not found.ignore.any()
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in wanted)]
        assert np.array_equal(found.xyxy, np.array(corners).reshape(-1, 4))
    assert set(source.labels.tolist()) == {-1}
    told = source.describe()
    assert "category ids 1 to 90 are labels 0 to 79" in told and f"{len(theirs.anns):,} boxes" in told
    assert source.image(0).shape == (
        *(theirs.imgs[int(source.ids[0][:-4])][k] for k in ("height", "width")),
        3,
    )


def test_a_sample_of_it_keeps_its_boxes(shared_data: Path):
    whole = Source(shared_data / "coco356", split="val2017")
    some = Source(shared_data / "coco356", split="val2017", limit=20)
    fewer = pickle.loads(pickle.dumps(some.sample(5)))
    assert whole.has_boxes and fewer.has_boxes
    assert len({whole.boxes_digest, some.boxes_digest, fewer.boxes_digest}) == 3
    for id in fewer.ids:
        assert boxes(whole, id).to_bytes() == boxes(some, id).to_bytes() == boxes(fewer, id).to_bytes()


# --- where it lies ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["images/train", "train", "images", ".", "annotations"])
@pytest.mark.parametrize("given", ["the folder", "the file"])
def test_images_are_sought_in_the_usual_places(root: Path, place: str, given: str):
    aside = (root / "images" / "train").rename(root / "aside")
    (root / "images").rmdir()
    (root / place).mkdir(parents=True, exist_ok=True)
    for file in aside.iterdir():
        file.rename(root / place / file.name)
    aside.rmdir()
    file = root / "annotations" / "instances_train.json"
    if place == "annotations" and given == "the folder":
        place = "annotations/."
    source = Source(root if given == "the folder" else file)
    assert (source.layout, source.split, len(source)) == ("coco", "train", 10)
    assert np.array_equal(source.image(3), layouts.pixels(3))


def test_roboflow_puts_the_file_among_the_images(root: Path):
    for split in ("train", "valid"):
        layouts.write("coco", root, split)
        file = root / "annotations" / f"instances_{split}.json"
        (root / "images" / split).rename(root / split)
        file.rename(root / split / "_annotations.coco.json")
    (root / "annotations").rmdir()
    (root / "images").rmdir()
    with pytest.raises(SourceError, match=r"several splits \(train, valid\)"):
        Source(root)
    valid = Source(root, split="valid")
    assert (valid.layout, valid.split) == ("coco", "valid") and len(boxes(valid, "004.png")) == 1
    assert Source(root / "valid").boxes_digest == valid.boxes_digest
    assert Source(root / "valid").split is None
    with pytest.raises(SourceError, match="one split already"):
        Source(root / "valid", split="valid")


def test_every_place_is_named_where_images_are_missing(root: Path):
    for i in (2, 5):
        (root / "images" / "train" / f"{i:03}.png").unlink()
    places = ["images/train", "train", "images", ""]
    listed = ", ".join(str(root / place) for place in places)
    with pytest.raises(
        SourceError, match=rf"2 of the 10 images in .*train\.json .*'002\.png'.*{listed}, .*annotations"
    ):
        Source(root)


# --- what may be wrong in the file --------------------------------------------------------------


def with_first(kind: str, **changes: object) -> Edit:
    return lambda said: said[kind][0].update(changes)


def without(kind: str, key: str) -> Edit:
    return lambda said: said[kind][0].pop(key)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (with_first("images", id=101), r"two entries with the image id 101"),
        (with_first("images", file_name="001.png"), r"images 100 and 101 are both '001\.png'"),
        (with_first("images", file_name="./001.png"), r"images 100 and 101 are both '001\.png'"),
        (with_first("images", file_name="../001.png"), r"image 100 has the file_name '\.\./001\.png'"),
        (with_first("images", file_name="x\\..\\..\\1.png"), r"image 100 has the file_name .*no path below"),
        (with_first("images", file_name="/etc/passwd"), r"image 100 has the file_name '/etc/passwd'"),
        (with_first("images", file_name=""), r"image 100 has the file_name ''"),
        (with_first("images", file_name="\0.png"), r"image 100 has the file_name"),
        (with_first("images", file_name="\ud800.png"), r"1 of the 10 images .* not there"),
        (without("images", "file_name"), r"image 100 has the file_name None"),
        (without("images", "id"), r"image number 0 has the id None"),
        (with_first("images", id=[1]), r"image number 0 has the id \[1\]"),
        (with_first("categories", id=3), r"two entries with the category id 3"),
        (with_first("categories", id="7"), r"category number 0 has the id '7'"),
        (with_first("categories", name="cat"), r"the category 3 is called 'cat', and so is another"),
        (with_first("categories", name=None), r"the category 7 has the name None"),
        (with_first("annotations", image_id=99), r"the annotation 0 has the image_id 99, which"),
        (
            with_first("annotations", image_id="100"),
            r"'100', which .* have but for 100: write both as numbers",
        ),
        (with_first("annotations", image_id={}), r"the annotation 0 has the image_id \{\}, which"),
        (with_first("annotations", category_id=1), r"the annotation 0 has the category_id 1, which"),
        (without("annotations", "category_id"), r"the annotation 0 has the category_id None"),
        (
            with_first("annotations", bbox=[1, 2, float("nan"), 3]),
            r"the annotation 0 has the bbox .*nan.*finite",
        ),
        (with_first("annotations", bbox=[1, 2, float("inf"), 3]), r"the annotation 0 has the bbox .*inf"),
        (with_first("annotations", bbox=[1e308, 2, 1e308, 3]), r"the annotation 0 has the bbox"),
        (with_first("annotations", bbox=[10**400, 2, 1, 3]), r"the annotation 0 has the bbox"),
        (with_first("annotations", bbox=[1, 2, 3]), r"the annotation 0 has the bbox"),
        (
            with_first("annotations", bbox=["1", "2", "3", "4"]),
            r"the annotation 0 has the bbox .*four finite numbers",
        ),
        (with_first("annotations", bbox=[True, 2, 3, 4]), r"the annotation 0 has the bbox"),
        (with_first("annotations", iscrowd="0"), r"the annotation 0 has the iscrowd '0'; it must be 0 or 1"),
        (with_first("annotations", ignore=2), r"the annotation 0 has the ignore 2"),
        (with_first("annotations", bbox=[1, 2, 3, None]), r"the annotation 0 has the bbox"),
        (without("annotations", "bbox"), r"the annotation 0 has the bbox None"),
        (lambda said: said.pop("annotations"), r"has no 'annotations'"),
        (lambda said: said.update(images={"a": 1}), r"'images' is not a list of objects"),
        (lambda said: said["annotations"].append(7), r"'annotations' is not a list of objects"),
        (lambda said: said["images"].clear() or said["annotations"].clear(), r"there are no images in"),
    ],
)
def test_one_line_says_what_is_wrong_and_where(root: Path, edit: Edit, told: str):
    with pytest.raises(SourceError, match=told) as e:
        Source(edited(root, edit))
    assert "\n" not in str(e.value) and str(root) in str(e.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2", b"\xff\xfe\x00", b"[" * 200_000, b"[]", b"7", b'{"images": ' + b"9" * 5000 + b"}"],
)
def test_what_is_not_coco_at_all_is_one_line(root: Path, content: bytes):
    file = root / "annotations" / "instances_train.json"
    file.write_bytes(content)
    with pytest.raises(SourceError, match=r"instances_train\.json (is not JSON|has no 'images')") as e:
        Source(root)
    assert "\n" not in str(e.value)


def test_odd_annotations_are_kept_by_a_stated_rule(root: Path):
    def edit(said: dict[str, Any]) -> None:
        first, second, third, fourth, *_ = said["annotations"]
        first.update(bbox=[5, 6, 0, 9])
        second.update(bbox=[5, 6, 7, -1])
        third.update(bbox=[-3.5, 10, 100, 200], ignore=1)
        fourth.update(iscrowd=1)
        del said["annotations"][9]

    source = Source(edited(root, edit))
    assert boxes(source, "000.png").xyxy.tolist() == [[5, 6, 5, 15]] and boxes(source, "000.png").ignore.all()
    assert boxes(source, "001.png").xyxy.tolist() == [[5, 6, 12, 6]] and boxes(source, "001.png").ignore.all()
    outside = boxes(source, "002.png")
    assert (
        outside.xyxy.tolist() == [[-3.5, 10, 96.5, 210]] and outside.ignore.all() and not outside.crowd.any()
    )
    assert boxes(source, "003.png").crowd.all() and not boxes(source, "003.png").ignore.any()
    bare = boxes(source, "009.png")
    assert len(bare) == 0 and bare.xyxy.shape == (0, 4) and bare.to_bytes() == Boxes.empty().to_bytes()
    assert (
        "9 boxes (1 around crowds, 1 to be ignored, 2 without an area, which are ignored), none in 1 image"
        in source.describe()
    )


def test_a_split_may_show_nothing_at_all(root: Path):
    source = Source(edited(root, lambda said: said["annotations"].clear()))
    assert "0 boxes, none in 10 images" in source.describe() and len(boxes(source, "003.png")) == 0
    assert source.has_boxes and source.boxes_digest is not None


def test_labels_count_categories_by_their_id(root: Path):
    source = Source(root)
    assert source.classes == ("cat", "dog") and "category ids 3 to 7 are labels 0 to 1" in source.describe()
    for i, id in enumerate(source.ids):
        left, top, width, height = layouts.box(i)
        assert boxes(source, id).xyxy.tolist() == [[left, top, left + width, top + height]]
        assert boxes(source, id).label.tolist() == [layouts.label(i, 10)]


def test_equal_basenames_are_different_images(root: Path):
    images = root / "images" / "train"
    (images / "a").mkdir()
    (images / "b").mkdir()
    (images / "000.png").rename(images / "a" / "x.png")
    (images / "001.png").rename(images / "b" / "x.png")

    def edit(said: dict[str, Any]) -> None:
        said["images"][0]["file_name"] = "b\\x.png"
        said["images"][1]["file_name"] = "a//x.png"

    source = Source(edited(root, edit))
    assert source.ids[-2:] == ("a/x.png", "b/x.png")
    assert np.array_equal(source.image(8), layouts.pixels(0))
    assert boxes(source, "a/x.png").xyxy[0, 0] == layouts.box(1)[0]


def test_sizes_may_be_missing_but_not_wrong(root: Path):
    source = Source(edited(root, without("images", "width")))
    assert len(boxes(source, "000.png")) == 1
    source = Source(edited(root, with_first("images", width=20, height=24)))
    with pytest.raises(SourceError, match=r"000\.png has 24 × 20 pixels.*drawn on 20 × 24.*EXIF"):
        source.boxes(0)
    with pytest.raises(SourceError, match="drawn on 20 × 24"):
        _ = source.boxes_digest


def test_the_order_in_the_file_is_no_matter_but_every_number_is(root: Path):
    before = Source(root).boxes_digest
    assert (
        Source(
            edited(root, lambda said: (said["images"].reverse(), said["categories"].reverse()))
        ).boxes_digest
        == before
    )
    seen = {before}
    for change in (
        with_first("annotations", bbox=[2.0, 1.5, 10.25, 12.001]),
        with_first("annotations", category_id=7),
        with_first("annotations", iscrowd=1),
        with_first("annotations", ignore=1),
        lambda said: said["annotations"].pop(3),
    ):
        seen.add(Source(edited(root, change)).boxes_digest)
    assert len(seen) == 6


def test_the_digest_is_the_one_that_is_documented(root: Path):
    """docs/format.md, written out by hand."""
    source = Source(edited(root, lambda said: said["annotations"].pop(4)))
    total = hashlib.sha256()
    for i in range(10):
        left, top, width, height = layouts.box(i)
        total.update(f'["{i:03}.png",{int(i != 4)}]\n'.encode())
        if i != 4:
            total.update(struct.pack("<4dq??", left, top, left + width, top + height, i // 5, False, False))
    assert source.boxes_digest == total.hexdigest()


def test_boxes_are_read_only(root: Path):
    found = boxes(Source(root), "000.png")
    with pytest.raises(ValueError, match="read-only"):
        found.xyxy[0, 0] = 1
    with pytest.raises(ValueError, match="shape"):
        Boxes(np.zeros((2, 3)), np.zeros(2), np.zeros(2), np.zeros(2))


# --- what it is told from -----------------------------------------------------------------------


def test_a_tree_of_images_is_coco_only_with_its_file(root: Path):
    assert Source(root).layout == "coco"
    (root / "annotations" / "instances_train.json").unlink()
    (root / "annotations").rmdir()
    assert Source(root).layout == "imagefolder"
    assert not Source(root).has_boxes and Source(root).boxes(0) is None and Source(root).boxes_digest is None


# --- a cache of it ------------------------------------------------------------------------------


class EightyClasses(ToyTeacher):
    def __init__(self, classes: tuple[str, ...] | None = None) -> None:
        self.classes = classes

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        said = super().__call__(pixels)
        return {**said, "logits": said["vector"][:, np.arange(80) % 24] + np.arange(80, dtype=np.float32)}


def copied(shared_data: Path, to: Path) -> Path:
    """coco356 again, its images linked, its annotations writable."""
    (to / "annotations").mkdir(parents=True)
    (to / "images").symlink_to(shared_data / "coco356" / "images")
    name = "annotations/instances_val2017.json"
    (to / name).write_bytes((shared_data / "coco356" / name).read_bytes())
    return to


BUILD: dict[str, Any] = {
    "split": "val2017", "limit": 8, "recipe": "random_resized_crop(8)|flip", "views": 2, "block_rows": 4, "batch": 4,
    "targets": {"logits": "full(u8)"}, "progress": False,
}  # fmt: skip


def test_a_build_knows_its_boxes_and_refuses_others(shared_data: Path, tmp_path: Path):
    root, out = copied(shared_data, tmp_path / "coco"), tmp_path / "cache"
    source = Source(root, split="val2017", limit=8)
    teacher = EightyClasses((source.classes or ())[::-1])
    cache = sc.build(out, source=root, teacher=teacher, **BUILD)
    assert cache.identity["source"]["boxes"] == source.boxes_digest
    assert cache.identity["source"]["labels"] is None and cache.classes == source.classes
    assert cache.identity["teacher"]["columns"] == list(range(79, -1, -1))
    assert json.loads((out / "softcache.json").read_text())["report"]["top1"] is None
    digest = cache.digest

    receipt = next(f for f in (out / "receipts").rglob("*.json") if f.name != "identity.json")
    for gone in (out / "softcache.json", receipt):
        gone.unlink()
    assert sc.build(out, source=root, teacher=teacher, **BUILD).digest == digest

    whose = {
        a["image_id"]
        for a in json.loads((root / "annotations/instances_val2017.json").read_text())["annotations"]
    }
    ours = next(int(id[:-4]) for id in source.ids if int(id[:-4]) in whose)

    def edit(said: dict[str, Any]) -> None:
        next(a for a in said["annotations"] if a["image_id"] == ours)["bbox"][0] += 0.25

    assert "NOTE" not in canary.pair(sc.open(out), source).message
    edited(root, edit, "val2017")
    changed = Source(root, split="val2017", limit=8)
    assert (
        "NOTE: its boxes are not those the cache was built with" in canary.pair(sc.open(out), changed).message
    )
    with pytest.raises(
        MismatchError, match=r"source\.boxes is [0-9a-f]+ there and [0-9a-f]+ here|source\.boxes is"
    ):
        sc.build(out, source=root, teacher=teacher, **BUILD)


def test_a_cache_of_it_trains_and_says_so(shared_data: Path, tmp_path: Path, capsys):
    """By the commands: no label is known, and nobody claims a top-1 or a cross entropy."""
    pytest.importorskip("torch")
    st = pytest.importorskip("softcache_train")
    root = shared_data / "coco356"
    out = tmp_path / "cache"
    cache = sc.build(out, source=root, teacher=EightyClasses(), **BUILD)
    source = Source(root, split="val2017")
    batch = next(iter(st.Loader(cache, source, global_batch=4, seed=0)))
    assert set(batch.labels.tolist()) == {-1} and batch.images.shape[0] == 4
    item = sc.with_targets(source, cache)[0]
    assert item["label"] == -1 and item["logits"].shape == (80,)
    assert sc.verify(cache, read_data=True) == []
    with pytest.raises(MismatchError, match=r"answers 4 classes and the source names 80.*--ignore-labels"):
        sc.build(tmp_path / "other", source=root, teacher=toy_teacher(), **BUILD)
    other = sc.build(tmp_path / "other", source=root, teacher=toy_teacher(), ignore_labels=True, **BUILD)
    assert other.classes is None and other.identity["source"]["boxes"] == cache.identity["source"]["boxes"]
    assert cli.main(["show", str(out)]) == 0 and "coco" in capsys.readouterr().out
