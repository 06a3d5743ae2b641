"""Images that are files below a folder: what ``imagefolder`` and ``folder`` share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softcache.errors import SourceError
from softcache.source.decode import EXTENSIONS
from softcache.source.layout import SPLITS


@dataclass(frozen=True)
class Files:
    """An opened folder; ids are POSIX paths relative to ``root``."""

    root: Path
    split: str | None
    ids: list[str]
    labels: np.ndarray
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]

    def read(self, row: int) -> bytes:
        return (self.root / self.ids[row]).read_bytes()

    def where(self, row: int) -> str:
        return str(self.root / self.ids[row])


def subfolders(path: Path) -> list[Path]:
    """Those that are not hidden, sorted. Raises :class:`SourceError` for what is no folder."""
    if not path.is_dir():
        raise SourceError(f"{path} is no folder; give the folder that the images are in")
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def split_folders(path: Path) -> list[Path]:
    """Those called ``train``, ``val``, …."""
    return [folder for folder in subfolders(path) if folder.name in SPLITS]


def walk(folder: Path) -> Iterator[tuple[str, str]]:
    """(folder, file name) of every file below that is not hidden; links to folders are not followed,
    as they may lead in a circle."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((where, name) for name in files if not name.startswith("."))


def is_image(name: str) -> bool:
    """By its extension."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122


def has_images(folder: Path, below: bool) -> bool:
    """Is there an image in the folder itself, or (``below``) in it or anywhere below?"""
    if below:
        return any(is_image(name) for _, name in walk(folder))
    with os.scandir(folder) as entries:
        return any(is_image(e.name) and not e.name.startswith(".") and e.is_file() for e in entries)


def images_in(folder: Path, root: Path) -> tuple[list[str], int]:
    """Paths relative to ``root`` of the images below ``folder``, sorted, and how many files are none."""
    files = sorted(Path(where, name).relative_to(root).as_posix() for where, name in walk(folder))
    images = [file for file in files if is_image(file)]
    return images, len(files) - len(images)


def refuse_columns(path: Path, *columns: str | None) -> None:
    """Raises :class:`SourceError` where a column is named: a folder of files has none."""
    if any(columns):
        raise SourceError(f"{path} is a folder of images, which has no columns; leave *_column= out")
