"""``overlay``: what a cache holds, drawn onto the images of its source: a person sees whether they belong together."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from softcache import canary
from softcache.cache import Cache
from softcache.drawing import marks, words
from softcache.drawing.panel import LEAST, Panel, sheet
from softcache.errors import SpecError, StoreError, counted
from softcache.indices import is_whole
from softcache.keyed import hash64
from softcache.recipe import Recipe, gather, render
from softcache.source import Boxes, Source
from softcache.source.decode import open_image
from softcache.targets import Items

MAX_SIDE = 4096
_VIEWS = 10  # of a sample, where nobody says which
_WIDTH = 2000  # pixels of a sheet, about
_OURS = "softcache overlay"  # what our PNG files say in "Software"


def overlay(
    cache: Cache,
    source: Source,
    out: str | os.PathLike[str],
    *,
    rows: int = 8,
    ids: Sequence[str] | None = None,
    views: Sequence[int] | None = None,
    size: int | None = None,
    min_score: float = 0.3,
) -> list[Path]:
    """Draw some samples of a cache, one PNG file each, all views of a sample side by side.

    On every view: the source's boxes, dashed in black and white (dotted: crowds, and what is to be ignored), those
    that a student would be given; and of every target of items the teacher's boxes, in the colours of their classes.
    Below it: the view in words, of logits the three most probable classes and the label, of feature maps the mean
    |activation| of every place.

    Args:
        out: the folder, which is created. A file there is replaced only where this function wrote it.
        rows: how many samples, keyed: the same ones always. ids: these samples instead.
        views: which views; all, or ten of them evenly spread.
        size: of the longer side of a view in pixels; the teacher's by default.
        min_score: a teacher's boxes below it are not drawn.

    Returns the files, in the order of the samples.

    Raises:
        SpecError: an option that cannot be, or a file in ``out`` that is somebody else's.
        StoreError: a folder or a file that cannot be written.
        MismatchError: another source than the cache was built from. NotBuilt, InvalidRow, UnreadableImage.
    """
    cache.require_replayable("an overlay")
    pairing = canary.pair(cache, source)
    numbers = _numbers(cache, views)
    size_ = _size(cache, size)
    if not 0 <= min_score <= 1:
        raise SpecError(f"min_score is {min_score}: from 0 to 1")
    samples = _samples(cache, rows) if ids is None else [cache.index(id) for id in dict.fromkeys(ids)]
    files = {sample: _file(cache, Path(out), sample) for sample in samples}
    _make(Path(out))
    drawer = _Drawer(cache, source, pairing.index, numbers, size_, min_score)
    for sample, path in files.items():
        _save(drawer.draw(sample), path)
    return list(files.values())


def _numbers(cache: Cache, views: Sequence[int] | None) -> list[int]:
    if views is None:
        few = min(cache.views, _VIEWS)
        return [k * (cache.views - 1) // max(few - 1, 1) for k in range(few)]
    for k in views:
        if not is_whole(k) or not 0 <= k < cache.views:
            raise SpecError(f"view {k!r}: views are whole numbers, here from 0 to {cache.views - 1}")
    if not views:
        raise SpecError("no views: name one at least")
    return list(views)


def _size(cache: Cache, size: int | None) -> tuple[int, int]:
    """(h, w) that views are rendered at."""
    height, width = cache.identity["teacher"]["input_spec"]["size"]
    longer = max(height, width)
    if size is None:
        size = min(longer, MAX_SIDE)
    if not is_whole(size) or not 1 <= size <= MAX_SIDE:
        raise SpecError(f"size is {size!r}: the longer side of a view, from 1 to {MAX_SIDE} pixels")
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def _samples(cache: Cache, rows: int) -> list[int]:
    if not is_whole(rows) or rows < 1:
        raise SpecError(f"rows is {rows!r}: how many samples to draw, at least 1")
    invalid = set(cache.invalid.tolist())
    valid = (i for i in range(cache.samples) if i not in invalid)
    return sorted(heapq.nsmallest(rows, valid, lambda i: hash64("overlay", cache.ids[i])))


class _Drawer:
    """Draws samples of one cache."""

    def __init__(
        self,
        cache: Cache,
        source: Source,
        index: np.ndarray,
        numbers: list[int],
        size: tuple[int, int],
        min_score: float,
    ):
        self._cache, self._source, self._index = cache, source, index
        self._numbers, self._size, self._min_score = numbers, size, min_score
        recipe = cache.identity["recipe"]
        self._recipe = Recipe(recipe["spec"], recipe["seed"])
        self._labels = source.labels[index]
        self._image = lru_cache(8)(lambda sample: source.image(int(index[sample])))

    def draw(self, sample: int) -> Image.Image:
        """All that is drawn of a sample."""
        panels = [self._panels(sample, k) for k in self._numbers]
        each = len(panels[0])  # one for every target with boxes
        columns = each if each > 1 else max(1, _WIDTH // max(*self._size, LEAST))
        return sheet([panel for of_view in panels for panel in of_view], columns, self._head(sample))

    def _head(self, sample: int) -> list[str]:
        """What holds for all views."""
        cache, targets = self._cache, self._cache.targets.values()
        views = counted(cache.views, "view")
        teacher = cache.identity["teacher"]["name"]
        lines = [f"{cache.ids[sample]}: {views} of {self._recipe.spec}, seen by {teacher}"]
        if self._source.has_boxes:
            lines.append("Black and white: the source's boxes; dotted: crowds, and what is to be ignored.")
        if any(target.layout for target in targets):
            lines.append(
                f"Coloured: the teacher's boxes, with the best class and its score, from {self._min_score:g}."
            )
        if any(marks.thinned(target) for target in targets):
            lines.append(
                f"Of those of one class that overlap (IoU over {marks.IOU}) the best is drawn. The cache holds all."
            )
        return lines

    def _panels(self, sample: int, k: int) -> list[Panel]:
        """One for every target with boxes, or one."""
        cache, row = self._cache, np.array([sample])
        view = cache.read_views(k, row, slab=False)[0]
        images = gather(sample, view, self._image)
        pixels = render(images[sample], view, self._size, images)
        below = [self._number(k), words.tell(view, cache.ids)]
        if label := marks.labelled(view, sample, self._labels, self._source.classes):
            below.append(label)
        drawn, maps = [], []
        for name, values in cache.read(k, row, slab=False).items():
            target, value = cache.targets[name], values[0]
            if isinstance(value, Items):
                drawn.append(marks.said(target, value, cache.classes, self._min_score))
            elif target.kind == "logits":
                below.append(marks.decided(name, value, cache.classes))
            elif target.kind == "feature_map":
                maps.append((name, np.abs(value.dense()).mean(axis=0)))
        truth = marks.truth(view, sample, self._boxes, self._source.classes, self._size)
        return [
            Panel(pixels, [*said.marks, *truth], [] if i else maps, [*below, said.line])
            for i, said in enumerate(drawn or [marks.Said([], "")])
        ]

    def _number(self, k: int) -> str:
        """Which view it is, and of which phase, where there are several."""
        starts = self._recipe.starts
        phase = sum(first <= k for first in starts)
        return f"view {k}" + f", phase {phase} of {len(starts)}" * (len(starts) > 1)

    def _boxes(self, sample: int) -> Boxes | None:
        return self._source.boxes(int(self._index[sample]))


# -- files -------------------------------------------------------------------------------------------------


def _file(cache: Cache, out: Path, sample: int) -> Path:
    """Where a sample is drawn. :class:`SpecError` where somebody else's file is in the way."""
    if out.resolve().is_relative_to(cache.path.resolve()):
        raise SpecError(f"{out} is inside the cache {cache.path}: name a folder beside it")
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", re.sub(r"\.\w{3,4}$", "", cache.ids[sample]))[-80:]
    path = out / f"{sample:06d}-{name}.png"
    if os.path.lexists(path) and not _is_ours(path):
        raise SpecError(
            f"{path} is there already, and no overlay of softcache: move it away, or name another folder"
        )
    return path


def _is_ours(path: Path) -> bool:
    try:
        with open_image(path) as image:
            return not path.is_symlink() and image.info.get("Software") == _OURS
    except (OSError, SyntaxError, ValueError):
        return False


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StoreError(f"cannot make the folder {out}: {e.strerror}; name another one") from e


def _save(picture: Image.Image, path: Path) -> None:
    """All of it or nothing, as far as anyone sees."""
    note = PngInfo()
    note.add_text("Software", _OURS)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        picture.save(unfinished, "PNG", pnginfo=note)
        unfinished.replace(path)
    except OSError as e:
        unfinished.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {e.strerror}; make room, or name another folder") from e
