"""Source: an ordered set of samples (ids, images, labels, class names) with a fingerprint.

``Source("data/cifar10", split="train")`` recognises the layout of a path; a map-style Python dataset is
taken as it is. Each layout is one file here, a module with

* ``LOOK``: what it is recognised by, for messages;
* ``recognise(path) -> bool``: is it this layout? Cheap, and never true of what another one claims (but for those
  of ``TREES``, which yield to a file that describes the images);
* ``open_split(path, split, image_column, label_column) -> Samples`` (see :mod:`.layout`).
"""

from __future__ import annotations

import hashlib
import heapq
import operator
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from softcache.errors import SourceError, SpecError, UnreadableImage, counted, nearest
from softcache.keyed import hash64
from softcache.source import arrow, coco, dataset, folder, imagefolder, parquet, webdataset, yolo
from softcache.source.boxes import Boxes, digest_boxes
from softcache.source.decode import is_rotated, to_rgb
from softcache.source.layout import Samples
from softcache.spec import canonical_json, digest, digest_ids

__all__ = ["Boxes", "Source", "digest_contents", "digest_labels", "find_unreadable"]

T = TypeVar("T")

LAYOUTS = {
    "parquet": parquet,
    "arrow": arrow,
    "webdataset": webdataset,
    "coco": coco,
    "yolo": yolo,
    "imagefolder": imagefolder,
    "folder": folder,
}
DESCRIBED = {"coco", "yolo"}  # a file says what is in the images
TREES = {"imagefolder", "folder"}  # and here only where they lie
PYTHON = "dataset"  # the layout of a Python object
SOME = 256  # samples a thread takes at a time


class Source:
    """The samples of one split of a dataset; safe to share between threads and to pickle.

    ``data`` is a path or a map-style dataset (``__len__`` and ``__getitem__``). ``split`` may be left
    out where there is one. ``limit`` keeps a keyed sample of that many ids, in source order: the same
    ids always, and those of a smaller limit are among those of a larger one. ``layout`` overrides what
    is recognised; the columns name those of a Parquet file or the keys of a dataset's items. ``ids`` names
    the items of a Python dataset, which are otherwise "0", "1", …
    Raises :class:`SourceError` for whatever is missing, empty, ambiguous or not recognised.
    """

    def __init__(
        self,
        data: Any,
        *,
        split: str | None = None,
        limit: int | None = None,
        layout: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.layout = _layout(data, layout)
        self._samples = _open(data, self.layout, split, image_column, label_column, ids)
        _check(self._samples.ids, _name(data))
        self._take(_choose(self._samples.ids, limit))

    def _take(self, rows: Sequence[int]) -> None:
        self._rows = rows
        self.split = self._samples.split
        self.ids = tuple(self._samples.ids[row] for row in rows)
        self.classes = self._samples.classes
        self.share = 1.0  # of the source that :meth:`sample` took it from
        self._fingerprinted: bytes | None = None  # 32 a sample
        self._rotated = 0

    def sample(self, count: int) -> Source:
        """A source of ``count`` of these samples, chosen as ``limit`` does; of all where there are no more."""
        part = Source.__new__(Source)
        part.layout, part._samples = self.layout, self._samples
        part._take([self._rows[i] for i in _choose(self.ids, count)])
        part.share = self.share * len(part) / len(self)
        return part

    def __len__(self) -> int:
        return len(self.ids)

    def index(self, id: str) -> int:
        """The position of ``id``. Raises :class:`SourceError` for one that is not here."""
        try:
            return self._positions[id]
        except (KeyError, TypeError):
            strings = "" if isinstance(id, str) else "; ids are strings"
            raise SourceError(
                f"no sample {id!r} in the source ({self.describe()}; the first is {self.ids[0]!r}{strings})"
            ) from None

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {id: i for i, id in enumerate(self.ids)}

    def label(self, id: str) -> int | None:
        """The class of ``id``, None where unknown."""
        label = int(self.labels[self.index(id)])
        return None if label < 0 else label

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 ``(N,)``, -1 where unknown. Raises :class:`SourceError` for one beyond the classes."""
        labels = self._samples.labels[np.asarray(self._rows)]
        labels = np.where(labels < 0, -1, labels)
        if self.classes is not None and labels.max() >= len(self.classes):
            i = int(labels.argmax())
            raise SourceError(
                f"{self.ids[i]!r} ({self._where(i)}) has the label {labels[i]}, and there are "
                f"{len(self.classes)} classes; the labels must count from 0"
            )
        return labels

    def image(self, i: int) -> np.ndarray:
        """Pixels of sample ``i``: uint8 ``(H, W, 3)``, RGB, perhaps read-only.

        Raises :class:`UnreadableImage`, naming the id and where it is, for bytes that do not make a whole
        image, and :class:`SourceError` for bytes that cannot be read now (no such file, too many open
        files) or are not those that were fingerprinted.
        """
        return self._content(i, lambda content: to_rgb(self._same(i, content)))

    __getitem__ = image

    def encoded(self, i: int) -> bytes | np.ndarray:
        """The bytes of sample ``i`` as they lie there, or its pixels where a Python dataset has no bytes. Raises as
        :meth:`image` does, but for what cannot be decoded."""
        return self._content(i, lambda content: self._same(i, content))

    @property
    def has_boxes(self) -> bool:
        """Does the layout say where things are in the images?"""
        return hasattr(self._samples, "boxes")

    def boxes(self, i: int) -> Boxes | None:
        """The boxes of sample ``i``, in the pixels of :meth:`image`; None where the layout has none for any.

        Raises :class:`UnreadableImage` where they depend on the image's size, and that cannot be read, and
        :class:`SourceError` for an image of another size than theirs.
        """
        boxes = getattr(self._samples, "boxes", None)
        return None if boxes is None else self._guarded(i, boxes)

    @cached_property
    def boxes_digest(self) -> str | None:
        """sha256 over the ids and boxes of all samples, in order; None without boxes. Raises :class:`SourceError`."""
        return self.digest_boxes(range(len(self)))

    def digest_boxes(self, index: Sequence[int]) -> str | None:
        """The same over some samples, in the order of ``index``."""

        def readable(n: int) -> Boxes | None:
            try:
                return self.boxes(index[n])
            except UnreadableImage:
                return None

        ids = [self.ids[i] for i in index]
        return digest_boxes(ids, _in_threads(readable, len(ids))) if self.has_boxes else None

    @cached_property
    def ids_digest(self) -> str:
        """sha256 over the ids in order."""
        return digest_ids(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the id and the sha256 of the content of every sample: its bytes as they are, or
        shape and pixels where a Python dataset has no bytes.

        From then on, an image whose content is another than it was is refused: see :meth:`image`.
        Raises :class:`UnreadableImage` for content that cannot be read (whether it can be decoded does
        not matter).
        """
        seen = _in_threads(lambda i: self._content(i, lambda c: (_digest(c), is_rotated(c))), len(self))
        contents = [content for content, _ in seen]
        self._fingerprinted = b"".join(map(bytes.fromhex, contents))
        self._rotated = sum(rotated for _, rotated in seen)
        return digest_contents(self.ids, contents)

    def contents(self, index: Sequence[int]) -> list[str]:
        """sha256 of the content of some samples, read by threads."""
        return _in_threads(lambda i: self._content(index[i], _digest), len(index))

    @property
    def rotation(self) -> str:
        """One line for a person where, as the fingerprint found, files ask to be shown turned; else empty."""
        files = counted(self._rotated, "file")
        found = f"{files} with an EXIF orientation, which is not applied: pixels are used as stored"
        return found if self._rotated else ""

    def describe(self) -> str:
        """One line for a person."""
        split = "" if self.split is None else f", split {self.split!r}"
        every = len(self._samples.ids)
        of = "" if len(self) == every else f"{len(self):,} of "
        classes = "no class names" if self.classes is None else counted(len(self.classes), "class")
        head = f"{self.layout}{split}: {of}{counted(every, 'sample')}, {classes}"
        return "; ".join([head, *self._samples.notes])

    def decoder(self) -> dict[str, str]:
        """The engines that decode, with their versions: another may give other pixels."""
        import PIL
        import simplejpeg

        return {"simplejpeg": simplejpeg.__version__, "pillow": PIL.__version__}

    def _content(self, i: int, use: Callable[[bytes | np.ndarray], T]) -> T:
        return self._guarded(i, lambda row: use(self._samples.read(row)))

    def _guarded(self, i: int, use: Callable[[int], T]) -> T:
        """``use`` of the row of sample ``i``, whatever goes wrong named."""
        row = self._row(i)
        try:
            return use(row)
        except (MemoryError, SourceError):
            raise
        except Exception as e:
            if isinstance(e, OSError) and e.errno is not None:  # the system's word, not a decoder's
                raise SourceError(
                    f"cannot read {self.ids[i]!r} ({self._where(i)}): {e.strerror}; mend that and run again"
                ) from e
            raise UnreadableImage(
                f"cannot read the image {self.ids[i]!r} ({self._where(i)}): {type(e).__name__}: {e}; "
                "damaged or not an image: restore it, or take it out"
            ) from e

    def _row(self, i: int) -> int:
        """Raises :class:`IndexError` beyond the samples, as a sequence does, and :class:`SpecError` for no number."""
        try:
            number = operator.index(i)
        except TypeError:
            raise SpecError(
                f"samples are asked for by number, 0 to {len(self) - 1}, not {i!r}: source.index(id) is the number of an id"
            ) from None
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self._rows[number]

    def _same(self, i: int, content: bytes | np.ndarray) -> bytes | np.ndarray:
        known = self._fingerprinted
        if known is not None and bytes.fromhex(_digest(content)) != known[32 * i : 32 * i + 32]:
            raise SourceError(
                f"{self.ids[i]!r} ({self._where(i)}) changed since it was fingerprinted: put the image back "
                "and run again, or build into a new folder (a Python dataset must give the same image every "
                "time: leave random transforms to the recipe)"
            )
        return content

    def _where(self, i: int) -> str:
        return self._samples.where(self._rows[i])


def find_unreadable(source: Source) -> list[str]:
    """The ids, in source order, whose images cannot be decoded. Reads everything."""

    def readable(i: int) -> bool:
        try:
            source.image(i)
        except UnreadableImage:
            return False
        return True

    good = _in_threads(readable, len(source))
    return [id for id, fine in zip(source.ids, good, strict=True) if not fine]


def digest_contents(ids: Sequence[str], contents: Sequence[str]) -> str:
    """sha256 over ids and the digests of their contents, in order: what :attr:`Source.fingerprint` is."""
    total = hashlib.sha256()
    for id, content in zip(ids, contents, strict=True):
        total.update(canonical_json([id, content]))
    return total.hexdigest()


def digest_labels(labels: np.ndarray) -> str | None:
    """sha256 over int64 labels in order; None where none is known (all are -1)."""
    return digest(labels.astype("<i8").tobytes()) if (labels >= 0).any() else None


def _layout(data: Any, wanted: str | None) -> str:
    names = (*LAYOUTS, PYTHON)
    if wanted is not None and wanted not in names:
        raise SourceError(f"unknown layout {wanted!r}{nearest(wanted, names)}")
    if not isinstance(data, str | Path):
        if wanted not in (None, PYTHON):
            raise SourceError(f"layout {wanted!r} is read from a path, not a {type(data).__name__}")
        return PYTHON
    path = Path(data)
    if not path.exists():
        raise SourceError(f"there is no {path}; give the path of a dataset")
    if wanted == PYTHON:
        raise SourceError(f"layout {PYTHON!r} takes a Python object, not the path {path}")
    return wanted or _recognised(path)


def _recognised(path: Path) -> str:
    found = [name for name, layout in LAYOUTS.items() if layout.recognise(path)]
    if DESCRIBED & set(found):
        found = [name for name in found if name not in TREES]
    if len(found) > 1:
        looks = " and ".join(f"{LAYOUTS[name].LOOK} ({name})" for name in found)
        raise SourceError(
            f"{path} may be read as {' or as '.join(found)}: it has {looks}; say which with layout= "
            "(--layout)"
        )
    if found:
        return found[0]
    there = "a file" if path.is_file() else _entries(path)
    looked = "; ".join(layout.LOOK for layout in LAYOUTS.values())
    raise SourceError(f"the layout of {path} is not recognised: looked for {looked}; there is {there}")


def _entries(path: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    return (", ".join(names[:5]) + (", …" if len(names) > 5 else "")) or "nothing in it"


def _open(
    data: Any,
    layout: str,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    ids: Sequence[str] | None,
) -> Samples:
    if ids is not None and layout != PYTHON:
        raise SourceError(f"{data} has ids of its own; ids= is for a Python dataset")
    if layout != PYTHON:
        return LAYOUTS[layout].open_split(Path(data), split, image_column, label_column)
    if split is not None:
        raise SourceError(f"a {type(data).__name__} is one split already; leave split={split!r} out")
    return dataset.open_dataset(data, image_column, label_column, ids)


def _check(ids: Sequence[str], where: str) -> None:
    if not ids:
        raise SourceError(f"there are no images in {where}")
    if len(set(ids)) < len(ids):
        twice = next(id for id, count in Counter(ids).items() if count > 1)
        raise SourceError(f"{where} has two samples called {twice!r}; keep one, or rename it")
    try:
        "".join(ids).encode()
    except UnicodeEncodeError as e:
        bad = ascii(e.object[max(0, e.start - 20) : e.end + 20])
        raise SourceError(f"{where} has a file name that is not UTF-8, near {bad}; rename it") from None


def _choose(ids: Sequence[str], limit: int | None) -> Sequence[int]:
    if limit is None or limit >= len(ids):
        return range(len(ids))
    if limit <= 0:
        raise SourceError(f"limit must be at least 1, not {limit}")
    return sorted(heapq.nsmallest(limit, range(len(ids)), lambda i: hash64("limit", ids[i])))


def _name(data: Any) -> str:
    return str(data) if isinstance(data, str | Path) else f"the {type(data).__name__}"


def _digest(content: bytes | np.ndarray) -> str:
    if isinstance(content, bytes):
        return digest(content)
    total = hashlib.sha256(repr(content.shape).encode())
    total.update(np.ascontiguousarray(content).data)
    return total.hexdigest()


def _in_threads(function: Callable[[int], T], count: int) -> list[T]:
    from concurrent.futures import ThreadPoolExecutor

    def some(start: int) -> list[T]:
        return [function(i) for i in range(start, min(start + SOME, count))]

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return [one for part in pool.map(some, range(0, count, SOME)) for one in part]
