"""``all`` and ``top(n, background=m, inside=p)``: items of a detector (anchors, queries, proposals, probes), column by
column.

Both are bound to a :class:`~softcache.targets.layout.Layout` with :meth:`All.laid_out`, which says what the columns are;
how each is encoded follows from that. A part ``logits`` becomes the fields ``logits``, ``logits_low``, ``logits_step``, or
``logits_rest``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from softcache.codecs.aligned import aligned
from softcache.codecs.f16 import F16
from softcache.codecs.fields import Field, Fields, below, class_dtype
from softcache.codecs.fixed import Fixed
from softcache.codecs.full import Full
from softcache.codecs.int8 import Int8
from softcache.codecs.objects import Objects
from softcache.codecs.score import Score, log_scores
from softcache.errors import CodecError, SpecError, nearest

if TYPE_CHECKING:
    from softcache.targets.layout import Layout

KINDS = ("detections", "queries", "probes", "proposals")
_LOGITS = ("u8", "f16", "score")
_FEW = 4  # columns up to which a grid of bytes takes as much as halves, or more
_ROWS = 8  # encoded at a time: a row may be 5 MB


@dataclass(frozen=True)
class Items:
    """Items of a row, or of several.

    Attributes:
        layout: what the parts mean.
        index: int64 ``(…, K)``, an item's number in the teacher's order.
        weight: float32 ``(…, K)``, how many items each stands for: 1, but for ``top``'s background.
        parts: by name, float32 ``(…, K, columns)``.
    """

    layout: Layout
    index: np.ndarray
    weight: np.ndarray
    parts: Mapping[str, np.ndarray]

    @classmethod
    def whole(cls, layout: Layout, values: np.ndarray) -> Items:
        """All items of a teacher's answer, float32 ``(…, items, layout.width)``."""
        index = np.broadcast_to(np.arange(values.shape[-2]), values.shape[:-1]).copy()
        return cls(layout, index, np.ones(index.shape, np.float32), dict(layout.parts(values)))

    def __getitem__(self, row: int) -> Items:
        return Items(
            self.layout, self.index[row], self.weight[row], {n: v[row] for n, v in self.parts.items()}
        )

    def take(self, places: np.ndarray) -> Items:
        """Those at ``places``, int64 ``(…, k)`` into the K."""
        index, weight = (np.take_along_axis(a, places, axis=-1) for a in (self.index, self.weight))
        parts = {n: np.take_along_axis(v, places[..., None], axis=-2) for n, v in self.parts.items()}
        return Items(self.layout, index, weight, parts)

    def layer(self, number: int) -> Items:
        """The items of one layer of ``layout.layers``; −1 is the last. Needs all items, as ``all`` keeps them.

        Raises :class:`IndexError` where there is no such layer.
        """
        layers = self.layout.layers
        if not -layers <= number < layers:
            raise IndexError(f"layer {number} of {layers}: they are 0 to {layers - 1}, and -1 is the last")
        each = self.index.shape[-1] // layers
        first = number % layers * each
        return self.take(np.broadcast_to(np.arange(first, first + each), (*self.index.shape[:-1], each)))

    def scores(self) -> np.ndarray:
        """Probabilities of the classes but the background, float32 ``(…, K, classes)``."""
        return self.layout.scores(self.parts)

    def level(self) -> np.ndarray:
        """Which of ``layout.levels`` an item stands on, int64 ``(…, K)``. :class:`SpecError` where there are none."""
        return np.searchsorted(self._starts(), self.index, side="right") - 1

    def cell(self) -> np.ndarray:
        """The row and the column of its cell there, int64 ``(…, K, 2)``."""
        level = self.level()
        widths = np.array([w for _, w in self.layout.levels])
        place = (self.index - self._starts()[level]) // self.layout.anchors
        return np.stack(np.divmod(place, widths[level]), axis=-1)

    def _starts(self) -> np.ndarray:
        if not self.layout.levels:
            raise SpecError("these items have no cells: their teacher has no grid of anchors")
        return self.layout.anchors * np.cumsum([0, *(h * w for h, w in self.layout.levels)])[:-1]

    def dense(self) -> np.ndarray:
        """The parts side by side, as the teacher says them: float32 ``(…, K, layout.width)``."""
        return np.concatenate([self.parts[name] for name in self.layout.columns], axis=-1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, as arrays that a DataLoader stacks."""
        return {"index": self.index, "weight": self.weight, **self.parts}


@dataclass(frozen=True)
class All:
    """Every item, in the teacher's order.

    ``boxes`` and ``reference`` are fixed point (:class:`.Fixed`), ``embedding`` and ``deltas`` ``int8`` with a scale an
    item; other columns are bytes on a grid an item (``full(u8)``), or halves where there are at most four, and the
    ``logits`` where ``logits=f16`` asks for it. With ``logits=score`` they are kept as their scores (:class:`.Score`).
    Bounds are theirs.
    """

    logits: str = field(default="u8", kw_only=True)
    layout: Layout | None = field(default=None, init=False)

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = KINDS
    limit: ClassVar[float] = Full.limit

    def __post_init__(self) -> None:
        if self.logits not in _LOGITS:
            raise SpecError(f"logits={self.logits}: unknown{nearest(self.logits, _LOGITS)}")

    def laid_out(self, layout: Layout) -> Self:
        """The same codec for items of this layout."""
        bound = copy.copy(self)
        object.__setattr__(bound, "layout", layout)
        return bound

    @property
    def _layout(self) -> Layout:
        if self.layout is None:
            raise CodecError(
                "all and top keep items whose columns the teacher names, and here is no layout of them"
            )
        return self.layout

    def _parts(self, weight: np.ndarray) -> Iterator[tuple[str, Any, tuple[int, int]]]:
        """(name, codec, shape) of every part of items of these weights."""
        for name, columns in self._layout.columns.items():
            yield name, self._codec(name, columns, weight), (len(weight), columns)

    def _codec(self, name: str, columns: int, weight: np.ndarray) -> Fixed | Int8 | F16 | Full | Score:
        if name == "logits" and self.logits == "score":
            return Score(self._layout.score == "softmax", weight)
        if name in ("boxes", "reference"):
            return Fixed()
        if name in ("embedding", "deltas"):
            return Int8()
        halves = columns <= _FEW or (name == "logits" and self.logits == "f16")
        return F16() if halves else Full("u8")

    def _chosen(self, items: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Which places of :meth:`_order` are kept (None for all, in the teacher's order), and their weights."""
        return None, np.ones(items)

    def _order(self, scores: np.ndarray, values: np.ndarray, objects: Sequence[Objects]) -> np.ndarray:
        """The items of each row by falling score, of equal ones the lower number first: int64 ``(n, items)``."""
        return np.argsort(-scores.max(axis=-1), axis=-1, kind="stable")

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 2 or shape[1] != self._layout.width:
            raise CodecError(
                f"items are (items, {self._layout.width}) by their layout, and the teacher gives {shape}"
            )
        chosen, weight = self._chosen(shape[0])
        found = [] if chosen is None else [Field("index", class_dtype(shape[0]), weight.shape)]
        for part, codec, (kept, columns) in self._parts(weight):
            if isinstance(codec, Full):  # of each item
                each = codec.fields((columns,))
                found += [Field(_name(part, f.name), f.dtype, (kept, *f.shape)) for f in each]
            else:
                found += [Field(_name(part, f.name), f.dtype, f.shape) for f in codec.fields((kept, columns))]
        return tuple(sorted(found, key=lambda f: f.name))

    def encode(self, values: np.ndarray, objects: Sequence[Objects] = ()) -> Fields:
        parts = [slice(i, i + _ROWS) for i in range(0, max(len(values), 1), _ROWS)]
        pieces = [self._encode(values[part], objects[part]) for part in parts]
        return {f: np.concatenate([piece[f] for piece in pieces]) for f in pieces[0]}

    def _encode(self, values: np.ndarray, objects: Sequence[Objects]) -> Fields:
        found: Fields = {}
        chosen, weight = self._chosen(values.shape[1])
        if chosen is not None:
            scores = self._layout.scores(dict(self._layout.parts(values)))
            index = self._order(scores, values, objects)[:, chosen]
            found["index"] = index.astype(class_dtype(values.shape[1]))
            values = values[np.arange(len(values))[:, None], index]
        for part, codec, _ in self._parts(weight):
            encoded = codec.encode(self._layout.part(values, part))
            found |= {_name(part, f): one for f, one in encoded.items()}
        return found

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> Items:
        chosen, weight = self._chosen(shape[0])
        decoded = {part: codec.decode(_of(fields, part), each) for part, codec, each in self._parts(weight)}
        rows = (len(next(iter(decoded.values()))), len(weight))
        if chosen is None:
            index = np.broadcast_to(np.arange(shape[0]), rows).copy()
        else:
            index = below(fields["index"], shape[0], "item")
        return Items(self._layout, index, np.broadcast_to(weight, rows).astype(np.float32), decoded)

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Of each part, broadcastable to ``(n, K, columns)``."""
        parts = self._parts(self._chosen(shape[0])[1])
        return {part: codec.bound(_of(fields, part), each) for part, codec, each in parts}

    def exact(self, values: np.ndarray) -> Items:
        """Items of dense rows, all of them, nothing rounded."""
        whole = Items.whole(self._layout, values)
        if self.logits == "score" and self._layout.score == "softmax" and "logits" in whole.parts:
            log_p = log_scores(whole.parts["logits"].astype(np.float64), softmax=True).astype(np.float32)
            whole = replace(whole, parts={**whole.parts, "logits": log_p})
        return whole


@dataclass(frozen=True)
class Top(All):
    """The ``n`` items of the highest score, in falling order (the lower number first where two are equal), ``inside`` more
    that lie best on the source's boxes, and ``background`` of the others.

    What lies best is :func:`.aligned`'s; where it is not enough, the next by score follow. So the items that a student's
    assigner takes for an object are there although the teacher scores them low.

    The others, in falling order, are cut into so many strata of equal size (but for one item); of each the middle
    one is kept, and its weight is the size of its stratum, so that with a background all weights add up to all items.
    Nothing is drawn.
    """

    n: int
    background: int = 0
    inside: int = 0

    example: ClassVar[str] = "top(1000, background=200, inside=100)"

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (("n", self.n, 1), ("background", self.background, 0), ("inside", self.inside, 0))
        for name, value, least in counts:
            if type(value) is not int or value < least:
                raise SpecError(f"top: {name} must be a whole number of at least {least}, not {value!r}")

    @property
    def boxed(self) -> bool:
        return self.inside > 0

    @property
    def labelled(self) -> bool:
        return self.inside > 0

    def _chosen(self, items: int) -> tuple[np.ndarray, np.ndarray]:
        first = self.n + self.inside
        rest = items - first
        if self.background > rest:
            also = f" and {self.inside} inside" if self.inside else ""
            also += f" and {self.background} of the background" if self.background else ""
            raise CodecError(
                f"top keeps {self.n} items{also}, and the teacher gives {items}: at most {items} together, or keep "
                "all of them with all"
            )
        if not self._layout.scored or self._layout.layers > 1:
            why = "those of several layers are the same ones" if self._layout.scored else "these have none"
            raise CodecError(f"top chooses items by their scores, and {why}: keep all of them with all")
        if self.inside and (lacking := {"logits", "boxes"} - self._layout.columns.keys()):
            raise CodecError(
                f"top(…, inside={self.inside}) takes items by their boxes and class scores, and these have no "
                f"{min(lacking)}: leave inside out"
            )
        cuts = first + np.arange(self.background + 1) * rest // max(self.background, 1)
        middles = (cuts[:-1] + cuts[1:]) // 2
        weight = np.concatenate([np.ones(first), np.diff(cuts)])
        return np.concatenate([np.arange(first), middles]), weight

    def _order(self, scores: np.ndarray, values: np.ndarray, objects: Sequence[Objects]) -> np.ndarray:
        """As :meth:`All._order`, but behind the first ``n`` stand those inside."""
        order = super()._order(scores, values, objects)
        if not self.inside:
            return order
        if len(objects) != len(values):
            raise CodecError(
                f"top(…, inside={self.inside}) asks where the boxes are: of {len(values)} rows, {len(objects)} are told"
            )
        boxes = self._layout.part(values, "boxes")
        for row, shown in enumerate(objects):
            best = aligned(scores[row], boxes[row], shown)
            rest = order[row, self.n :]
            inside = best[np.isin(best, rest)][: self.inside]
            order[row, self.n :] = np.concatenate([inside, rest[~np.isin(rest, inside)]])
        return order


def _name(part: str, field: str) -> str:
    return part if field == "value" else f"{part}_{field}"


def _of(fields: Fields, part: str) -> Fields:
    """The fields of a part, by the names that its codec gave them."""
    known = ("value", "low", "step", "scale", "rest")
    return {f: fields[_name(part, f)] for f in known if _name(part, f) in fields}
