"""A plain folder of images without labels: ``dir/**/image.jpg``, or ``dir/{train,val,…}/**/image.jpg`` with splits.

Images that lie directly in ``dir``, or directly in ``dir/train``, …, are taken for one; images in other folders
for an ImageFolder, whose folders are classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softcache.errors import SourceError, counted
from softcache.source.files import Files, has_images, images_in, refuse_columns, split_folders
from softcache.source.layout import SPLITS, choose_split

LOOK = "images in no class folder"


def recognise(path: Path) -> bool:
    """Is there an image directly in it, or directly in a split's folder?"""
    return path.is_dir() and any(has_images(folder, below=False) for folder in (path, *split_folders(path)))


def open_split(path: Path, split: str | None, image_column: str | None, label_column: str | None) -> Files:
    """Raises :class:`SourceError` for a split that is not there."""
    refuse_columns(path, image_column, label_column)
    splits = [f.name for f in split_folders(path) if has_images(f, below=True)]
    if splits and not has_images(path, below=False):
        split = choose_split(split, splits, path)
        path = path / split
    elif split is not None:
        raise SourceError(
            f"{path} has no split {split!r}: it has images directly, or no folder with images called "
            f"{', '.join(SPLITS)}; leave split= out, or point to the folder above"
        )
    ids, ignored = images_in(path, path)
    notes = (f"{counted(ignored, 'file')} ignored, of another kind than images",) if ignored else ()
    return Files(path, split, ids, np.full(len(ids), -1, np.int64), None, ("no labels", *notes))
