"""COCO JSON: real annotations against pycocotools' own reading of them, every bad file, and a build that knows its boxes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest

from softcache.errors import SourceError
from softcache.source import Boxes, Source

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
