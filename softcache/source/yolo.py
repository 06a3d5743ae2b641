"""YOLO: an Ultralytics ``data.yaml`` that names folders (or lists) of images, whose boxes are text files beside them.

A path in it is sought below its ``path:``, which is itself sought from the YAML file's folder, and then below that folder.
Ids are paths from there. The boxes of ``…/images/a/1.jpg`` are in ``…/labels/a/1.txt`` (where no folder is called
``images``, beside the image), one a line: ``class cx cy w h`` in shares of the image's sides, or ``class x y x y x y …``,
an outline, whose enclosing box is taken. They are shares of the image as it is shown: those of a file that an EXIF
orientation turns are turned back to the pixels that are stored, as whoever drew and trained on them saw it turned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import SourceError, counted
from softcache.source.boxes import Annotated, Boxes, by_image, flat, image_size, shown, told
from softcache.source.decode import is_jpeg, orientation
from softcache.source.files import images_in, refuse_columns
from softcache.source.layout import choose_split

LOOK = "a data.yaml with names and train, val or test"

_SPLITS = ("train", "val", "test")
_MOST = 1 << 20  # bytes of a YAML file that is looked into
_HEADERS = 1 << 18  # bytes of a JPEG file, its EXIF among them
_FAR = 2.0  # further out no share lies, but pixels do
_OFF = 0.1  # and of an outline, which is not drawn beyond the image
# EXIF orientation: are x and y swapped, and is the stored x, or y, counted from the other side?
_TURNS = {2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


@dataclass(frozen=True)
class Yolo(Annotated):
    """An opened split, its boxes in shares of the sides until they are asked for."""

    def boxes(self, row: int) -> Boxes:
        """Reads the image's header, and raises what Pillow does."""
        found, file = super().boxes(row), self.root / self.ids[row]
        if not len(found):
            return found
        with file.open("rb") as content:
            begins = content.read(_HEADERS)
            whole = begins if is_jpeg(begins) else begins + content.read()  # other files' EXIF may come last
        shares = _turned_back(found.xyxy, orientation(whole))
        return replace(found, xyxy=shares * np.tile(image_size(file), 2))


def _turned_back(xyxy: np.ndarray, turn: int) -> np.ndarray:
    """Shares of the image that is shown → of the one that is stored."""
    if turn not in _TURNS:
        return xyxy
    swap, *other_side = _TURNS[turn]
    if swap:
        xyxy = xyxy[:, [1, 0, 3, 2]]
    low, high = xyxy[:, :2], xyxy[:, 2:]
    return np.hstack([np.where(other_side, 1 - high, low), np.where(other_side, 1 - low, high)])


def recognise(path: Path) -> bool:
    """Is it a YAML file, or a folder with one that names classes and a split?"""
    return path.suffix in (".yaml", ".yml") if path.is_file() else bool(_files(path))


def open_split(path: Path, split: str | None, image_column: str | None, label_column: str | None) -> Yolo:
    """Raises :class:`SourceError` for a split or images that are not there, and for what is wrong in the YAML file or in
    a file of labels."""
    refuse_columns(path, image_column, label_column)
    file = path if path.is_file() else _only(path, _files(path))
    said = _parse(file)
    classes = _classes(file, said)
    split = _split(file, said, split)
    bases = _bases(file, said)
    images = _images(file, said[split], bases)
    root = next((b for b in bases if all(i.is_relative_to(b) for i in images)), None) or _common(images)
    every, starts, notes = _labels(images, len(classes), "kpt_shape" in said)
    if root != bases[0]:
        notes = (*notes, f"they are not below {bases[0]}, but in {root}")
    ids = [image.relative_to(root).as_posix() for image in images]
    return Yolo(root, split, ids, np.full(len(ids), -1, np.int64), classes, notes, every, starts)


def _files(path: Path) -> list[Path]:
    """The YAML files in a folder that describe a dataset."""

    def describes(file: Path) -> bool:
        if not file.is_file() or file.stat().st_size > _MOST:
            return False
        try:
            return {"names"} <= (said := _parse(file)).keys() and any(s in said for s in _SPLITS)
        except SourceError:
            return False

    return [file for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if describes(file)]


def _only(path: Path, files: list[Path]) -> Path:
    if len(files) == 1:
        return files[0]
    found = f"it has {', '.join(f.name for f in files)}: give the path of one" if files else "it has none"
    raise SourceError(f"{path} is a folder, in which {LOOK} is looked for, and {found}")


def _parse(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        said = yaml.safe_load(file.read_bytes())
    except OSError as e:
        raise SourceError(f"cannot read {file}: {e.strerror}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise SourceError(f"{file} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(said, dict):
        raise SourceError(f"{file} is no data.yaml: it has no lines like 'train: images/train'")
    return said


def _classes(file: Path, said: dict[Any, Any]) -> tuple[str, ...]:
    names = said.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise SourceError(f"{file} names no classes; it must have a list, as in 'names: [cat, dog]'")
    if missing := [i for i in range(len(names)) if i not in names]:
        raise SourceError(
            f"{file} has {len(names)} names, and none for class {missing[0]}: number them from 0, without holes"
        )
    for i in range(len(names)):
        if not isinstance(names[i], str | int) or isinstance(names[i], bool):
            raise SourceError(f"{file}: the name of class {i} reads as {shown(names[i])}; put it in quotes")
    classes = tuple(str(names[i]) for i in range(len(names)))
    if twice := [name for i, name in enumerate(classes) if name in classes[:i]]:
        raise SourceError(f"{file} has two classes called {twice[0]!r}; rename one of them")
    if said.get("nc", len(classes)) != len(classes):
        raise SourceError(f"{file} has nc: {shown(said['nc'])} and {len(classes)} names; correct one of them")
    return classes


def _split(file: Path, said: dict[Any, Any], wanted: str | None) -> str:
    there = [s for s in _SPLITS if said.get(s)]
    if not there:
        raise SourceError(f"{file} has none of {', '.join(_SPLITS)}; it must say where images are")
    return choose_split(wanted, there, file)


def _bases(file: Path, said: dict[Any, Any]) -> list[Path]:
    """Where its paths may start, absolute."""
    here, path = _joined(Path.cwd(), str(file)).parent, said.get("path") or "."
    if not isinstance(path, str):
        raise SourceError(f"{file}: 'path' is {shown(path)}, and must be a folder")
    return list(dict.fromkeys([_joined(here, path), here]))


def _joined(base: Path, path: str) -> Path:
    """Without ``..``: lexically, so that a link to a folder is not followed."""
    return Path(os.path.normpath(base / path))


def _images(file: Path, value: Any, bases: list[Path]) -> list[Path]:
    """Of a split that is a folder, a text file of paths, or a list of such; sorted in a folder, else as listed."""
    found: list[Path] = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, str):
            raise SourceError(
                f"{file} names {shown(entry)} where a folder of images, or a list of them, should be"
            )
        starts = [entry, entry[3:]] if entry.startswith("../") else [entry]  # as Roboflow's are to be read
        place = _first(str(file), entry, [_joined(base, start) for start in starts for base in bases])
        found += _listed(place, bases) if place.is_file() else [place / i for i in images_in(place, place)[0]]
    if not found:
        raise SourceError(f"{file}: there are no images in {shown(value)}")
    return found


def _listed(file: Path, bases: list[Path]) -> Iterator[Path]:
    """The images that a text file names, one a line."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        if path := line.strip():
            yield _first(f"{file}:{number}", path, [_joined(base, path) for base in (file.parent, *bases)])


def _first(where: str, path: str, places: list[Path]) -> Path:
    for place in places:
        if os.path.exists(place):  # noqa: PTH110 - false of what can be no path, where pathlib raises
            return place
    tried = ", ".join(dict.fromkeys(map(str, places)))
    raise SourceError(
        f"{where} names {shown(path)}, which is not there; looked for {tried}: correct it, or the line 'path:'"
    )


def _common(images: list[Path]) -> Path:
    """The deepest folder that all lie in, from where their ids begin."""
    root = Path(os.path.commonpath([image.parent for image in images]))
    if root in Path.home().parents:
        raise SourceError(
            f"the images lie in {images[0].parent} and elsewhere, and have only {root} in common: their ids would tell "
            "where your folders are. Put them, or links to their folders, below one folder"
        )
    return root


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise SourceError(f"cannot read {file}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise SourceError(f"{file} is no text file: {e}") from e


def _label_file(image: Path) -> Path:
    before, images, after = str(image).rpartition("/images/")
    return Path(f"{before}/labels/{after}" if images else image).with_suffix(".txt")


def _labels(images: list[Path], classes: int, pose: bool) -> tuple[Boxes, np.ndarray, tuple[str, ...]]:
    """All boxes in shares, where each image's start, and what a person should know. Of files of keypoints (``pose``)
    the boxes in front of them."""
    files = [_label_file(image) for image in images]
    there = [file.is_file() for file in files]
    if not any(there):
        raise SourceError(
            f"none of the {len(images):,} images has a file of labels: {images[0]} would have {files[0]}. For images "
            "without boxes give their folder"
        )
    lines = [
        (row, *line) for row, file in enumerate(files) if there[row] for line in _lines(file, classes, pose)
    ]
    owner, label, xyxy, outline = zip(*lines, strict=True) if lines else ((), (), (), ())
    corners = np.array(xyxy, np.float64).reshape(-1, 4)
    every = Boxes(corners, np.array(label, np.int64), np.zeros(len(corners), bool), flat(corners))
    every, starts = by_image(owner, len(images), every)
    notes = [told(every, starts)]
    if outlines := sum(outline):
        notes.append(f"{outlines:,} of them enclose outlines")
    if bare := there.count(False):
        notes.append(f"{counted(bare, 'image')} without a file of labels, taken to show nothing")
    return every, starts, tuple(notes)


def _lines(file: Path, classes: int, pose: bool) -> Iterator[tuple[int, list[float], bool]]:
    """Of each line the class, the corners in shares, and whether they enclose an outline."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        if words := line.split():
            try:
                yield _line(words, classes, pose)
            except ValueError as e:
                raise SourceError(f"{file}:{number}: {e}; correct the line, or take it out") from None


def _line(words: list[str], classes: int, pose: bool) -> tuple[int, list[float], bool]:
    which, *numbers = (float(word) for word in words)
    if which not in range(classes):
        raise ValueError(f"the class is {words[0]}, and there are {classes} of them, counted from 0")
    if not all(abs(v) <= _FAR for v in numbers):
        raise ValueError("it has numbers that are no shares of the sides (pixels, or not finite)")
    if len(numbers) == 4 or (pose and len(numbers) > 4):
        x, y, w, h = numbers[0], numbers[1], max(numbers[2], 0), max(numbers[3], 0)
        return int(which), [x - w / 2, y - h / 2, x + w / 2, y + h / 2], False
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(
            f"it has {len(words)} numbers: neither 'class cx cy w h' nor an outline of three points or more"
        )
    if not all(-_OFF <= v <= 1 + _OFF for v in numbers):
        raise ValueError(
            "it has an outline with points outside of the image; of keypoints, the data.yaml must say so with kpt_shape"
        )
    across, down = numbers[::2], numbers[1::2]
    return int(which), [min(across), min(down), max(across), max(down)], True
