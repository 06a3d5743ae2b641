"""Where things are in an image, and files of images of which that is known: what ``coco`` and ``yolo`` share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

import numpy as np

from softcache.errors import counted
from softcache.source.decode import open_image
from softcache.source.files import Files
from softcache.spec import canonical_json

_COLUMNS = {"xyxy": ("<f8", (4,)), "label": ("<i8", ()), "crowd": ("?", ()), "ignore": ("?", ())}


@dataclass(frozen=True, eq=False)
class Boxes:
    """The ``n`` boxes of one image, in the order of its annotations; the arrays are read-only.

    Attributes:
        xyxy: float64 ``(n, 4)``: left, top, right, bottom in pixels of the image as it is stored; right is never less
            than left, nor bottom than top. They are as annotated, and may reach outside the image.
        label: int64 ``(n,)``: the class, counted from 0.
        crowd: bool ``(n,)``: around a group, not one thing.
        ignore: bool ``(n,)``: neither to be learnt nor to be scored, as all without an area are.

    Raises :class:`ValueError` for arrays of other shapes.
    """

    xyxy: np.ndarray
    label: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.label)
        for name, (dtype, shape) in _COLUMNS.items():
            given = np.asarray(getattr(self, name), dtype)
            if given.shape != (n, *shape):
                raise ValueError(f"{name} of {n} boxes has the shape {given.shape}")
            array = given.view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, which: slice | np.ndarray) -> Boxes:
        return Boxes(self.xyxy[which], self.label[which], self.crowd[which], self.ignore[which])

    @staticmethod
    def empty() -> Boxes:
        """No box at all."""
        return Boxes(*(np.zeros((0, *shape), dtype) for dtype, shape in _COLUMNS.values()))

    def to_bytes(self) -> bytes:
        """Every number, little-endian, one column after the other."""
        return b"".join(getattr(self, name).tobytes() for name in _COLUMNS)


def digest_boxes(ids: Sequence[str], boxes: Iterable[Boxes | None]) -> str:
    """sha256 over ids and boxes, in order; None stands for an image that cannot be read."""
    total = hashlib.sha256()
    for id, found in zip(ids, boxes, strict=True):
        total.update(canonical_json([id, None if found is None else len(found)]))
        total.update(b"" if found is None else found.to_bytes())
    return total.hexdigest()


@dataclass(frozen=True)
class Annotated(Files):
    """An opened split of image files; the boxes of row ``i`` are ``every[starts[i] : starts[i + 1]]``."""

    every: Boxes
    starts: np.ndarray

    def boxes(self, row: int) -> Boxes:
        return self.every[self.starts[row] : self.starts[row + 1]]


def by_image(owner: Sequence[int], images: int, every: Boxes) -> tuple[Boxes, np.ndarray]:
    """The boxes put together by the image that owns them, and where those of each of ``images`` start (and the last
    one's end); of one image they keep their order."""
    of = np.asarray(owner, np.int64)
    order = np.argsort(of, kind="stable")
    return every[order], np.searchsorted(of[order], np.arange(images + 1))


def flat(xyxy: np.ndarray) -> np.ndarray:
    """bool ``(n,)``: the boxes without an area."""
    return np.any(xyxy[:, 2:] <= xyxy[:, :2], axis=1)


def told(every: Boxes, starts: np.ndarray) -> str:
    """What a person should know of the boxes of a split."""
    empty = flat(every.xyxy)
    counts = {
        "around crowds": int(every.crowd.sum()),
        "to be ignored": int((every.ignore & ~empty).sum()),
        "without an area, which are ignored": int(empty.sum()),
    }
    more = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
    bare = int((np.diff(starts) == 0).sum())
    none = f", none in {counted(bare, 'image')}" * bool(bare)
    return f"{counted(len(every), 'box')}{f' ({more})' * bool(more)}{none}"


def shown(value: Any) -> str:
    """For messages: what somebody's file holds, short whatever it is (of YAML, a few lines may unfold to millions)."""
    short = Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring = 1, 8, 4, 200
    return short.repr(value)


def image_size(file: Path) -> tuple[int, int]:
    """Width and height of the pixels that are stored, from the image's header. Raises what Pillow does."""
    with open_image(file) as image:
        return image.size
