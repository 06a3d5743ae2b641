"""COCO: a JSON file of instances for each split, and images beside it.

* ``dir/annotations/instances_{split}.json``, images in ``dir/images/{split}``, ``dir/{split}``, ``dir/images`` or ``dir``;
* ``dir/{split}/_annotations.coco.json`` among its images, as Roboflow writes it;
* such a file itself.

Ids are the images' ``file_name``, sorted. Labels count categories from 0, by ascending category id. What the file says
is checked when it is opened: a box that nothing can be made of stops here, with its annotation's id.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from softcache.errors import SourceError
from softcache.source.boxes import Annotated, Boxes, by_image, flat, image_size, shown, told
from softcache.source.files import refuse_columns
from softcache.source.layout import choose_split

LOOK = "annotations/instances_*.json or _annotations.coco.json"
ROBOFLOW = "_annotations.coco.json"

_LISTS = ("images", "annotations", "categories")
_NUMBERS = ("id", "width", "height", "image_id", "category_id", "bbox", "iscrowd", "ignore")
_KEPT = frozenset((*_LISTS, *_NUMBERS, "file_name", "name"))


@dataclass(frozen=True)
class Coco(Annotated):
    """An opened split; ``sizes``: int64 ``(N, 2)``, width and height as its JSON file says, 0 where it does not."""

    sizes: np.ndarray

    def boxes(self, row: int) -> Boxes:
        """Raises :class:`SourceError` for an image of another size than its boxes were drawn on."""
        found, said = super().boxes(row), tuple(self.sizes[row].tolist())
        if len(found) and all(said) and (there := image_size(self.root / self.ids[row])) != said:
            raise SourceError(
                f"{self.where(row)} has {there[0]} × {there[1]} pixels, and its boxes were drawn on {said[0]} × {said[1]}: "
                "was it resized, or is it shown turned by an EXIF orientation, which is not applied? Take the original "
                "images, or turn their pixels, or correct the width and height in the JSON file"
            )
        return found


def recognise(path: Path) -> bool:
    """Is it a JSON file, or a folder with one by COCO's or Roboflow's name?"""
    return path.suffix == ".json" if path.is_file() else bool(_files(path))


def open_split(path: Path, split: str | None, image_column: str | None, label_column: str | None) -> Coco:
    """Raises :class:`SourceError` for a split, a file or images that are not there, and for what is wrong in the file."""
    refuse_columns(path, image_column, label_column)
    file, split = _choose(path, split)
    lists = {key: _entries(file, key, value) for key, value in _parse(file).items()}
    rows, names, sizes = _images(file, lists["images"])
    labels, classes = _categories(file, lists["categories"])
    owner, every = _boxes(file, lists["annotations"], rows, labels)
    every, starts = by_image(owner, len(names), every)
    notes = (told(every, starts), *_holes(labels))
    root = _root(file, split, names)
    return Coco(root, split, names, np.full(len(names), -1, np.int64), classes, notes, every, starts, sizes)


def _files(path: Path) -> dict[str, Path]:
    """The splits of a folder; one without a name is called ""."""
    if (path / ROBOFLOW).is_file():
        return {"": path / ROBOFLOW}
    official = {f.stem.removeprefix("instances_"): f for f in path.glob("annotations/instances_?*.json")}
    return official or {f.parent.name: f for f in path.glob(f"*/{ROBOFLOW}")}


def _choose(path: Path, wanted: str | None) -> tuple[Path, str | None]:
    if path.is_file():
        name = re.fullmatch(r"instances_(.+)", path.stem)
        files = {name[1] if name else "": path}
    else:
        files = _files(path)
    if not files:
        raise SourceError(f"{path} has no {LOOK}; give the folder that holds it, or the JSON file itself")
    if set(files) == {""}:
        if wanted is not None:
            raise SourceError(f"{files['']} is one split already; leave split={wanted!r} out")
        return files[""], None
    split = choose_split(wanted, files, path)
    return files[split], split


def _parse(file: Path) -> dict[str, Any]:
    def slim(entry: dict[str, Any]) -> dict[str, Any]:  # outlines are most of a file, and most of the memory
        return {key: value for key, value in entry.items() if key in _KEPT}

    try:
        found = json.loads(file.read_bytes(), object_hook=slim)
    except OSError as e:
        raise SourceError(f"cannot read {file}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{file} is not JSON: {' '.join(str(e).split())}; copy it again") from e
    missing = [key for key in _LISTS if not (isinstance(found, dict) and key in found)]
    if missing:
        raise SourceError(
            f"{file} has no {missing[0]!r}: it is no COCO file of instances. For images without boxes give their folder"
        )
    return {key: found[key] for key in _LISTS}


def _entries(file: Path, key: str, found: Any) -> list[dict[str, Any]]:
    if not (isinstance(found, list) and all(isinstance(entry, dict) for entry in found)):
        raise SourceError(f"{file}: {key!r} is not a list of objects, as COCO has it")
    return found


def _images(file: Path, entries: list[dict[str, Any]]) -> tuple[dict[int | str, int], list[str], np.ndarray]:
    """The row of each image id; names and stated sizes, by row."""
    named = {}
    for id, entry in _by_id(file, "image", entries, int | str):
        name = _file_name(file, id, entry.get("file_name"))
        if name in named:
            raise SourceError(
                f"{file}: the images {shown(named[name][0])} and {shown(id)} are both {shown(name)}; keep one of them"
            )
        named[name] = id, _size(entry)
    names = sorted(named)
    sizes = np.array([named[name][1] for name in names], np.int64).reshape(-1, 2)
    return {named[name][0]: row for row, name in enumerate(names)}, names, sizes


def _file_name(file: Path, id: int | str, name: Any) -> str:
    """As a POSIX path; those written by Windows too."""
    path = PurePosixPath(name.replace("\\", "/") if isinstance(name, str) else "")
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise SourceError(
            f"{file}: the image {shown(id)} has the file_name {shown(name)}, which is no path below the folder of the images"
        )
    return str(path)


def _size(entry: dict[str, Any]) -> tuple[int, int]:
    size: tuple[Any, Any] = entry.get("width"), entry.get("height")
    return size if all(isinstance(v, int) and 0 < v < 1 << 31 for v in size) else (0, 0)


def _categories(file: Path, entries: list[dict[str, Any]]) -> tuple[dict[int, int], tuple[str, ...]]:
    """The label of each category id, and the class names."""
    names: dict[int, str] = {}
    for id, entry in _by_id(file, "category", entries, int):
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            raise SourceError(f"{file}: the category {id} has the name {shown(name)}; give it one of letters")
        if name in names.values():
            raise SourceError(
                f"{file}: the category {id} is called {shown(name)}, and so is another; rename one of them"
            )
        names[id] = name
    ids = sorted(names)
    return {id: label for label, id in enumerate(ids)}, tuple(names[id] for id in ids)


def _holes(labels: dict[int, int]) -> tuple[str, ...]:
    if all(id == label for id, label in labels.items()):
        return ()
    return (f"category ids {min(labels)} to {max(labels)} are labels 0 to {len(labels) - 1}, in their order",)


def _by_id(
    file: Path, kind: str, entries: list[dict[str, Any]], type: Any
) -> Iterator[tuple[Any, dict[str, Any]]]:
    seen = set()
    for i, entry in enumerate(entries):
        id = entry.get("id")
        if not isinstance(id, type) or isinstance(id, bool):
            raise SourceError(f"{file}: {kind} number {i} has the id {shown(id)}; ids are whole numbers")
        if id in seen:
            raise SourceError(
                f"{file}: there are two entries with the {kind} id {shown(id)}; keep one, or renumber"
            )
        seen.add(id)
        yield id, entry


def _boxes(
    file: Path, entries: list[dict[str, Any]], rows: dict[int | str, int], labels: dict[int, int]
) -> tuple[list[int], Boxes]:
    """Each annotation's row, and its box."""

    def known(entry: dict[str, Any], i: int, kind: str, table: dict[Any, int]) -> int:
        id = entry.get(kind)
        if not isinstance(id, int | str) or id not in table:
            other = next((there for there in table if str(there) == str(id)), None)
            but = "" if other is None else f" but for {shown(other)}: write both as numbers"
            raise SourceError(
                f"{file}: {_annotation(entry, i)} has the {kind} {shown(id)}, which the file does not have{but}"
            )
        return table[id]

    owner = [known(entry, i, "image_id", rows) for i, entry in enumerate(entries)]
    label = [known(entry, i, "category_id", labels) for i, entry in enumerate(entries)]
    corners = [_corners(file, entry, i) for i, entry in enumerate(entries)]
    xyxy = np.array(corners, np.float64).reshape(-1, 4)
    crowd, ignore = (
        np.array([_flag(file, entry, i, key) for i, entry in enumerate(entries)], bool)
        for key in ("iscrowd", "ignore")
    )
    return owner, Boxes(xyxy, np.array(label, np.int64), crowd, ignore | flat(xyxy))


def _flag(file: Path, entry: dict[str, Any], i: int, key: str) -> bool:
    said = entry.get(key)
    if said is not None and (not isinstance(said, int) or said not in (0, 1)):
        raise SourceError(f"{file}: {_annotation(entry, i)} has the {key} {shown(said)}; it must be 0 or 1")
    return bool(said)


def _annotation(entry: dict[str, Any], i: int) -> str:
    return f"the annotation {shown(entry['id'])}" if "id" in entry else f"annotation number {i}"


def _corners(file: Path, entry: dict[str, Any], i: int) -> tuple[float, float, float, float]:
    """Of ``[left, top, width, height]``; a size below 0 is taken for 0."""
    try:
        x, y, w, h = (float(v) for v in entry["bbox"] if type(v) in (int, float))
        corners = x, y, x + max(w, 0.0), y + max(h, 0.0)
        if math.isfinite(w + h + sum(corners)):
            return corners
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise SourceError(
        f"{file}: {_annotation(entry, i)} has the bbox {shown(entry.get('bbox'))}; it must be four finite numbers, "
        "[left, top, width, height]: correct it, or take the annotation out"
    )


def _root(file: Path, split: str | None, names: list[str]) -> Path:
    """The folder that the names are paths in. Raises :class:`SourceError` where one has no file."""
    above = [file.parent.parent] if file.parent.name == "annotations" else []
    parts = ([f"images/{split}", split] if split else []) + ["images", ""]
    places = [base / part for base in [*above, file.parent] for part in parts]
    missing, root = min(
        ((_missing(place, names), place) for place in places), key=lambda found: len(found[0])
    )
    if missing:
        raise SourceError(
            f"{len(missing):,} of the {len(names):,} images in {file} are not there, such as {missing[0]!r}; looked in "
            f"{', '.join(map(str, places))}: put them into one of these, or take them out of the file"
        )
    return root


def _missing(place: Path, names: list[str]) -> list[str]:
    """Every folder is listed once: asking for each of many files takes longer."""

    @cache
    def inside(folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(place / folder))  # noqa: PTH208 - many names, and no paths
        except (OSError, UnicodeEncodeError):
            return frozenset()

    split = (name.rpartition("/") for name in names)
    return [folder + bar + name for folder, bar, name in split if name not in inside(folder)]
