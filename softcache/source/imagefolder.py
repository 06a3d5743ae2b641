"""ImageFolder: ``dir/class/**/image.jpg``, or ``dir/{train,val,…}/class/**/image.jpg`` with splits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softcache.errors import SourceError
from softcache.source.decode import EXTENSIONS
from softcache.source.layout import SPLITS, choose_split


@dataclass(frozen=True)
class ImageFolder:
    """An opened folder; ids are POSIX paths relative to ``root``, sorted by class and path."""

    root: Path
    split: str | None
    ids: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    def read(self, row: int) -> bytes:
        return (self.root / self.ids[row]).read_bytes()

    def where(self, row: int) -> str:
        return str(self.root / self.ids[row])


def recognise(path: Path) -> bool:
    """Is there an image in a folder of a folder?"""
    return path.is_dir() and any(_is_image(name) for folder in _folders(path) for _, name in _walk(folder))


def open_split(path: Path, split: str | None) -> ImageFolder:
    """Raises :class:`SourceError` for a split that is not there and a class folder without images."""
    splits = [f.name for f in _folders(path) if f.name in SPLITS and _folders(f)]
    if splits:
        split = choose_split(split, splits, path)
        path = path / split
    elif split is not None:
        raise SourceError(
            f"{path} has no split {split!r}: it has class folders directly, and none of "
            f"{', '.join(SPLITS)}; leave split= out, or point to the folder above"
        )
    classes = _folders(path)
    ids: list[str] = []
    labels: list[int] = []
    ignored = 0
    for label, folder in enumerate(classes):
        files = sorted(Path(where, name).relative_to(path).as_posix() for where, name in _walk(folder))
        images = [file for file in files if _is_image(file)]
        if not images:
            raise SourceError(
                f"the class folder {folder} holds no images ({', '.join(sorted(EXTENSIONS))}); "
                "an ImageFolder has one folder a class: fill it, or take it away"
            )
        ids += images
        labels += [label] * len(images)
        ignored += len(files) - len(images)
    notes = (f"{ignored:,} files that are not images ignored",) if ignored else ()
    names = tuple(folder.name for folder in classes)
    return ImageFolder(path, split, ids, np.array(labels, np.int64), names, notes)


def _folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def _walk(folder: Path):
    """(folder, file name) of every file below that is not hidden; links to folders are not followed,
    as they may lead in a circle."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((where, name) for name in files if not name.startswith("."))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122
