"""YOLO: what a data.yaml names is found, its boxes are those it was written from, and every bad line is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image, ImageOps

import softcache as sc
from softcache.errors import MismatchError, SourceError, UnreadableImage
from softcache.source import Boxes, Source, find_unreadable
from softcache.testing import toy_teacher


@pytest.fixture
def root(tmp_path: Path) -> Path:
    layouts.write("yolo", tmp_path / "pets")
    return tmp_path / "pets"


def boxes(source: Source, id: str) -> Boxes:
    found = source.boxes(source.index(id))
    assert found is not None
    return found


def say(root: Path, text: str) -> Path:
    (root / "data.yaml").write_text(text)
    return root


def lines(root: Path, text: str | bytes, image: int = 0) -> Path:
    """``root`` again, with this label file of an image."""
    content = text if isinstance(text, bytes) else text.encode()
    (root / "labels" / "train" / f"{image:03}.txt").write_bytes(content)
    return root


# --- against COCO's own ---------------------------------------------------------------------------


def from_coco(
    coco: Source, images: Path, root: Path, line: Callable[[int, np.ndarray, float, float], str]
) -> Path:
    """A COCO source as people convert it, a line a box; its images linked."""
    (root / "images").mkdir(parents=True)
    (root / "images" / "val").symlink_to(images)
    (root / "labels" / "val").mkdir(parents=True)
    for id in coco.ids:
        found = boxes(coco, id)
        width, height = Image.open(images / id).size
        text = "".join(
            line(c, b, width, height) for c, b in zip(found.label.tolist(), found.xyxy, strict=True)
        )
        if text:
            (root / "labels" / "val" / f"{id[:-4]}.txt").write_text(text)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(coco.classes or ()))
    return say(root, f"path: ../somewhere/{root.name}\nval: images/val\nnames:\n{names}")


def as_box(label: int, box: np.ndarray, width: float, height: float) -> str:
    x1, y1, x2, y2 = box / (width, height, width, height)
    return f"{label} {(x1 + x2) / 2:.8f} {(y1 + y2) / 2:.8f} {x2 - x1:.8f} {y2 - y1:.8f}\n"


def as_outline(label: int, box: np.ndarray, width: float, height: float) -> str:
    """A diamond that touches the middle of every side."""
    x1, y1, x2, y2 = box / (width, height, width, height)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return f"{label} {x} {y1} {x2} {y} {x} {y2} {x1} {y}\n"


@pytest.mark.parametrize("line", [as_box, as_outline])
def test_coco_written_as_yolo_is_the_same_boxes(shared_data: Path, tmp_path: Path, line):
    coco = Source(shared_data / "coco356", split="val2017")
    source = Source(from_coco(coco, shared_data / "coco356" / "images" / "val2017", tmp_path / "y", line))
    assert (source.layout, source.split, len(source)) == ("yolo", "val", 164)
    assert source.classes == coco.classes and source.has_boxes
    assert ("1,560 of them enclose outlines" in source.describe()) == (line is as_outline)
    for id in coco.ids:
        ours, theirs = boxes(source, f"images/val/{id}"), boxes(coco, id)
        assert np.array_equal(ours.label, theirs.label) and not ours.crowd.any() and not ours.ignore.any()
        assert np.abs(ours.xyxy - theirs.xyxy).max() < 1e-3
    some = pickle.loads(pickle.dumps(source.sample(9)))
    assert boxes(some, some.ids[3]).to_bytes() == boxes(source, some.ids[3]).to_bytes()


# --- where things lie -----------------------------------------------------------------------------

LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 20)}]\n" for a, b in pairwise("abcdefghij")
)
NAMES = "names: [cat, dog]\n"


@pytest.mark.parametrize(
    "text",
    [
        "train: images/train\n",
        "train: ./images/train/\n",
        "path: .\ntrain: images/train\n",
        "path: ../pets\ntrain: images/train\nval:\ntest:\n",
        "path: /nowhere/pets\ntrain: images/train\n",
        "train: ../images/train\n",
        "train: [images/train]\n",
        "train: images\n",
        "train: train.txt\n",
        "train: lists/train.txt\n",
        "path: ..\ntrain: pets/images/train\n",
    ],
)
def test_a_split_is_a_folder_or_folders_or_a_list(root: Path, text: str):
    names = "".join(f"./images/train/{i:03}.png\n\n" for i in range(10))
    (root / "train.txt").write_text(names)
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text(names.replace("./", ""))
    source = Source(say(root, NAMES + text))
    assert (source.layout, source.split, len(source)) == ("yolo", "train", 10)
    for i in (0, 7):
        left, top, width, height = layouts.box(i)
        found = boxes(source, source.ids[i])
        assert source.ids[i].endswith(f"images/train/{i:03}.png") and found.label.tolist() == [
            layouts.label(i, 10)
        ]
        assert np.allclose(found.xyxy, [[left, top, left + width, top + height]], atol=1e-9)
    assert ("but in" in source.describe()) == ("/nowhere" in text)
    again = Source(root / "data.yaml")
    assert (again.ids, again.boxes_digest) == (source.ids, source.boxes_digest)


def test_the_yaml_may_lie_elsewhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    aside = tmp_path / "configs" / "pets.yml"
    aside.parent.mkdir()
    aside.write_text(NAMES + "path: ../pets\ntrain: images/train\n")
    ids = Source(root).ids
    assert Source(aside).ids == ids
    aside.write_text(NAMES + f"train: {root}/images/train\n")
    assert Source(aside).ids == tuple(id.removeprefix("images/train/") for id in ids)
    monkeypatch.chdir(aside.parent)
    assert len(Source("pets.yml")) == 10 and Source("pets.yml").image(0).shape == (20, 24, 3)


def test_images_of_several_folders_keep_their_paths(root: Path):
    layouts.write("yolo", root, "val", count=6, seed=100)
    source = Source(say(root, NAMES + "train: [images/val, images/train]\n"))
    assert len(source) == 16 and {"images/val/003.png", "images/train/003.png"} < set(source.ids)
    assert np.array_equal(source.image(source.index("images/val/003.png")), layouts.pixels(103))
    with pytest.raises(SourceError, match=r"two samples called 'images/val/000\.png'"):
        Source(say(root, NAMES + "train: [images/val, images/val]\n"))


def test_labels_lie_beside_images_where_no_folder_is_called_so(tmp_path: Path):
    root = tmp_path / "flat"
    layouts.write("yolo", root)
    for kind in ("images", "labels"):
        for file in (root / kind / "train").iterdir():
            file.rename(root / file.name)
    source = Source(say(root, NAMES + "train: .\n"))
    assert source.layout == "yolo" and source.ids[0] == "000.png" and len(boxes(source, "000.png")) == 1


def test_the_last_folder_called_images_counts(root: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    source = Source(root.rename(tmp_path / "images" / "pets"))
    assert all(len(boxes(source, id)) == 1 for id in source.ids)


@pytest.mark.parametrize(
    ("text", "tried"),
    [
        ("train: pictures\n", ["{}/pictures"]),
        ("path: data\ntrain: ../pictures\n", ["{}/pictures", "{}/../pictures", "{}/data/pictures"]),
        ("path: /nowhere\ntrain: pictures\n", ["/nowhere/pictures", "{}/pictures"]),
        ("train: list.txt\n", ["list.txt:2 names './x.png'", "{}/x.png"]),
        ("train: [images/train, other]\n", ["{}/other"]),
    ],
)
def test_every_path_that_was_tried_is_named(root: Path, text: str, tried: list[str]):
    (root / "list.txt").write_text("./images/train/000.png\n./x.png\n")
    with pytest.raises(SourceError, match="which is not there; looked for") as e:
        Source(say(root, NAMES + text))
    for path in tried:
        assert path.format(root).replace("/pets/..", "") in str(e.value)
    assert "\n" not in str(e.value)


# --- what may be wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("names: {0: cat, 2: dog}\ntrain: images/train\n", "2 names, and none for class 1"),
        ("names: {1: cat, 2: dog}\ntrain: images/train\n", "2 names, and none for class 0"),
        ("names: [cat, cat]\ntrain: images/train\n", "two classes called 'cat'"),
        ("names: [yes, no]\ntrain: images/train\n", "class 0 reads as True; put it in quotes"),
        ("names: [cat, [dog]]\ntrain: images/train\n", "class 1 reads as"),
        ("names: []\ntrain: images/train\n", "names no classes"),
        ("names: 7\ntrain: images/train\n", "names no classes"),
        ("nc: 2\ntrain: images/train\n", "names no classes"),
        ("nc: 3\nnames: [cat, dog]\ntrain: images/train\n", "nc: 3 and 2 names"),
        ("names: [cat]\n", "none of train, val, test"),
        ("names: [cat]\ntrain: 7\n", "names 7 where a folder"),
        ("names: [cat]\ntrain: {a: b}\n", "where a folder"),
        ("names: [cat]\npath: [a]\ntrain: images/train\n", "'path' is"),
        ("names: [cat]\ntrain: labels\n", "there are no images in 'labels'"),
        ("names: [cat]\ntrain: " + "x" * 5000, "which is not there"),
        ("names: [cat\n", "is not YAML"),
        (LAUGHS + "names: [cat, *j]\ntrain: images/train\n", "class 1 reads as .{3,500}; put"),
        (LAUGHS + "names: [cat]\nnc: *j\ntrain: images/train\n", "nc: .{3,500} and 1 names"),
        (LAUGHS + "names: [cat]\ntrain: [*j]\n", "names .{3,500} where a folder"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        ("a: 2020-13-45\n", "is not YAML"),
        ("- a\n", "is no data.yaml"),
        ("[" * 3000, "is not YAML"),
    ],
)
def test_one_line_says_what_is_wrong_in_the_yaml(root: Path, text: str, told: str):
    with pytest.raises(SourceError, match=told) as e:
        Source(say(root, text) / "data.yaml")
    assert "\n" not in str(e.value) and "data.yaml" in str(e.value)


def test_names_may_be_numbers_and_numbered(root: Path):
    assert Source(say(root, "names: [0, 1]\ntrain: images/train\n")).classes == ("0", "1")
    assert Source(say(root, "names: {1: dog, 0: cat}\nnc: 2\ntrain: images/train\n")).classes == (
        "cat",
        "dog",
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2 .5 .5 .1 .1", "the class is 2, and there are 2"),
        ("-1 .5 .5 .1 .1", "the class is -1"),
        ("0.5 .5 .5 .1 .1", r"the class is 0\.5"),
        ("nan .5 .5 .1 .1", "the class is nan"),
        ("0 .5 .5 .1", "it has 4 numbers"),
        ("0 .5 .5 .1 .1 .9", "it has 6 numbers"),
        ("0 .1 .2 .3 .4 .5 .6 .7", "it has 8 numbers"),
        ("0", "it has 1 numbers"),
        ("cat .5 .5 .1 .1", "could not convert"),
        ("0 .5 nan .1 .1", "not finite"),
        ("0 .5 inf .1 .1", "not finite"),
        ("0 12 10 8 6", "no shares of the sides"),
        (b"0 .5 .5 .1 .1 \xff", "no text file"),
    ],
)
def test_a_line_that_is_wrong_is_named_by_file_and_number(root: Path, text: str | bytes, told: str):
    text = text if isinstance(text, bytes) else f"0 .5 .5 .1 .1\n\n{text}\n"
    number = "" if isinstance(text, bytes) else ":3"
    with pytest.raises(SourceError, match=rf"labels/train/004\.txt{number}.*{told}") as e:
        Source(lines(root, text, 4))
    assert "\n" not in str(e.value)


def test_odd_boxes_are_kept_by_a_stated_rule(root: Path):
    lines(root, "\ufeff1 .5 .5 .25 0\r\n0 .5 .5 -.5 .5\r\n0.0 0 1 1.5 .5\r\n")
    (root / "labels" / "train" / "001.txt").unlink()
    lines(root, "", 2)
    source = Source(root)
    found = boxes(source, "images/train/000.png")
    assert found.label.tolist() == [1, 0, 0] and found.ignore.tolist() == [True, True, False]
    assert found.xyxy.tolist() == [[9, 10, 15, 10], [12, 5, 12, 15], [-18, 15, 18, 25]]
    assert len(boxes(source, "images/train/001.png")) == len(boxes(source, "images/train/002.png")) == 0
    told = source.describe()
    assert "10 boxes (2 without an area, which are ignored), none in 2 images" in told
    assert "1 image without a file of labels, taken to show nothing" in told


def test_a_dataset_of_keypoints_has_its_boxes(root: Path):
    lines(root, "1 .5 .5 .25 .5 .4 .4 .6 .6\n")
    pose = NAMES + "kpt_shape: [2, 2]\ntrain: images/train\n"
    assert boxes(Source(say(root, pose)), "images/train/000.png").xyxy.tolist() == [[9, 5, 15, 15]]


def test_labels_that_are_nowhere_are_no_empty_dataset(root: Path):
    (root / "labels").rename(root / "annotation")
    with pytest.raises(
        SourceError, match=r"none of the 10 images .*train/000\.png would have .*labels/train/000\.txt"
    ):
        Source(root)


def test_which_yaml_is_asked_where_there_are_several(root: Path):
    (root / "other.yaml").write_text("lr: 0.1\n")
    (root / "broken.yml").write_text("names: [")
    assert len(Source(root)) == 10
    (root / "coco.yml").write_bytes((root / "data.yaml").read_bytes())
    with pytest.raises(SourceError, match=r"it has coco\.yml, data\.yaml: give the path of one"):
        Source(root)
    assert len(Source(root / "coco.yml")) == 10
    (root / "data.yaml").unlink()
    (root / "coco.yml").unlink()
    with pytest.raises(SourceError):
        Source(root)


# --- images out of the ordinary -------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_go_where_the_thing_is_in_the_pixels_that_are_stored(
    tmp_path: Path, orientation: int, form: str
):
    """A white rectangle, boxed as a person sees it: turned by EXIF."""
    stored = np.zeros((48, 80, 3), np.uint8)
    stored[8:16, 48:72] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    file, how = tmp_path / "images" / f"a.{form}", {"jpg": {"quality": 95, "subsampling": 0}, "png": {}}
    Image.fromarray(stored).save(file, exif=exif, **how.get(form, {"lossless": True}))
    seen = np.asarray(ImageOps.exif_transpose(Image.open(file)))[:, :, 0] > 127
    height, width = seen.shape
    down, across = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    shown = np.array([across[0], down[0], across[-1] + 1, down[-1] + 1], float)
    (tmp_path / "labels" / "a.txt").write_text(as_box(0, shown, width, height))
    source = Source(say(tmp_path, "names: [box]\ntrain: images\n"))
    assert np.allclose(boxes(source, f"images/a.{form}").xyxy, [[48, 8, 72, 16]], atol=1e-6)
    left, top, right, bottom = boxes(source, f"images/a.{form}").xyxy[0].round().astype(int)
    assert source.image(0)[top:bottom, left:right].min() > 200


@pytest.mark.parametrize(
    "form", ["grey.png", "grey.jpg", "cmyk.jpg", "cmyk.tif", "palette.gif", "one.png", "big.webp"]
)
def test_sizes_are_read_of_every_kind_of_image(root: Path, form: str):
    kind, suffix = form.split(".")
    width, height = (1, 1) if kind == "one" else (31, 17)
    image = Image.fromarray(layouts.pixels(3, height, width))
    mode = {"grey": "L", "cmyk": "CMYK", "palette": "P"}.get(kind, "RGB")
    image.convert(mode).save(root / "images" / "train" / f"x.{suffix}")
    (root / "labels" / "train" / "x.txt").write_text("1 .5 .5 1 1\n")
    source = Source(root)
    i = source.index(f"images/train/x.{suffix}")
    assert source.image(i).shape == (height, width, 3)
    assert boxes(source, source.ids[i]).xyxy.tolist() == [[0, 0, width, height]]


def test_an_image_that_is_damaged_has_no_boxes_in_pixels(root: Path, tmp_path: Path):
    (root / "images" / "train" / "003.png").write_bytes(b"\x89PNG damaged")
    source = Source(root)
    with pytest.raises(UnreadableImage, match=r"003\.png"):
        source.boxes(3)
    assert find_unreadable(source) == ["images/train/003.png"] and source.boxes_digest is not None
    build = {"recipe": "random_resized_crop(8)|flip", "targets": {"vector": "f16"}, "progress": False}
    cache = sc.build(tmp_path / "c", source=root, teacher=toy_teacher(), skip_corrupt=True, **build)
    assert list(cache.invalid) == [3]
    assert cache.identity["source"]["boxes"] == source.boxes_digest
    (tmp_path / "c" / "softcache.json").unlink()
    lines(root, "0 .5 .5 .5 .5001", 7)
    with pytest.raises(MismatchError, match=r"source\.boxes is"):
        sc.build(tmp_path / "c", source=root, teacher=toy_teacher(), skip_corrupt=True, **build)


def test_a_missing_image_is_a_matter_of_the_system(root: Path):
    source = Source(root)
    (root / "images" / "train" / "003.png").unlink()
    with pytest.raises(SourceError, match="No such file") as e:
        source.boxes(3)
    assert not isinstance(e.value, UnreadableImage)
