from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import layouts
import numpy as np
import pytest
from PIL import Image, ImageFile

from softcache.errors import SourceError, SpecError, UnreadableImage
from softcache.keyed import hash64
from softcache.source import LAYOUTS, Source, find_unreadable, rowgroups
from softcache.source.decode import to_rgb

REPO = Path(__file__).resolve().parents[1]


def pixels(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: np.ndarray | Image.Image, form: str = "PNG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def fill(folder: Path, **classes: int) -> Path:
    """``classes``: name → number of PNG files."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / name / f"{i:03}.png").write_bytes(encoded(pixels(hash64(name, i) % 1000)))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "pets", dog=3, cat=5)


@pytest.fixture(scope="module")
def cifar(shared_data: Path) -> Source:
    pytest.importorskip("pyarrow")
    return Source(shared_data / "cifar10", split="train")


# --- Parquet: the real thing --------------------------------------------------------------------


def test_cifar10_as_it_lies(cifar: Source):
    assert (cifar.layout, cifar.split, len(cifar)) == ("parquet", "train", 30_000)
    assert cifar.ids[0] == "train/dog/chihuahua_s_000385.png"
    assert len(set(cifar.ids)) == 30_000
    assert cifar.classes is not None and cifar.classes[5] == "dog"
    assert cifar.label(cifar.ids[0]) == 5
    assert cifar.labels.dtype == np.int64 and set(cifar.labels.tolist()) == set(range(10))
    assert "3 of 5 files of this split are here" in cifar.describe()
    assert all(id.split("/")[1] == cifar.classes[cifar.label(id) or 0] for id in cifar.ids[::500])


def test_cifar10_pixels_are_those_of_the_row(cifar: Source, shared_data: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = shared_data / "cifar10" / "train-00001-of-00005.parquet"
    rows = parquet.ParquetFile(file).read_row_group(1).to_pylist()
    for i, row in zip(range(11_000, 12_000, 250), rows[::250], strict=True):
        assert cifar.ids[i] == row["img"]["path"]
        expected = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB"))
        assert np.array_equal(cifar.image(i), expected)
        assert cifar[i].shape == (32, 32, 3)


def test_cifar10_splits_must_be_chosen(shared_data: Path):
    pytest.importorskip("pyarrow")
    with pytest.raises(SourceError, match="test, train"):
        Source(shared_data / "cifar10")
    with pytest.raises(SourceError, match="did you mean 'train'"):
        Source(shared_data / "cifar10", split="trian")


def test_limit_is_a_keyed_sample_and_nests(cifar: Source, shared_data: Path):
    large = Source(shared_data / "cifar10", split="train", limit=1024)
    small = Source(shared_data / "cifar10", split="train", limit=512)
    assert len(small) == 512 and set(small.ids) < set(large.ids)
    assert [id for id in cifar.ids if id in set(small.ids)] == list(small.ids)
    assert small.ids != cifar.ids[:512]
    largest_in = max(hash64("limit", id) for id in small.ids)
    assert sum(hash64("limit", id) <= largest_in for id in cifar.ids) == 512
    assert np.array_equal(small.image(7), cifar.image(cifar.index(small.ids[7])))
    assert small.label(small.ids[7]) == cifar.label(small.ids[7])
    assert "512 of 30,000 samples" in small.describe()


def test_a_source_goes_to_another_process(cifar: Source):
    cifar.image(3)
    data = pickle.dumps(cifar)
    assert len(data) < 4 << 20  # no row group goes along
    assert np.array_equal(pickle.loads(data).image(3), cifar.image(3))


def test_row_groups_stay_within_their_budget(cifar: Source, monkeypatch: pytest.MonkeyPatch):
    again = pickle.loads(pickle.dumps(cifar))
    monkeypatch.setattr(rowgroups, "BUDGET", 4_000_000)  # two of these row groups
    for i in range(0, 30_000, 1000):
        again.image(i)
        assert len(again._samples.images._kept) <= 2
    assert np.array_equal(again.image(0), cifar.image(0))


# --- Parquet: made here -------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict, features: dict | None = None) -> Path:
    pa = pytest.importorskip("pyarrow")
    import json

    import pyarrow.parquet as pq

    table = pa.table(columns)
    if features is not None:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int32"])
def test_labels_are_whole_numbers_of_any_kind(tmp_path: Path, kind: str):
    pa = pytest.importorskip("pyarrow")
    labels = pa.array([3, None, 0, 100], kind)
    write_parquet(tmp_path / "x.parquet", {"image": images(4), "label": labels})
    assert Source(tmp_path).labels.tolist() == [3, -1, 0, 100]


def test_a_label_past_all_whole_numbers_is_refused(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "x.parquet", {"image": images(1), "label": pa.array([1 << 63], pa.uint64())})
    with pytest.raises(SourceError, match="a label is no class"):
        Source(tmp_path)


@pytest.mark.parametrize("labels", [["cat", "dog"], [0.0, 1.0]])
def test_labels_that_are_no_whole_numbers_are_told_of(tmp_path: Path, labels: list):
    write_parquet(tmp_path / "x.parquet", {"image": images(2), "label": labels})
    source = Source(tmp_path)
    assert source.labels.tolist() == [-1, -1] and "no labels: the column label (" in source.describe()


def images(count: int, paths: list | None = None) -> list[dict]:
    names = paths or [f"{i}.png" for i in range(count)]
    return [{"bytes": encoded(pixels(i)), "path": names[i]} for i in range(count)]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "train"),
        (["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"], "train"),
        (["data/test.parquet"], "test"),
        (["validation/part-0.parquet", "validation/part-1.parquet"], "validation"),
    ],
)
def test_parquet_files_and_their_splits(tmp_path: Path, names: list[str], split: str):
    for n, name in enumerate(names):
        write_parquet(tmp_path / name, {"image": images(3, [f"{n}-{i}" for i in range(3)])})
    source = Source(tmp_path)
    assert (source.split, len(source)) == (split, 3 * len(names))
    assert source.labels.tolist() == [-1] * len(source) and source.classes is None
    assert source.label(source.ids[0]) is None
    assert np.array_equal(source.image(2), pixels(2))


@pytest.mark.parametrize(
    "paths",
    [["a", "a", "b"], ["a", None, "b"], ["/home/x/a", "b", "c"], ["C:\\a", "b", "c"], ["", "b", "c"]],
)
def test_ids_are_file_and_row_where_paths_are_no_names(tmp_path: Path, paths: list):
    source = Source(write_parquet(tmp_path / "train.parquet", {"image": images(3, paths)}))
    assert source.ids == ("train:0", "train:1", "train:2")


def test_a_plain_binary_column_and_class_names(tmp_path: Path):
    columns = {
        "caption": ["x", "y", "z"],
        "jpg": [encoded(pixels(i)) for i in range(3)],
        "kind": [1, None, 0],
        "label": [9, 9, 9],
    }
    features = {"kind": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "label": {"_type": "Value"}}
    file = write_parquet(tmp_path / "test.parquet", columns, features)
    source = Source(file)
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [1, -1, 0]
    assert Source(file, label_column="label").labels.tolist() == [9, 9, 9]


def test_columns_that_are_absent_or_could_be_several(tmp_path: Path):
    pictures = [encoded(pixels(i)) for i in range(2)]
    none = write_parquet(tmp_path / "a.parquet", {"text": ["x", "y"], "label": [0, 1]})
    two = write_parquet(tmp_path / "b.parquet", {"left": pictures, "right": pictures})
    labels = {"image": pictures, "fine": [0, 1], "coarse": [0, 0]}
    features = {name: {"_type": "ClassLabel", "names": ["p", "q"]} for name in ("fine", "coarse")}
    several = write_parquet(tmp_path / "c.parquet", labels, features)
    with pytest.raises(SourceError, match=r"no column holds images.*text \(string\)"):
        Source(none)
    with pytest.raises(SourceError, match=r"left, right.*image_column="):
        Source(two)
    assert len(Source(two, image_column="right")) == 2
    with pytest.raises(SourceError, match=r"fine, coarse.*label_column="):
        Source(several)
    assert Source(several, label_column="fine").labels.tolist() == [0, 1]
    with pytest.raises(SourceError, match="did you mean 'coarse'"):
        Source(several, label_column="coarce")
    with pytest.raises(SourceError, match=r"'fine' cannot be the image"):
        Source(several, image_column="fine")


def test_labels_beyond_the_classes_are_refused(tmp_path: Path):
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    columns = {"image": images(3), "label": [0, 2, 1]}
    source = Source(write_parquet(tmp_path / "train.parquet", columns, features))
    with pytest.raises(SourceError, match=r"'1.png'.*label 2.*2 classes"):
        _ = source.labels


def test_files_of_two_exports_are_not_mixed(tmp_path: Path):
    for name in ("train-00000-of-00001.parquet", "train-00001-of-00002.parquet"):
        write_parquet(tmp_path / name, {"image": images(2)})
    with pytest.raises(SourceError, match="of 1 and of 2"):
        Source(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    file = write_parquet(tmp_path / "train.parquet", {"image": images(2)})
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(SourceError, match=r"cannot read .*train\.parquet"):
        Source(file)
    pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # all before the footer
    file.write_bytes(b"\xff" * pages + whole[pages:])
    with pytest.raises(SourceError, match=r"cannot read .*train\.parquet"):
        Source(file)


def test_a_row_without_bytes_is_named(tmp_path: Path):
    rows = images(3)
    rows[1]["bytes"] = None
    source = Source(write_parquet(tmp_path / "train.parquet", {"image": rows}))
    with pytest.raises(UnreadableImage, match=r"'1.png' \(.*train.parquet, row 1\).*no bytes"):
        source.image(1)
    assert find_unreadable(source) == ["1.png"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SourceError, match=r"pip install 'softcache\[parquet\]'"):
        Source(tmp_path)


# --- ImageFolder --------------------------------------------------------------------------------


def test_an_image_folder(folder: Path):
    (folder / "cat" / "deep" / "er").mkdir(parents=True)
    (folder / "cat" / "deep" / "er" / "x.JPEG").write_bytes(encoded(pixels(1), "JPEG"))
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    (folder / ".git").mkdir()
    (folder / "dog" / "notes.txt").write_text("not an image")
    source = Source(folder)
    assert (source.layout, source.split) == ("imagefolder", None)
    assert source.classes == ("cat", "dog")
    assert source.ids[:2] == ("cat/000.png", "cat/001.png") and source.ids[5] == "cat/deep/er/x.JPEG"
    assert source.labels.tolist() == [0] * 6 + [1] * 3
    assert "9 samples, 2 classes" in source.describe()
    assert "1 file ignored, of another kind than images" in source.describe()
    assert np.array_equal(source.image(1), pixels(hash64("cat", 1) % 1000))
    assert source.index("dog/000.png") == 6
    with pytest.raises(SourceError, match=r"'dog/9.png'"):
        source.index("dog/9.png")
    assert len(list(source)) == 9  # indexing ends with IndexError


def test_an_image_folder_with_splits(tmp_path: Path):
    fill(tmp_path / "train", cat=2, dog=1)
    fill(tmp_path / "val", cat=1, dog=1)
    assert Source(tmp_path, split="train").ids == ("cat/000.png", "cat/001.png", "dog/000.png")
    assert len(Source(tmp_path, split="val")) == 2
    with pytest.raises(SourceError, match="train, val"):
        Source(tmp_path)
    with pytest.raises(SourceError, match="did you mean 'val'"):
        Source(tmp_path, split="vall")
    with pytest.raises(SourceError, match="no split 'train'"):
        Source(tmp_path / "train", split="train")


def test_a_class_without_images_is_named(folder: Path):
    (folder / "bird").mkdir()
    with pytest.raises(SourceError, match="bird"):
        Source(folder)


def test_a_link_in_a_circle_is_not_followed(folder: Path):
    (folder / "cat" / "up").symlink_to(folder, target_is_directory=True)
    assert len(Source(folder)) == 8


def test_a_file_name_that_is_not_utf8_is_refused(folder: Path):
    try:
        (folder / "cat" / os.fsdecode(b"\xff.png")).write_bytes(encoded(pixels(0)))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SourceError, match="not UTF-8"):
        Source(folder, limit=3)


# --- fingerprint --------------------------------------------------------------------------------


def test_the_fingerprint_is_of_content_and_names(folder: Path):
    first = Source(folder).fingerprint
    for file in folder.rglob("*.png"):
        os.utime(file, (1, 1))
    assert Source(folder).fingerprint == first
    moved = folder.rename(folder.parent / "elsewhere")
    assert Source(moved).fingerprint == first
    victim = moved / "cat" / "002.png"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert Source(moved).fingerprint != first
    assert Source(moved).ids_digest == Source(moved).ids_digest
    data[-1] ^= 1
    victim.write_bytes(data)
    assert Source(moved).fingerprint == first
    before = Source(moved).ids_digest
    victim.rename(victim.with_name("002b.png"))
    assert Source(moved).fingerprint != first and Source(moved).ids_digest != before


def test_the_fingerprint_does_not_depend_on_threads(cifar: Source, shared_data: Path):
    sources = [Source(shared_data / "cifar10", split="train", limit=1000) for _ in range(2)]
    assert sources[0].fingerprint == sources[1].fingerprint != cifar.ids_digest


def test_a_file_gone_since_is_named(folder: Path):
    source = Source(folder)
    (folder / "cat" / "002.png").unlink()
    with pytest.raises(SourceError, match=r"'cat/002.png'.*No such file") as e:
        _ = source.fingerprint
    assert not isinstance(e.value, UnreadableImage), "--skip-corrupt must not take it for a damaged image"


def test_too_many_open_files_are_no_damaged_images():
    class Starved:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> np.ndarray:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    source = Source(Starved())
    with pytest.raises(SourceError, match="Too many open files") as e:
        source.image(0)
    assert not isinstance(e.value, UnreadableImage)


def test_an_image_that_changes_after_the_fingerprint_is_refused(folder: Path):
    source = Source(folder)
    _ = source.fingerprint
    first = folder / source.ids[0]
    first.write_bytes((folder / source.ids[1]).read_bytes())
    with pytest.raises(SourceError, match="changed since it was fingerprinted"):
        source.image(0)
    source.image(1)


# --- decoding -----------------------------------------------------------------------------------


def test_unreadable_images_are_found_and_named(folder: Path):
    jpeg = encoded(pixels(5, 200, 200), "JPEG")
    webp = encoded(pixels(5, 100, 100), "WEBP")
    png = encoded(pixels(5, 100, 100))
    bad = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "cut.webp": webp[: len(webp) // 2],
        "empty.jpg": b"",
        "garbage.png": bytes(range(256)) * 4,
        "lied.jpg": b"\xff\xd8\xff" + bytes(100),
    }
    for name, data in bad.items():
        (folder / "cat" / name).write_bytes(data)
    source = Source(folder)
    assert find_unreadable(source) == [f"cat/{name}" for name in bad]
    for name in bad:
        with pytest.raises(UnreadableImage, match=f"'cat/{name}'.*pets"):
            source.image(source.index(f"cat/{name}"))
    assert source.fingerprint  # identity is of bytes, readable or not


def test_every_truncation_of_a_jpeg_is_refused():
    data = encoded(pixels(1, 64, 64), "JPEG")
    for length in range(0, len(data), 97):
        with pytest.raises((OSError, ValueError)):
            to_rgb(data[:length])


def test_a_process_that_loads_half_images_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(SourceError, match="LOAD_TRUNCATED_IMAGES"):
        to_rgb(encoded(pixels(1))[:500])


def test_a_decompression_bomb_is_refused():
    bomb = encoded(Image.new("L", (20_000, 10_000)))
    with pytest.raises(Image.DecompressionBombError):
        to_rgb(bomb)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_lossless_formats_give_their_pixels(form: str):
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(to_rgb(encoded(pixels(3), form, **options)), pixels(3))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str):
    image = Image.fromarray(pixels(3)).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    assert np.array_equal(to_rgb(encoded(image, form)), np.asarray(image.convert("RGB")))
    assert np.array_equal(to_rgb(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_colour_space(mode: str):
    smooth = Image.fromarray(pixels(3)).resize((160, 120)).convert(mode)
    data = encoded(smooth, "JPEG", quality=95)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(to_rgb(data).astype(int) - theirs).max() <= 2


def test_jpegs_with_harmless_garbage_are_read():
    data = encoded(pixels(3), "JPEG")
    assert to_rgb(data[:-2] + bytes(3) + data[-2:]).shape == (20, 24, 3)


def test_real_jpegs_are_read_as_pillow_reads_them(shared_data: Path):
    source = Source(shared_data / "coco356" / "images", limit=4)
    for i in range(4):
        data = (shared_data / "coco356" / "images" / source.ids[i]).read_bytes()
        theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(source.image(i) - theirs).mean() < 0.5


# --- Python datasets ----------------------------------------------------------------------------


class Tensor:
    """As much of a torch tensor as we look at."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def numpy(self) -> np.ndarray:
        return self.array


@pytest.mark.parametrize(
    "item",
    [
        pixels(1),
        (pixels(1), 0),
        [Image.fromarray(pixels(1)), 0, "more"],
        {"image": pixels(1), "label": 0},
        {"img": encoded(pixels(1)), "labels": np.int64(0)},
        (Tensor(np.moveaxis(pixels(1), -1, 0)), 0),
    ],
)
def test_items_of_every_shape(item: object):
    source = Source([item, item])
    assert (source.layout, source.split, source.ids) == ("dataset", None, ("0", "1"))
    assert np.array_equal(source.image(1), pixels(1))
    assert source.labels.tolist() == ([-1] * 2 if isinstance(item, np.ndarray) else [0] * 2)


def test_grey_images_become_rgb():
    grey = pixels(1)[:, :, 0]
    source = Source([grey, grey[:, :, None], Tensor(grey), Tensor(grey[None])])
    for i in range(4):
        assert np.array_equal(source.image(i), np.stack([grey] * 3, axis=-1))


def test_real_torch_tensors():
    torch = pytest.importorskip("torch")
    image = torch.from_numpy(np.moveaxis(pixels(1), -1, 0).copy())
    source = Source([(image, torch.tensor(3))])
    assert np.array_equal(source.image(0), pixels(1)) and source.labels.tolist() == [3]
    with pytest.raises(SourceError, match=r"float32.*ToTensor"):
        Source([(image.float() / 255, 3)]).image(0)


class Dataset:
    classes = ("cat", "dog")

    def __init__(self, items: list, **attributes: object) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> object:
        item = self.items[i]
        if isinstance(item, Exception):
            raise item
        return item


def test_targets_are_taken_without_decoding():
    source = Source(Dataset([OSError("touched")] * 3, targets=[0, 1, 1]))
    assert source.labels.tolist() == [0, 1, 1] and source.classes == ("cat", "dog")
    with pytest.raises(SourceError, match="expected 3"):
        _ = Source(Dataset([0, 0, 0], targets=[0, 1])).labels


def test_other_items_say_what_is_expected():
    with pytest.raises(SourceError, match="str where an image"):
        Source(["a path"]).image(0)
    with pytest.raises(SourceError, match=r"float64.*uint8"):
        Source([pixels(1) / 255]).image(0)
    with pytest.raises(SourceError, match=r"\(3, 20, 24\)"):
        Source([np.moveaxis(pixels(1), -1, 0)]).image(0)
    with pytest.raises(SourceError, match=r"image or img.*picture.*image_column="):
        Source([{"picture": pixels(1)}]).image(0)
    assert Source([{"picture": pixels(1)}], image_column="picture").image(0).shape == (20, 24, 3)
    with pytest.raises(SourceError, match="'cat', not a whole number"):
        _ = Source([(pixels(1), "cat")]).labels
    with pytest.raises(SourceError, match="neither a path nor"):
        Source(SimpleNamespace())


def test_an_item_that_raises_is_named():
    source = Source(Dataset([pixels(1), OSError("disk on fire"), pixels(2)]))
    assert find_unreadable(source) == ["1"]
    with pytest.raises(UnreadableImage, match=r"'1' \(item 1 of a Dataset\).*disk on fire"):
        source.image(1)


def test_the_fingerprint_of_pixels_knows_their_shape():
    image = pixels(1, 20, 24)
    one = Source([image]).fingerprint
    assert Source([Image.fromarray(image)]).fingerprint == one
    assert Source([image.reshape(24, 20, 3)]).fingerprint != one
    assert Source([image ^ np.uint8(1)]).fingerprint != one


# --- what every layout promises -----------------------------------------------------------------


@pytest.fixture(params=LAYOUTS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, list[bytes]]:
    """Ten images, and the layout and folder that they are in."""
    return request.param, tmp_path / "data", layouts.write(request.param, tmp_path / "data")


def number(id: str) -> int:
    """Of the image, from its name: ``train/cat/003.png`` → 3."""
    return int(id.rsplit("/", 1)[-1].removesuffix(".png"))


def test_every_layout_is_recognised_and_gives_what_was_written(written):
    layout, root, images = written
    source = Source(root)
    assert (source.layout, source.split, len(source)) == (layout, "train", 10)
    assert all(isinstance(id, str) for id in source.ids) and len(set(source.ids)) == 10
    for i, id in enumerate(source.ids):
        assert np.array_equal(source.image(i), layouts.pixels(number(id)))
        expected = None if layout in layouts.UNLABELLED else layouts.label(number(id), 10)
        assert source.label(id) == expected
    assert source.classes == (None if layout == "folder" else layouts.CLASSES)
    assert source.labels.dtype == np.int64 and source.labels.shape == (10,)
    assert source.contents([3]) == [hashlib.sha256(images[number(source.ids[3])]).hexdigest()]
    assert layout in source.describe() and "10 samples" in source.describe()


def test_every_layout_is_the_same_wherever_it_lies_and_whenever_it_was_touched(written):
    layout, root, _ = written
    before = Source(root)
    fingerprint = before.fingerprint
    for file in root.rglob("*"):
        os.utime(file, (1, 1))
    after = Source(root.rename(root.parent / "else where"), layout=layout)
    assert (after.ids, after.fingerprint) == (before.ids, fingerprint)


def test_every_layout_notices_one_changed_bit(written):
    _, root, images = written
    source = Source(root)
    fingerprint = source.fingerprint
    victim = source.ids.index(next(id for id in source.ids if number(id) == 7))
    layouts.change_byte(root, images[7])
    source = pickle.loads(pickle.dumps(source))  # as a worker has it, which has read nothing yet
    with pytest.raises(SourceError, match="changed since it was fingerprinted"):
        source.image(victim)
    source.image((victim + 1) % 10)
    changed = Source(root)
    assert changed.fingerprint != fingerprint and changed.ids_digest == source.ids_digest


def test_every_layout_has_splits_to_choose_from(written):
    layout, root, _ = written
    layouts.write(layout, root, "val", count=6, seed=100)
    with pytest.raises(SourceError, match=r"several splits \(train, val\)"):
        Source(root)
    with pytest.raises(SourceError, match="did you mean 'val'"):
        Source(root, split="vall")
    val = Source(root, split="val")
    assert (len(val), val.split) == (6, "val")
    assert np.array_equal(val.image(0), layouts.pixels(100 + number(val.ids[0])))


def test_every_layout_takes_a_sample_by_key(written):
    _, root, _ = written
    whole, some, fewer = (Source(root, limit=limit) for limit in (None, 6, 3))
    assert len(some) == 6 and set(fewer.ids) < set(some.ids) < set(whole.ids)
    assert np.array_equal(fewer.image(1), whole.image(whole.index(fewer.ids[1])))
    assert fewer.label(fewer.ids[1]) == whole.label(fewer.ids[1])


def digests(source: Source) -> list[str]:
    return [hashlib.sha256(source.image(i).tobytes()).hexdigest() for i in range(len(source))]


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_every_layout_goes_to_another_process(written, start: str):
    _, root, _ = written
    source = Source(root)
    here = digests(source)  # so that whatever is kept open is open
    assert len(pickle.dumps(source)) < 20_000
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply_async(digests, (source,)).get(60) == here


def test_a_source_opened_before_a_fork_is_read_after_it(written):
    """By a child that inherits it, as a ``DataLoader`` hands it on."""
    _, root, _ = written
    source = Source(root)
    here = digests(source)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if digests(source) == here else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert digests(source) == here


def test_every_layout_is_read_by_threads(written):
    _, root, _ = written
    expected = digests(Source(root))
    source = Source(root)  # read for the first time by all of them at once
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(digests, [source] * 8))


def test_every_layout_says_what_it_does_not_find(tmp_path: Path, written):
    layout, *_ = written
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError):
        Source(tmp_path / "empty", layout=layout)
    (tmp_path / "file").write_bytes(b"nothing")
    with pytest.raises(SourceError):
        Source(tmp_path / "file", layout=layout)


def test_two_layouts_in_one_folder_are_no_guess(written):
    layout, root, _ = written
    other = "webdataset" if layout == "parquet" else "parquet"
    layouts.write(other, root)
    with pytest.raises(SourceError, match=rf"may be read as.*{layout}.*layout="):
        Source(root)
    assert len(Source(root, layout=layout)) == 10


# --- whatever the layout ------------------------------------------------------------------------


def test_what_is_missing_or_not_recognised(tmp_path: Path):
    with pytest.raises(SourceError, match=r"there is no .*nowhere"):
        Source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="nothing in it"):
        Source(tmp_path)
    for i in range(9):
        (tmp_path / f"{i}.csv").touch()
    with pytest.raises(SourceError, match=r"\.parquet.*class folders.*0.csv, 1.csv.*…"):
        Source(tmp_path)
    with pytest.raises(SourceError, match="there is a file"):
        Source(tmp_path / "0.csv")
    with pytest.raises(SourceError, match="no images in the list"):
        Source([])
    with pytest.raises(SourceError, match="no Parquet files"):
        Source(tmp_path, layout="parquet")


def test_options_that_do_not_fit(folder: Path):
    with pytest.raises(SourceError, match="did you mean 'imagefolder'"):
        Source(folder, layout="imagefolde")
    with pytest.raises(SourceError, match="has no columns"):
        Source(folder, image_column="x")
    with pytest.raises(SourceError, match="Python object"):
        Source(folder, layout="dataset")
    with pytest.raises(SourceError, match="from a path"):
        Source([pixels(1)], layout="parquet")
    with pytest.raises(SourceError, match="one split already"):
        Source([pixels(1)], split="train")
    for limit in (0, -3):
        with pytest.raises(SourceError, match="at least 1"):
            Source(folder, limit=limit)
    assert len(Source(folder, limit=100)) == 8


def test_layout_overrides_what_is_recognised(folder: Path):
    (folder / "train.parquet").write_bytes(b"not one")
    assert Source(folder, layout="imagefolder").layout == "imagefolder"


def test_decoders_are_named():
    assert set(Source([pixels(1)]).decoder()) == {"simplejpeg", "pillow"}


def test_importing_is_cheap():
    code = (
        "import sys, softcache.source, softcache.recipe; "
        "print({'torch', 'PIL', 'simplejpeg', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_sixteen_bit_greys_keep_their_high_byte(tmp_path: Path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    values = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a" / "grey.png")
    assert Source(tmp_path).image(0)[:, :, 0].tolist() == [[0, 0, 1], [0x12, 0xFF, 0xFF]]


def test_samples_are_asked_for_by_number():
    source = Source([np.zeros((4, 5, 3), np.uint8)] * 3)
    assert source.image(-1).shape == source.image(np.int64(2)).shape == (4, 5, 3)
    with pytest.raises(SpecError, match=r"asked for by number, 0 to 2, not '1': source\.index"):
        source.image("1")
    with pytest.raises(IndexError, match="sample 3 of 3"):
        source.image(3)
    with pytest.raises(SourceError, match=r"no sample 1 in the source .*; ids are strings"):
        source.index(1)
