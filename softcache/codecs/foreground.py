"""``foreground(cells)``: a detector's map, finely where the boxes are and coarsely elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields, class_dtype
from softcache.codecs.int4 import Int4
from softcache.codecs.int8 import Int8
from softcache.codecs.objects import Objects
from softcache.codecs.pool import Pool
from softcache.errors import CodecError, SpecError


@dataclass(frozen=True)
class Foreground:
    """``cells`` of a map ``(C, H, W)`` as ``int8`` with a scale a cell, and all of it as ``pool(n)|int4`` (not pooled by 1).

    Fine are cells that a box of the view touches, of each box those nearest its middle first: the first of every box, the
    second of every box, and so on until there are ``cells``. What is left of them goes to the others of the largest norm;
    ``under`` is how many are under boxes. Where many boxes share a cell it counts once.
    """

    cells: int
    pool: int = 1

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("feature_map",)
    limit: ClassVar[float] = Int4.limit
    boxed: ClassVar[bool] = True

    example: ClassVar[str] = "foreground(200)"

    def __post_init__(self) -> None:
        for name, value in (("cells", self.cells), ("pool", self.pool)):
            if type(value) is not int or value < 1:
                raise SpecError(f"foreground: {name} must be a whole number of at least 1, not {value!r}")

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 3 or shape[1] * shape[2] < self.cells:
            raise CodecError(
                f"foreground keeps {self.cells:,} cells of a map (C, H, W), and the teacher gives {shape}: keep "
                "fewer, or all of them with int8"
            )
        coarse = Int4().fields(self._pooled(shape))
        return (
            Field("cell", class_dtype(shape[1] * shape[2]), (self.cells,)),
            *(Field(f"coarse_{f.name}", f.dtype, f.shape) for f in coarse),
            *Int8().fields((self.cells, shape[0])),
            Field("under", class_dtype(self.cells + 1), ()),
        )

    def _pooled(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return Pool(self.pool).shape(shape) if self.pool > 1 else shape

    def encode(self, values: np.ndarray, objects: Sequence[Objects] = ()) -> Fields:
        if len(objects) != len(values):
            raise CodecError(
                f"foreground asks where the boxes are: of {len(values)} rows, {len(objects)} are told"
            )
        flat = values.reshape(len(values), values.shape[1], values.shape[2] * values.shape[3])
        cell, under = np.zeros((len(values), self.cells), np.int64), np.zeros(len(values), np.int64)
        for row, shown in enumerate(objects):
            chosen = list(islice(dict.fromkeys(self._touched(shown.boxes, *values.shape[2:])), self.cells))
            norm = np.square(flat[row].astype(np.float64)).sum(axis=0)
            norm[chosen] = -1  # which are there already
            others = np.argsort(-norm, kind="stable")[: self.cells - len(chosen)]
            cell[row], under[row] = [*chosen, *others], len(chosen)
        fine = np.take_along_axis(flat, cell[:, None], axis=2).transpose(0, 2, 1)
        coarse = Int4().encode(Pool(self.pool)(values) if self.pool > 1 else values)
        return {
            "cell": cell.astype(class_dtype(flat.shape[2])),
            **{f"coarse_{name}": part for name, part in coarse.items()},
            **Int8().encode(fine),
            "under": under.astype(class_dtype(self.cells + 1)),
        }

    def _touched(self, boxes: np.ndarray, height: int, width: int) -> list[int]:
        """The cells that boxes touch, (m, 4) in the unit square: the nearest to the middle of each, the second of each, …"""
        ranked: list[tuple[int, int, int]] = []
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            y, x = np.meshgrid(_range(y1, y2, height), _range(x1, x2, width), indexing="ij")
            far = np.square((x + 0.5) / width - (x1 + x2) / 2) + np.square((y + 0.5) / height - (y1 + y2) / 2)
            nearest = np.argsort(far, axis=None, kind="stable")[: self.cells]
            ranked += [
                (rank, number, cell) for rank, cell in enumerate((y * width + x).ravel()[nearest].tolist())
            ]
        return [cell for _, _, cell in sorted(ranked)]

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        coarse = Int4().decode(_coarse(fields), self._pooled(shape))
        return self._put(self._spread(coarse, shape), fields, Int8().decode(fields, (self.cells, shape[0])))

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """Of fine cells, and of the others as of ``int4``; where these are pooled, none (infinity)."""
        coarse = Int4().bound(_coarse(fields), shape) if self.pool == 1 else np.array(np.inf)
        bound = np.broadcast_to(coarse, (len(fields["cell"]), *shape)).copy()
        return self._put(bound, fields, Int8().bound(fields, (self.cells, shape[0])))

    def _spread(self, coarse: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        for axis in (2, 3) if self.pool > 1 else ():
            coarse = np.repeat(coarse, self.pool, axis=axis)
        return coarse[:, :, : shape[1], : shape[2]]

    def _put(self, values: np.ndarray, fields: Fields, fine: np.ndarray) -> np.ndarray:
        """``fine`` (n, cells, C), or that of which it is broadcast, into the cells of ``values`` (n, C, H, W)."""
        flat = values.reshape(*values.shape[:2], -1 if values.size else 0)
        cell = np.minimum(fields["cell"].astype(np.int64), values.shape[2] * values.shape[3] - 1)
        fine = np.broadcast_to(fine, (*cell.shape, values.shape[1]))
        np.put_along_axis(flat, cell[:, None], fine.transpose(0, 2, 1), axis=2)
        return flat.reshape(values.shape)


def _coarse(fields: Fields) -> Fields:
    return {name: fields[f"coarse_{name}"] for name in ("low", "step", "value")}


def _range(low: float, high: float, cells: int) -> np.ndarray:
    """The cells of a side that overlap with low … high; one even where that has no width."""
    first = min(int(np.floor(low * cells)), cells - 1)
    return np.arange(first, max(int(np.ceil(high * cells)), first + 1))
