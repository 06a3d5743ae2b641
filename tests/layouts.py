"""The same few images in every layout, written by the libraries that people write them with."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("cat", "dog")


def pixels(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def label(i: int, count: int) -> int:
    """The first half are cats."""
    return 2 * i // count


def write_parquet(root: Path, split: str, images: Sequence[bytes]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    n = len(images)
    rows = [{"bytes": data, "path": f"{i:03}.png"} for i, data in enumerate(images)]
    table = pa.table({"image": rows, "label": [label(i, n) for i in range(n)]})
    info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": CLASSES}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, root / f"{split}.parquet", row_group_size=4, compression="none")


def write_arrow(root: Path, split: str, images: Sequence[bytes]) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    n = len(images)
    columns = {
        "image": [{"bytes": data, "path": f"{i:03}.png"} for i, data in enumerate(images)],
        "label": [label(i, n) for i in range(n)],
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root / split, num_shards=2)
    splits = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    (root / "dataset_dict.json").write_text(json.dumps({"splits": splits}))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_webdataset(root: Path, split: str, images: Sequence[bytes]) -> None:
    n = len(images)
    for shard in range(2):
        rows = range(shard * n // 2, (shard + 1) * n // 2)
        pairs = [((f"{i:03}.png", images[i]), (f"{i:03}.cls", str(label(i, n)).encode())) for i in rows]
        write_tar(root / f"{split}-{shard:06}.tar", [member for pair in pairs for member in pair])
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def write_imagefolder(root: Path, split: str, images: Sequence[bytes]) -> None:
    for i, data in enumerate(images):
        file = root / split / CLASSES[label(i, len(images))] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def write_folder(root: Path, split: str, images: Sequence[bytes]) -> None:
    for i, data in enumerate(images):
        file = root / split / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def box(i: int) -> tuple[float, float, float, float]:
    """Of image ``i``: left, top, width, height."""
    return 2.0 + i % 8, 1.5, 10.25, 12.0 + i % 5


def write_coco(root: Path, split: str, images: Sequence[bytes]) -> None:
    """One box an image; category ids have holes, and are not in order."""
    names = [f"{i:03}.png" for i in range(len(images))]
    for name, data in zip(names, images, strict=True):
        file = root / "images" / split / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    said = {
        "images": [{"id": 100 + i, "file_name": n, "width": 24, "height": 20} for i, n in enumerate(names)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 100 + i, "category_id": (3, 7)[label(i, len(images))], "bbox": box(i)}
            for i in range(len(images))
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(said))


def write_yolo(root: Path, split: str, images: Sequence[bytes]) -> None:
    for i, data in enumerate(images):
        left, top, width, height = box(i)
        line = f"{label(i, len(images))} {(left + width / 2) / 24} {(top + height / 2) / 20} {width / 24} {height / 20}"
        for kind, name, content in (
            ("images", f"{i:03}.png", data),
            ("labels", f"{i:03}.txt", line.encode()),
        ):
            file = root / kind / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    splits = sorted(folder.name for folder in (root / "images").iterdir())
    lines = [f"names: [{', '.join(CLASSES)}]", *(f"{name}: images/{name}" for name in splits)]
    (root / "data.yaml").write_text("\n".join(lines) + "\n")


WRITERS: dict[str, Callable[[Path, str, Sequence[bytes]], None]] = {
    "parquet": write_parquet,
    "arrow": write_arrow,
    "webdataset": write_webdataset,
    "coco": write_coco,
    "yolo": write_yolo,
    "imagefolder": write_imagefolder,
    "folder": write_folder,
}
UNLABELLED = {"coco", "yolo", "folder"}


def write(layout: str, root: Path, split: str = "train", count: int = 10, seed: int = 0) -> list[bytes]:
    """``count`` PNG files as the split of a dataset; their bytes, image ``i`` being ``pixels(seed + i)``."""
    images = [png(pixels(seed + i)) for i in range(count)]
    root.mkdir(parents=True, exist_ok=True)
    WRITERS[layout](root, split, images)
    return images


def change_byte(root: Path, content: bytes) -> None:
    """Flip a bit in the middle of ``content``, in whatever file below ``root`` it lies."""
    for file in sorted(root.rglob("*")):
        data = file.read_bytes() if file.is_file() else b""
        if (at := data.find(content)) >= 0:
            with file.open("r+b") as there:  # in place: whoever has it open or mapped sees the change
                there.seek(at + len(content) // 2)
                there.write(bytes([content[len(content) // 2] ^ 1]))
            return
    raise AssertionError("no file holds these bytes")
