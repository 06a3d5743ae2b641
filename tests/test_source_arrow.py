"""Datasets saved by the ``datasets`` library, row for row as that library reads them."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import pixels, png
from PIL import Image

from softcache.errors import SourceError, UnreadableImage
from softcache.source import Source, find_unreadable

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

NAMES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()


def dataset(count: int = 20, paths: list[str | None] | None = None, **more: list) -> Any:
    """Images of several sizes, in two formats, with labels."""
    rows = []
    for i in range(count):
        data = io.BytesIO()
        Image.fromarray(pixels(i, 10 + i, 12)).save(data, "PNG" if i % 2 else "BMP")
        rows.append({"bytes": data.getvalue(), "path": paths[i] if paths else None})
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    columns = {"img": rows, "label": [i % 3 for i in range(count)]} | more
    features |= {name: datasets.Value("int64") for name in more}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def agrees(source: Source, theirs: Any) -> None:
    """Every row is that of the library."""
    assert len(source) == len(theirs)
    assert source.classes == tuple(theirs.features["label"].names)
    assert source.labels.tolist() == [-1 if label is None else label for label in theirs["label"]]
    for i, row in enumerate(theirs):
        assert np.array_equal(source.image(i), np.asarray(row["img"].convert("RGB")))


@pytest.mark.parametrize("shards", [1, 3, 20])
def test_every_row_is_that_of_the_library(tmp_path: Path, shards: int):
    dataset().save_to_disk(tmp_path / "d", num_shards=shards)
    source = Source(tmp_path / "d")
    assert (source.layout, source.split) == ("arrow", None)
    agrees(source, datasets.load_from_disk(tmp_path / "d"))
    assert source.ids == tuple(map(str, range(20)))  # whatever the number of shards


def rewrite(folder: Path, change: Any = lambda table: table) -> None:
    """The one Arrow file of a saved dataset, with another table, four rows a batch."""
    (file,) = folder.glob("*.arrow")
    table = change(pa.ipc.open_stream(file.read_bytes()).read_all())
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def test_many_batches_of_rows(tmp_path: Path):
    dataset().save_to_disk(tmp_path / "d")
    rewrite(tmp_path / "d")
    assert len(list(pa.ipc.open_stream((tmp_path / "d" / "data-00000-of-00001.arrow").read_bytes()))) == 5
    agrees(Source(tmp_path / "d"), datasets.load_from_disk(tmp_path / "d"))


def test_what_was_shuffled_and_selected_is_saved_in_its_new_order(tmp_path: Path):
    chosen = (
        dataset().shuffle(seed=3).select(range(2, 17)).filter(lambda label: label != 1, input_columns="label")
    )
    assert chosen._indices is not None
    chosen.save_to_disk(tmp_path / "d", num_shards=2)
    agrees(Source(tmp_path / "d"), chosen)


def test_splits_and_names_of_files(tmp_path: Path):
    train, test = dataset(8, [f"{i}.png" for i in range(8)]), dataset(4, ["x.png"] * 4)
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "d")
    with pytest.raises(SourceError, match="test, train"):
        Source(tmp_path / "d")
    source = Source(tmp_path / "d", split="train")
    assert source.split == "train" and source.ids[3] == "3.png"
    agrees(source, train)
    source = Source(tmp_path / "d", split="test")
    assert source.ids == ("0", "1", "2", "3")  # names that are there twice are no ids
    assert Source(tmp_path / "d" / "test").fingerprint == source.fingerprint
    with pytest.raises(SourceError, match="one split already"):
        Source(tmp_path / "d" / "test", split="test")


def test_images_that_were_files_come_along(tmp_path: Path):
    """``save_to_disk`` puts the bytes in."""
    files = []
    for i in range(3):
        files.append(str(tmp_path / f"{i}.png"))
        Path(files[-1]).write_bytes(png(pixels(i)))
    data = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "d")
    for file in files:
        Path(file).unlink()
    source = Source(tmp_path / "d")
    assert source.ids == ("0.png", "1.png", "2.png") and source.classes is None
    assert all(np.array_equal(source.image(i), pixels(i)) for i in range(3))


def test_a_row_without_bytes_is_named(tmp_path: Path):
    dataset(4).save_to_disk(tmp_path / "d")

    def change(table: Any) -> Any:
        rows = table.column("img").to_pylist()
        rows[1] = {"bytes": None, "path": "elsewhere.png"}
        rows[2] = None
        return table.set_column(0, "img", pa.array(rows, table.schema.field("img").type))

    rewrite(tmp_path / "d", change)
    source = Source(tmp_path / "d")
    assert find_unreadable(source) == ["1", "2"]
    with pytest.raises(UnreadableImage, match=r"'1' \(.*data-00000-of-00001.arrow, row 1\).*no bytes"):
        source.image(1)


@pytest.mark.parametrize("kind", ["uint8", "uint64", "string"])
def test_labels_of_any_kind(tmp_path: Path, kind: str):
    images = dataset(3).remove_columns("label")
    labels = ["cat", "dog", "cat"] if kind == "string" else [2, None, 1]
    images.add_column("label", labels, feature=datasets.Value(kind)).save_to_disk(tmp_path / "d")
    source = Source(tmp_path / "d")
    assert source.labels.tolist() == ([-1] * 3 if kind == "string" else [2, -1, 1])
    assert ("no labels: the column label (string)" in source.describe()) == (kind == "string")


def test_labels_that_are_null_are_unknown(tmp_path: Path):
    data = dataset(4, more=[1, None, 0, 7])
    data.save_to_disk(tmp_path / "d")
    assert Source(tmp_path / "d", label_column="more").labels.tolist() == [1, -1, 0, 7]
    with pytest.raises(SourceError, match="did you mean 'more'"):
        Source(tmp_path / "d", label_column="mor")


def test_where_says_file_and_row(tmp_path: Path):
    dataset(9).save_to_disk(tmp_path / "d", num_shards=3)
    source = Source(tmp_path / "d")
    assert [source._where(i).rsplit("/", 1)[1] for i in (0, 2, 3, 8)] == [
        "data-00000-of-00003.arrow, row 0",
        "data-00000-of-00003.arrow, row 2",
        "data-00001-of-00003.arrow, row 0",
        "data-00002-of-00003.arrow, row 2",
    ]


def test_no_cut_of_an_arrow_file_passes(tmp_path: Path):
    """Not even one between two batches, where Arrow itself sees nothing wrong."""
    dataset().save_to_disk(tmp_path / "d")
    (file,) = (tmp_path / "d").glob("*.arrow")
    rewrite(tmp_path / "d")
    whole = file.read_bytes()
    assert len(Source(tmp_path / "d")) == 20
    assert whole.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    for length in [*range(0, len(whole), 157), *range(len(whole) - 9, len(whole))]:
        file.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"cannot read .*\.arrow"):
            Source(tmp_path / "d")


def test_damaged_offsets_are_refused_before_they_are_followed(tmp_path: Path):
    dataset(4).save_to_disk(tmp_path / "d")
    (file,) = (tmp_path / "d").glob("*.arrow")
    data = bytearray(file.read_bytes())
    sizes = [
        len(row["bytes"]) for row in pa.ipc.open_stream(bytes(data)).read_all().column("img").to_pylist()
    ]
    offsets = np.cumsum([0, *sizes]).astype("<i4").tobytes()
    at = data.find(offsets)
    assert at > 0
    data[at + 8 : at + 12] = (1 << 30).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(SourceError, match="damaged"):
        Source(tmp_path / "d").image(1)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("state.json", b"{", r"cannot read .*state\.json"),
        ("state.json", b"[]", "no list '_data_files'"),
        ("state.json", b'{"_data_files": []}', "an empty dataset"),
        ("state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}', r"cannot read .*gone\.arrow"),
        ("dataset_info.json", b"\xff", r"cannot read .*dataset_info\.json"),
    ],
)
def test_damaged_descriptions_are_named(tmp_path: Path, name: str, content: bytes, told: str):
    dataset(2).save_to_disk(tmp_path / "d")
    (tmp_path / "d" / name).write_bytes(content)
    with pytest.raises(SourceError, match=told):
        Source(tmp_path / "d")


def test_an_order_kept_in_a_file_of_its_own_is_refused(tmp_path: Path):
    dataset(2).save_to_disk(tmp_path / "d")
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    (tmp_path / "d" / "state.json").write_text(json.dumps(state | {"_indices_data_files": ["indices.arrow"]}))
    with pytest.raises(SourceError, match="save it again"):
        Source(tmp_path / "d")


def test_files_of_two_datasets_are_not_mixed(tmp_path: Path):
    dataset(4).save_to_disk(tmp_path / "d", num_shards=2)
    dataset(4, more=[1, 2, 3, 4]).save_to_disk(tmp_path / "e", num_shards=2)
    shutil.copy(tmp_path / "e" / "data-00001-of-00002.arrow", tmp_path / "d")
    with pytest.raises(SourceError, match=r"data-00001-of-00002\.arrow has other columns"):
        Source(tmp_path / "d")


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset(2).save_to_disk(tmp_path / "d")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'softcache\[parquet\]'"):
        Source(tmp_path / "d")


# --- a Dataset object ---------------------------------------------------------------------------


def test_a_dataset_object_is_a_python_dataset_that_names_its_classes(tmp_path: Path):
    data = dataset()
    source = Source(data)
    assert source.layout == "dataset"
    agrees(source, data)
    chosen = data.shuffle(seed=1).select(range(9))
    agrees(Source(chosen), chosen)
    data.save_to_disk(tmp_path / "d")
    assert Source(tmp_path / "d").ids == source.ids
    assert np.array_equal(Source(data, limit=5).image(2), Source(tmp_path / "d", limit=5).image(2))


def test_labels_of_a_dataset_object_are_read_without_decoding():
    data = dataset(4)
    rows = [{"bytes": b"no image", "path": None}] * 4
    broken = datasets.Dataset.from_dict({"img": rows, "label": [0, 1, None, 2]}, features=data.features)
    assert Source(broken).labels.tolist() == [0, 1, -1, 2]
    assert Source(data.with_format("torch", columns=["label"])).labels.tolist() == [0, 1, 2, 0]
    assert Source(dataset(4, kind=[3, 1, 2, 0]), label_column="kind").labels.tolist() == [3, 1, 2, 0]


def test_a_dict_of_datasets_is_not_a_dataset():
    data = datasets.DatasetDict(train=dataset(2), test=dataset(2))
    with pytest.raises(SourceError, match=r"DatasetDict.*\(train, test\): give one"):
        Source(data)
