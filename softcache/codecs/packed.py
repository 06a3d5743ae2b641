"""``packed(bytes)``: as many of a row's largest logits as a fixed number of bytes holds, and the others' weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.bits import pack, packed_bytes, unpack
from softcache.codecs.fields import Field, Fields
from softcache.codecs.rice import Layout, Ranked
from softcache.codecs.topk import SparseLogits, Tail, check_tail
from softcache.errors import CodecError, SpecError

_STEPS = 8  # 2**-5 … 2**2 times the lowest temperature
# How many steps below the largest logit each cell begins: an eighth wide, then a quarter and a half, from 4 on whole ones.
_CELLS = np.concatenate([np.arange(8) / 8, 1 + np.arange(4) / 4, 2 + np.arange(5) / 2])
_FINE = len(_CELLS) - 1
_NATS, _TAIL = 1 / 64, 10  # step of the others' weight, and its bits
_ROWS = 512  # encoded at a time: each in a few hundred numbers of eight bytes, times k


@dataclass(frozen=True)
class Packed:
    """The ``k`` largest of ``C`` logits, with the largest k of which a row fits in ``bytes``: re-temperable, like ``topk``.

    ``row`` holds, bit by bit and the highest bit of a byte first: k, the step, and of the kept classes, in rising order,
    how far each is from the one before and how many cells it lies above the least of them, both as Rice codes (all
    unary parts, then all remainders). The largest is exact; another logit is the middle of its cell, and off by at most
    half of that: cells are a step wide, nearer to the largest (by less than 4 steps) a half to an eighth. Of the steps
    from 1/32 to 4 (times the lowest of ``at``) each row has the one that loses least, by its KL summed over ``at``: many
    classes coarsely, or few of them finely.
    ``tail`` is for each temperature of ``at`` the log-odds of all others against those that are kept, in ten bits: so many
    64ths of a nat below log((C − k) / k), which they cannot exceed; 1023 is that, or less.
    """

    bytes: int
    at: tuple[float, ...] = (1, 2, 4, 8)
    tail: str = "bucket"

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("logits",)
    limit: ClassVar[float] = 32752.0

    example: ClassVar[str] = "packed(44)"

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or not 1 <= self.bytes <= 4096:
            raise SpecError(f"packed: bytes must be a whole number from 1 to 4096, not {self.bytes!r}")
        check_tail("packed", self.at, self.tail)

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 1 or shape[0] < 2:
            raise CodecError(f"packed keeps logits of two or more classes, and the teacher gives {shape}")
        least = next(n for n in range(1, 64) if Layout(8 * n, shape[0]).fits) + self._tail_bytes
        if self.bytes < least:
            raise CodecError(
                f"packed({self.bytes}) holds no class of {shape[0]:,}: say packed({least}) or more"
            )
        return (
            Field("row", "uint8", (self.bytes - self._tail_bytes,)),
            Field("tail", "uint8", (self._tail_bytes,)),
        )

    @property
    def _tail_bytes(self) -> int:
        return packed_bytes(len(self.at), _TAIL)

    def _layout(self, classes: int) -> Layout:
        return Layout(8 * (self.bytes - self._tail_bytes), classes)

    def encode(self, values: np.ndarray) -> Fields:
        pieces = [self._encode(values[i : i + _ROWS]) for i in range(0, max(len(values), 1), _ROWS)]
        return {f: np.concatenate([piece[f] for piece in pieces]) for f in pieces[0]}

    def _encode(self, values: np.ndarray) -> Fields:
        layout = self._layout(values.shape[1])
        order = np.argsort(-values, axis=1, kind="stable")
        rows = np.take_along_axis(values, order, axis=1).astype(np.float64)
        below = rows[:, :1] - rows
        ranked = Ranked(order[:, : layout.most])
        costs = [_Cost(below, T, layout.most) for T in self.at]
        best = np.full(len(values), np.inf)
        k, step = (np.zeros(len(values), np.int64) for _ in range(2))
        for s in range(_STEPS):
            level = self._levels(below[:, : layout.most], np.full(len(values), s))
            fits = layout.fill(ranked, level)
            loss = sum(cost(fits, -self._cells(level, np.array([[s]]))[0]) for cost in costs)
            better = loss < best
            best = np.where(better, loss, best)
            k, step = np.where(better, fits, k), np.where(better, s, step)
        level = self._levels(below[:, : layout.most], step)
        odds = np.stack([cost.odds(k) for cost in costs], axis=1)
        ceiling = np.log((values.shape[1] - k) / k)[:, None]
        return {
            "row": layout.write(ranked, level, k, step),
            "tail": pack(np.clip(np.rint((ceiling - odds) / _NATS), 0, (1 << _TAIL) - 1), _TAIL),
        }

    def _step(self, step: np.ndarray) -> np.ndarray:
        return self.at[0] * 2.0 ** (step - 5)

    def _levels(self, below: np.ndarray, step: np.ndarray) -> np.ndarray:
        """0 for the largest; else which cell below it, from 1: int64 ``(n, most)``."""
        steps = below / self._step(step)[:, None]
        fine = np.searchsorted(_CELLS, np.minimum(steps, _CELLS[-1]))  # a cell ends with its lower edge
        level = np.maximum(np.where(steps > _CELLS[-1], _FINE + np.ceil(steps - _CELLS[-1]), fine), 1)
        level[:, 0] = 0
        return level.astype(np.int64)

    def _cells(self, level: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The middles of cells, as distances from the largest, and half their widths."""
        near = np.minimum(level, _FINE)
        end = _CELLS[near] + (level - near)
        begin = np.where(level > _FINE, end - 1, _CELLS[np.maximum(near - 1, 0)])
        return self._step(step) * (begin + end) / 2, self._step(step) * (end - begin) / 2

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> SparseLogits:
        layout = self._layout(shape[0])
        index, level, k, step = layout.read(fields["row"])
        value = -self._cells(level, step[:, None])[0]
        value[np.arange(layout.most) >= k[:, None]] = -np.inf
        tail, rest = self.known_tail(shape), np.log(shape[0] - k)[:, None]
        odds = rest - np.log(k)[:, None] - _NATS * unpack(fields["tail"], len(self.at), _TAIL)
        mean = [T * np.logaddexp.reduce(value / T, axis=1) for T in self.at]
        soft_mean = np.stack(mean, axis=1) + np.array(self.at) * (odds - rest)
        return SparseLogits(index, value.astype(np.float32), soft_mean.astype(np.float32), tail)

    def known_tail(self, shape: tuple[int, ...]) -> Tail:
        """What rows of ``shape`` come back with."""
        return Tail(shape[0], tuple(map(float, self.at)), self.tail == "spread")

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """Of ``value``."""
        _, level, _, step = self._layout(shape[0]).read(fields["row"])
        middle, half = self._cells(level, step[:, None])
        return half + middle * 2.0**-22


class _Cost:
    """What it costs, at one temperature, to keep so many of sorted rows and to take the others for equal."""

    def __init__(self, below: np.ndarray, T: float, most: int):  # noqa: N803
        """``below`` float64 ``(n, C)``, rising: how far each logit lies below the row's largest."""
        self._below, self._T, self._classes = below[:, :most] / T, T, below.shape[1]
        weight = np.exp(-below / T)
        self._weight = weight[:, :most]
        self._kept = np.cumsum(self._weight, axis=1)
        self._kept_below = np.cumsum(self._weight * self._below, axis=1)
        self._rest = _after(weight, most)
        self._rest_below = _after(weight * below / T, most)

    def odds(self, k: np.ndarray) -> np.ndarray:
        """Log-odds of all others against the first ``k``; −∞ where nothing is left of them."""
        with np.errstate(divide="ignore"):
            return np.log(_at(self._rest, k)) - np.log(_at(self._kept, k))

    def __call__(self, k: np.ndarray, value: np.ndarray) -> np.ndarray:
        """KL of rows to what is kept of them, in nats: the first ``k`` as ``value`` (n, most), the others spread evenly."""
        q, inside = value / self._T, np.arange(value.shape[1]) < k[:, None]
        weight, total = np.where(inside, self._weight, 0), np.log(np.where(inside, np.exp(q), 0).sum(axis=1))
        kept, rest = _at(self._kept, k), _at(self._rest, k)
        of_kept = kept * (total - np.log(kept)) - (weight * q).sum(axis=1) - _at(self._kept_below, k)
        flat = np.log(np.where(rest > 0, rest, 1) / (self._classes - k))
        return (of_kept - rest * flat - _at(self._rest_below, k)) / (kept + rest)


def _after(x: np.ndarray, most: int) -> np.ndarray:
    """The sum of what comes after each of the first ``most`` columns, the small ones added first."""
    return np.cumsum(x[:, :0:-1], axis=1)[:, ::-1][:, :most]


def _at(x: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, k[:, None] - 1, axis=1)[:, 0]
