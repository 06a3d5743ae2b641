"""WebDataset: tars in which files of one name but for the extension, one after another, are one sample.

``0001.jpg``, ``0001.cls``, ``0002.jpg``, …; one tar, a folder of them (``train-000000.tar``, …), or such folders
called ``train``, ``val``, …. The headers are read once, and an image then by its place in the tar. Nothing is
unpacked or unpickled.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np

from softcache.errors import SourceError
from softcache.source.decode import EXTENSIONS
from softcache.source.layout import SPLITS, choose_split

LOOK = "*.tar (not compressed, directly or in a split's folder)"
IMAGES = frozenset(extension[1:] for extension in EXTENSIONS)
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # webdataset's: up to the first dot of the base name
_PACKED = r"\.(tgz|tbz2?|txz|tar\.\w+)"
_COMPRESSED = re.compile(".*" + _PACKED, re.IGNORECASE)
_SHARD = re.compile(rf"(\d+|(?P<split>.+?)([-_.]\d+(-of-\d+)?)?)(\.tar|{_PACKED})", re.IGNORECASE)
_BLOCK = 512


@dataclass(frozen=True)
class WebDataset:
    """Opened tars; ids are webdataset's keys. ``places`` int64 ``(N, 3)``: number of the tar, offset, size."""

    split: str | None
    ids: list[str]
    labels: np.ndarray
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]
    tars: tuple[Path, ...]
    places: np.ndarray

    def read(self, row: int) -> bytes:
        tar, offset, size = self.places[row].tolist()
        file = os.open(self.tars[tar], os.O_RDONLY)  # for each image: no handle is there to break in a fork
        try:
            data = os.pread(file, size, offset)
        finally:
            os.close(file)
        if len(data) < size:
            raise SourceError(f"{self.tars[tar]} was cut since it was opened: copy it again")
        return data

    def where(self, row: int) -> str:
        tar, offset, _ = self.places[row].tolist()
        return f"{self.tars[tar]}, byte {offset:,}"


@dataclass
class _Sample:
    """A key and its members: extension → (offset, size)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def recognise(path: Path) -> bool:
    """Is it a tar, or a folder with some, directly or in a split's folder? (What is compressed is a tar only by
    itself: it may be what a folder was unpacked from.)"""
    if path.is_file():
        return bool(_tars(path))
    tars = [tar for folder in (path, *(path / split for split in SPLITS)) for tar in _tars(folder)]
    return not all(_COMPRESSED.fullmatch(tar.name) for tar in tars)


def open_split(
    path: Path, split: str | None, image_column: str | None, label_column: str | None
) -> WebDataset:
    """Reads the headers of all tars of the split, and the labels. ``image_column`` is the extension of the
    images, where a sample has several. Raises :class:`SourceError` for a split that is not there, a tar that is
    cut or compressed, a sample without an image or with a label that is no number, and a key that is there
    twice."""
    if label_column:
        raise SourceError(f"{path} holds tars, whose labels are in .cls or .json; leave label_column= out")
    split, tars = _choose(path, split)
    extensions = {image_column.lstrip(".").lower()} if image_column else IMAGES
    ids: list[str] = []
    labels: list[int] = []
    places: list[tuple[int, int, int]] = []
    seen: dict[str, Path] = {}
    ignored = 0
    for number, tar in enumerate(tars):
        samples, others = _index(tar)
        ignored += others
        with tar.open("rb") as file:
            for sample in samples:
                if sample.key in seen:
                    raise SourceError(
                        f"the sample {sample.key!r} is in {seen[sample.key]} and again in {tar}; keys must be unique, "
                        "and the files of a sample stand together: take one tar away, or write them anew"
                    )
                seen[sample.key] = tar
                offset, size = _image(sample, extensions, tar)
                ids.append(sample.key)
                places.append((number, offset, size))
                labels.append(_label(sample, file.fileno(), tar))
    notes = (
        [f"{ignored:,} members of the tars that are no plain files (links, devices) ignored"]
        if ignored
        else []
    )
    if missing := _missing(tars):
        notes.append(f"{missing:,} tars are missing between the first and the last number")
    where = np.array(places, np.int64).reshape(-1, 3)
    return WebDataset(
        split, ids, np.array(labels, np.int64), _classes(tars[0].parent, path), tuple(notes), tars, where
    )


def _tars(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.glob("*"))
    return [
        file
        for file in found
        if (file.suffix.lower() == ".tar" or _COMPRESSED.fullmatch(file.name))
        and file.is_file()
        and not file.name.startswith(".")
    ]


def _choose(path: Path, wanted: str | None) -> tuple[str | None, tuple[Path, ...]]:
    splits: dict[str, list[Path]] = defaultdict(list)
    for tar in _tars(path):
        splits[_split_of(tar)].append(tar)
    for name in SPLITS:
        if tars := _tars(path / name):
            splits[name] += tars
    if not splits:
        raise SourceError(f"{path} holds no tars, directly or in a split's folder")
    numbered = splits.get("", [])
    if numbered and (len(splits) > 1 or wanted is not None):
        raise SourceError(
            f"the split of {numbered[0]} is not known, since its name is a number: leave split= out, and keep "
            "the tars of each split in a folder of its own"
        )
    split = None if numbered else choose_split(wanted, splits, path)
    return split, tuple(splits[split or ""])


def _split_of(tar: Path) -> str:
    match = _SHARD.fullmatch(tar.name)
    assert match  # any name of a tar does
    return match["split"] or ""


def _missing(tars: tuple[Path, ...]) -> int:
    numbers = [int(number[0]) for tar in tars if (number := re.search(r"\d+$", tar.stem.split("-of-")[0]))]
    return max(numbers) - min(numbers) + 1 - len(set(numbers)) if len(numbers) == len(tars) else 0


def _index(tar: Path) -> tuple[list[_Sample], int]:
    """The samples of a tar, and how many members are neither files nor folders."""
    others = 0

    def files() -> Iterator[tuple[str, str, tuple[int, int]]]:
        nonlocal others
        for member in _members(tar):
            if member.isreg() and not member.issparse():
                if (name := _KEY.fullmatch(member.name)) and not _is_meta(name[2]):
                    yield name[1], name[2].lower(), (member.offset_data, member.size)
            elif not member.isdir():
                others += 1

    samples: list[_Sample] = []
    for key, members in groupby(files(), lambda file: file[0]):
        sample = _Sample(key)
        for _, extension, place in members:
            if extension in sample.members:
                raise SourceError(f"{tar} has {key}.{extension} twice; keep one, or rename it")
            sample.members[extension] = place
        samples.append(sample)
    return samples, others


def _is_meta(extension: str) -> bool:
    return extension.startswith("__") and extension.endswith("__")


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    if _COMPRESSED.fullmatch(tar.name):
        raise SourceError(
            f"{tar} is compressed, and images are read from anywhere in a tar: unpack it to a plain .tar "
            "(gunzip, unzstd, …; images hardly shrink)"
        )
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                cast(Any, opened).members = []  # tarfile would keep them all
                yield member
            end = opened.offset
        with tar.open("rb") as raw:
            raw.seek(end)
            rest = raw.read(_BLOCK)
    except (tarfile.TarError, EOFError, OSError) as e:
        raise SourceError(
            f"cannot read {tar}: {e}; cut, compressed or not a tar: copy it again, or unpack it to a plain .tar"
        ) from e
    if rest != bytes(_BLOCK):  # tarfile takes damage for the end
        raise SourceError(f"{tar} is cut or damaged at byte {end:,}: copy it again")


def _image(sample: _Sample, extensions: frozenset[str] | set[str], tar: Path) -> tuple[int, int]:
    found = [extension for extension in sample.members if extension in extensions]
    if len(found) == 1:
        return sample.members[found[0]]
    has = ", ".join(f".{extension}" for extension in sample.members)
    if not found:
        raise SourceError(
            f"the sample {sample.key!r} in {tar} has no image ({', '.join(sorted(extensions))}), only {has}; take it "
            "out, or name the images' extension with image_column="
        )
    raise SourceError(
        f"the sample {sample.key!r} in {tar} has several images ({has}): choose with image_column=EXTENSION"
    )


def _label(sample: _Sample, file: int, tar: Path) -> int:
    """From ``.cls``, else from ``"label"`` in ``.json``; -1 without."""

    def content(extension: str) -> bytes:
        offset, size = sample.members[extension]
        return os.pread(file, size, offset)

    said: object = None
    try:
        if "cls" in sample.members:
            said = int(content("cls"))
        elif "json" in sample.members:
            found = json.loads(content("json"))
            said = found.get("label") if isinstance(found, dict) else None
    except (ValueError, RecursionError) as e:
        raise SourceError(f"the label of the sample {sample.key!r} in {tar} cannot be read: {e}") from e
    if said is None:
        return -1
    if not isinstance(said, int) or isinstance(said, bool) or abs(said) >= 1 << 63:
        raise SourceError(f"the sample {sample.key!r} in {tar} has the label {said!r}, not a whole number")
    return said


def _classes(*folders: Path) -> tuple[str, ...] | None:
    """From ``classes.txt`` (one a line) or ``classes.json`` (a list) beside the tars."""
    for file in (folder / name for folder in folders for name in ("classes.txt", "classes.json")):
        if not file.is_file():
            continue
        try:
            text = file.read_text("utf-8-sig")
            names = json.loads(text) if file.suffix == ".json" else text.rstrip().splitlines()
        except (OSError, ValueError) as e:
            raise SourceError(f"cannot read {file}: {e}; mend it, or take it away") from e
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise SourceError(
                f"{file} is no list of class names, one a line or a JSON list; mend it, or take it away"
            )
        return tuple(names)
    return None
