"""Any map-style Python dataset: items are an image, (image, label, …) or a mapping.

A Hugging Face ``Dataset`` is one, whose ``features`` name the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np

from softcache.errors import SourceError
from softcache.source.decode import to_rgb
from softcache.source.layout import Lock

IMAGE_KEYS = ("image", "img")
LABEL_KEYS = ("label", "labels")


@dataclass(frozen=True)
class Dataset:
    """An opened dataset; ids are "0", "1", … unless they were given"""

    data: Any
    ids: list[str]
    classes: tuple[str, ...] | None
    image_key: str | None
    label_key: str | None
    split: None = None
    notes: tuple[str, ...] = ()
    # Python datasets are written for processes, not for threads
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @property
    def labels(self) -> np.ndarray:
        """From ``.targets`` or a Hugging Face column where there is one; else every item is read."""
        targets = getattr(self.data, "targets", None)
        if targets is None and (column := _label_column(self.data, self.label_key)):
            with self._lock:
                found = self.data.with_format(None)[column]
            targets = [-1 if label is None else label for label in found]
        if targets is None:
            with self._lock:
                targets = [_label(self.data[row], self.label_key) for row in range(len(self.ids))]
        labels = np.asarray(targets)
        if labels.shape != (len(self.ids),) or labels.dtype.kind not in "iu":
            raise SourceError(
                f"the dataset's targets have shape {labels.shape} and dtype {labels.dtype}; "
                f"expected {len(self.ids)} whole numbers"
            )
        return labels.astype(np.int64)

    def read(self, row: int) -> bytes | np.ndarray:
        with self._lock:
            image = _image(self.data[row], self.image_key)
            return image if isinstance(image, bytes) else to_rgb(image)

    def where(self, row: int) -> str:
        return f"item {row} of a {type(self.data).__name__}"


def open_dataset(
    data: Any, image_key: str | None, label_key: str | None, ids: Sequence[str] | None = None
) -> Dataset:
    """Raises :class:`SourceError` for an object that is no map-style dataset."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise SourceError(
            f"a {type(data).__name__} is neither a path nor a map-style dataset "
            "(an object with __len__ and __getitem__)"
        )
    if isinstance(data, Mapping):
        raise SourceError(
            f"a {type(data).__name__} is no dataset, but may hold some ({', '.join(map(str, data))}): give one of them"
        )
    known = getattr(data, "classes", None)
    if known is None and (column := _label_column(data, label_key)):
        known = getattr(data.features[column], "names", None)
    classes = None if known is None else tuple(map(str, known))
    if ids is not None and len(ids) != len(data):
        raise SourceError(f"{len(ids):,} ids for a dataset of {len(data):,} items; give one for each")
    names = [str(i) for i in (range(len(data)) if ids is None else ids)]
    return Dataset(data, names, classes, image_key, label_key)


def _label_column(data: Any, wanted: str | None) -> str | None:
    """The wanted column of a Hugging Face dataset, or one of the usual names; None for other datasets."""
    features = getattr(data, "features", None)
    if not (isinstance(features, Mapping) and hasattr(data, "with_format")):
        return None
    return next((name for name in ((wanted,) if wanted else LABEL_KEYS) if name in features), None)


def _image(item: Any, key: str | None) -> Any:
    if isinstance(item, Mapping):
        return item[_key(item, key, IMAGE_KEYS, "image_column")]
    return item[0] if isinstance(item, tuple | list) else item


def _label(item: Any, key: str | None) -> int:
    if isinstance(item, Mapping):
        if key is None and not any(k in item for k in LABEL_KEYS):
            return -1
        label = item[_key(item, key, LABEL_KEYS, "label_column")]
    elif isinstance(item, tuple | list) and len(item) > 1:
        label = item[1]
    else:
        return -1
    try:
        return -1 if label is None else index(label)
    except TypeError:
        raise SourceError(f"a dataset item has the label {label!r}, not a whole number") from None


def _key(item: Mapping[str, Any], wanted: str | None, usual: tuple[str, ...], option: str) -> str:
    for key in (wanted,) if wanted else usual:
        if key in item:
            return key
    raise SourceError(
        f"a dataset item has no {' or '.join((wanted,) if wanted else usual)}, but "
        f"{', '.join(map(str, item))}: name the one to use with {option}="
    )
