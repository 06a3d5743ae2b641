"""What is drawn over a view: the boxes of its source, and what a teacher said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from softcache import geometry
from softcache.codecs.topk import SparseLogits
from softcache.drawing.panel import Mark, color_of
from softcache.recipe import View
from softcache.source import Boxes
from softcache.targets import Items, Target
from softcache.targets.logits import Logits, Other

MOST = 100  # boxes of a teacher in a panel
UNSCORED = 20  # of a target whose items have no scores
IOU = 0.65  # of two boxes of one class, above which only the better one is drawn

Names = Sequence[str] | None


def truth(
    view: View, sample: int, boxes: Callable[[int], Boxes | None], names: Names, size: tuple[int, int]
) -> list[Mark]:
    """The boxes of the source that are seen in the view at ``size``, those of all images that it shows."""
    given = {i: theirs for i in (sample, *view.others) if (theirs := boxes(i)) is not None}
    if not given:  # the source has none
        return []
    seen, found = geometry.seen_in_all(view, sample, given, size=size), []
    for box, label, crowd, ignored in zip(seen.boxes, seen.label, seen.crowd, seen.ignore, strict=True):
        what = "crowd: " * bool(crowd) + "ignored: " * bool(ignored and not crowd)
        found.append(Mark(box, what + name_of(int(label), names), dotted=bool(crowd or ignored)))
    return found


@dataclass(frozen=True)
class Said:
    """What is drawn of a row of items, and a line about it."""

    marks: list[Mark]
    line: str


def said(target: Target, items: Items, names: Names, min_score: float) -> Said:
    """The items of one row (of the last layer) with a score of at least ``min_score``, the best of them drawn last.

    Where several items answer for one thing, they are :func:`suppressed`, as the teacher's post-processing does.
    """
    layout = items.layout
    if "boxes" not in items.parts:
        return Said([], f"{target.name}: without boxes")
    last = items.layer(-1) if layout.layers > 1 else items
    of = f"{last.index.shape[-1]:,} items" + f" of the last of {layout.layers} layers" * (layout.layers > 1)
    boxes = last.parts["boxes"].astype(np.float64)
    if not layout.scored:
        marks = [Mark(box, f"{i}", color_of(i)) for i, box in enumerate(boxes[:UNSCORED])]
        return Said(marks[::-1], f"{target.name}: the first {len(marks)} of {of}, which have no scores")
    scores = last.scores()
    label, score = scores.argmax(axis=-1), scores.max(axis=-1)
    chosen = np.flatnonzero((score >= min_score) & np.isfinite(boxes).all(axis=-1))
    chosen = chosen[np.argsort(-score[chosen], kind="stable")]
    line = f"{target.name}: {len(chosen)} of {of} at {min_score:g} or more"
    if thinned(target):
        chosen = chosen[suppressed(boxes[chosen], label[chosen])]
        line += f", {len(chosen)} without overlaps"
    if len(chosen) > MOST:
        line += f", the best {MOST} drawn"
    known = names if layout.classes and names and len(names) == layout.classes else None
    marks = [
        Mark(
            boxes[i],
            (f"{name_of(int(label[i]), known)} " if layout.classes else "") + f"{score[i]:.2f}",
            color_of(int(label[i])),
        )
        for i in chosen[:MOST].tolist()
    ]
    return Said(marks[::-1], line)


def thinned(target: Target) -> bool:
    """Does its teacher answer several times for one thing?"""
    return target.layout is not None and bool(target.layout.levels or target.kind == "proposals")


def suppressed(boxes: np.ndarray, label: np.ndarray, iou: float = IOU) -> np.ndarray:
    """Greedy non-maximum suppression, class by class: the kept ones of xyxy ``(n, 4)``, which come best first."""
    kept: list[int] = []
    area = np.prod((boxes[:, 2:] - boxes[:, :2]).clip(0), axis=1)
    left = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if left[i]:
            kept.append(i)
            sides = np.minimum(boxes[:, 2:], boxes[i, 2:]) - np.maximum(boxes[:, :2], boxes[i, :2])
            common = np.prod(sides.clip(0), axis=1)
            left &= (label != label[i]) | (common <= iou * (area + area[i] - common))
    return np.array(kept, np.int64)


def decided(name: str, logits: Logits | Other, names: Names) -> str:
    """The three most probable classes of one row, of those that its codec kept, with probabilities where it did."""
    if not logits.holds(1.0):
        return f"{name}: {name_of(int(logits.top1()), names)}"
    p = np.exp(logits.dense(1.0))
    falling = logits.index if isinstance(logits, SparseLogits) else np.argsort(-p, kind="stable")
    best = list(dict.fromkeys(falling.tolist()))[:3]  # one that keeps few repeats the first
    return f"{name}: " + ", ".join(f"{name_of(i, names)} {p[i]:.2f}" for i in best)


def labelled(view: View, sample: int, labels: np.ndarray, names: Names) -> str | None:
    """The labels of a view, with their shares where it is mixed; None without, as of a mosaic, which has no one label."""
    parts = list(_labels(view, sample, labels))
    if all(label < 0 for label, _ in parts):
        return None
    told = [name_of(label, names) if label >= 0 else "none" for label, _ in parts]
    if len(parts) == 1:
        return f"label: {told[0]}"
    return "label: " + ", ".join(f"{one} {share:.2f}" for one, (_, share) in zip(told, parts, strict=True))


def _labels(view: View, sample: int, labels: np.ndarray) -> Iterator[tuple[int, float]]:
    own = view.mix.blend.share if view.mix else 1.0
    yield -1 if view.mosaic else int(labels[sample]), own
    if view.mix:
        yield -1 if view.mix.view.mosaic else int(labels[view.mix.partner]), 1 - own


def name_of(label: int, names: Names) -> str:
    return names[label] if names is not None and label < len(names) else f"class {label}"
