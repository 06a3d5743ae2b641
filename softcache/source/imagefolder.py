"""ImageFolder: ``dir/class/**/image.jpg``, or ``dir/{train,val,…}/class/**/image.jpg`` with splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softcache.errors import SourceError, counted
from softcache.source.decode import EXTENSIONS
from softcache.source.files import Files, has_images, images_in, refuse_columns, split_folders, subfolders
from softcache.source.layout import SPLITS, choose_split

LOOK = "class folders with images"


def recognise(path: Path) -> bool:
    """Is there an image in a folder of a folder (that of a split not being one)?"""
    if not path.is_dir():
        return False
    splits = split_folders(path)
    classes = [folder for folder in subfolders(path) if folder not in splits]
    classes += [folder for split in splits for folder in subfolders(split)]
    return any(has_images(folder, below=True) for folder in classes)


def open_split(path: Path, split: str | None, image_column: str | None, label_column: str | None) -> Files:
    """Ids are sorted by class and path. Raises :class:`SourceError` for a split that is not there and a class
    folder without images."""
    refuse_columns(path, image_column, label_column)
    splits = [f.name for f in split_folders(path) if subfolders(f)]
    if splits:
        split = choose_split(split, splits, path)
        path = path / split
    elif split is not None:
        raise SourceError(
            f"{path} has no split {split!r}: it has class folders directly, and none of "
            f"{', '.join(SPLITS)}; leave split= out, or point to the folder above"
        )
    classes = subfolders(path)
    ids: list[str] = []
    labels: list[int] = []
    ignored = 0
    for label, folder in enumerate(classes):
        images, others = images_in(folder, path)
        if not images:
            raise SourceError(
                f"the class folder {folder} holds no images ({', '.join(sorted(EXTENSIONS))}); "
                "an ImageFolder has one folder a class: fill it, or take it away"
            )
        ids += images
        labels += [label] * len(images)
        ignored += others
    notes = [f"{counted(ignored, 'file')} ignored, of another kind than images"] if ignored else []
    if has_images(path, below=False):
        notes.append(f"images directly in {path.name}, in no class folder, ignored")
    names = tuple(folder.name for folder in classes)
    return Files(path, split, ids, np.array(labels, np.int64), names, tuple(notes))
