"""Some classes of each row and a whole number for each, as Rice codes in a fixed number of bits.

A row is: k; a number that is the caller's; r. Then come, of k classes in rising order, the gaps between them and their
numbers: first all unary parts, of the gaps and then of the numbers (so many zeros, and a one); then the remainders, of each
class that of its gap and that of its number. Those of gaps have as many bits as suit k, those of numbers r.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_FEW = 3


class Ranked:
    """Classes of each row from the largest on, int64 ``(n, most)``, and the same in rising order."""

    def __init__(self, classes: np.ndarray):
        self.rank = np.argsort(classes, axis=1)
        self.classes = np.take_along_axis(classes, self.rank, axis=1)

    def gaps(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which are among the first ``k``, and how many classes lie between each of these and the one before."""
        inside = self.rank < k[:, None]
        last = np.maximum.accumulate(np.where(inside, self.classes, -1), axis=1)
        before = np.concatenate([np.full((len(last), 1), -1), last[:, :-1]], axis=1)
        return inside, np.where(inside, self.classes - before - 1, 0)


@dataclass(frozen=True)
class Layout:
    """Rows of so many ``bits``, of some of so many ``classes``."""

    bits: int
    classes: int

    @cached_property
    def _low(self) -> np.ndarray:
        """For each k the bits of a gap's remainder."""
        k = np.arange(min(self.bits, self.classes) + 1)
        return _few(self.classes - k, k)

    @cached_property
    def _header(self) -> int:
        return self._width + 2 * _FEW

    @property
    def _width(self) -> int:
        return min(self.bits, self.classes).bit_length()

    @cached_property
    def most(self) -> int:
        """More than so many are never kept: fewer than two bits a number, they would be all alike."""
        k = np.arange(1, min(self.bits, self.classes - 1) + 1)
        return max(1, int((k * (self._low[k] + 3) <= self.bits - self._header).sum()))

    @property
    def fits(self) -> bool:
        """Is there room for one class, whichever?"""
        low = int(self._low[1])
        return self._header + low + 2 + ((self.classes - 1) >> low) <= self.bits

    def fill(self, ranked: Ranked, number: np.ndarray) -> np.ndarray:
        """The k that fits each row, as large as is found by halving: int64 ``(n,)``. ``number`` (n, most) rises by rank;
        what is written is how far each lies below the k-th."""
        low, high = (np.full(len(number), x, np.int64) for x in (1, self.most))
        while (low < high).any():
            middle = (low + high + 1) // 2
            fits = self._size(ranked, number, middle) <= self.bits
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        return low

    def _size(self, ranked: Ranked, number: np.ndarray, k: np.ndarray) -> np.ndarray:
        low, excess = self._low[k], _excess(number, k)
        few = self._few(excess, k)
        unary = (ranked.gaps(k)[1] >> low[:, None]) + (excess >> few[:, None])
        return self._header + unary.sum(axis=1) + k * (low + few + 2)

    def _few(self, excess: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.minimum(_few(excess.sum(axis=1), k), (1 << _FEW) - 1)

    def write(self, ranked: Ranked, number: np.ndarray, k: np.ndarray, said: np.ndarray) -> np.ndarray:
        """uint8 ``(n, ⌈bits / 8⌉)``; ``said`` is the caller's, (n,)."""
        inside, gap = ranked.gaps(k)
        first = np.argsort(~inside, axis=1, kind="stable")
        gap = np.take_along_axis(gap, first, axis=1)
        excess = _excess(number, k)
        r = self._few(excess, k)
        excess = np.take_along_axis(excess, np.take_along_axis(ranked.rank, first, axis=1), axis=1)
        low, inside = self._low[k], np.arange(self.most) < k[:, None]
        out = np.zeros((len(number), self.bits), np.uint8)
        head = (k << 2 * _FEW) | (said << _FEW) | r
        out[:, : self._header] = head[:, None] >> np.arange(self._header)[::-1] & 1
        end = np.full((len(number), 1), self._header - 1)
        for part, few in ((gap, low), (excess, r)):
            ones = end + np.cumsum((part >> few[:, None]) + 1, axis=1)
            rows, places = np.nonzero(inside)
            out[rows, ones[rows, places]] = 1
            end = np.take_along_axis(ones, k[:, None] - 1, axis=1)
        start, stride = end[:, 0] + 1, low + r
        both = (gap & _ones(low)[:, None]) << r[:, None] | excess & _ones(r)[:, None]
        for bit in range(stride.max(initial=0)):
            rows, places = np.nonzero(inside & (bit < stride)[:, None])
            value = both[rows, places] >> (stride[rows] - 1 - bit)
            out[rows, start[rows] + places * stride[rows] + bit] = value & 1
        return np.packbits(out, axis=1)

    def read(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(classes, numbers, k, said) of what :meth:`write` made: the numbers int64 ``(n, most)``, rising from 0, the lower
        class first; from the k-th place on the first class is repeated, and so is its number."""
        bits = np.unpackbits(data, axis=1, count=self.bits)
        head = bits[:, : self._header].astype(np.int64) @ (1 << np.arange(self._header)[::-1])
        k = np.clip(head >> 2 * _FEW, 1, self.most)
        said, r = head >> _FEW & 7, head & 7
        ends = self._ends(bits[:, self._header :], 2 * k)
        unary = np.maximum(np.diff(ends, axis=1, prepend=-1) - 1, 0)  # below only where ones are missing
        places, low = np.arange(self.most), self._low[k]
        start = np.take_along_axis(ends, 2 * k[:, None] - 1, axis=1) + self._header + 1
        both = self._remainders(data, start, low + r)
        gap = unary[:, : self.most] << low[:, None] | both >> r[:, None]
        excess = (
            np.take_along_axis(unary, k[:, None] + places, axis=1) << r[:, None] | both & _ones(r)[:, None]
        )
        inside = places < k[:, None]
        classes = np.minimum(np.cumsum(gap + 1, axis=1) - 1, self.classes - 1)
        number = np.where(inside, excess, 0).max(axis=1, keepdims=True) - excess
        order = np.argsort(np.where(inside, number, np.iinfo(np.int64).max), axis=1, kind="stable")
        order = np.where(inside, order, order[:, :1])
        classes, number = (np.take_along_axis(x, order, axis=1) for x in (classes, number))
        return classes, number, k, said

    def _ends(self, body: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Where the first ``count`` ones of each row stand, int64 ``(n, 2 · most)``; 0 for those that are not there."""
        number = np.cumsum(body, axis=1, dtype=np.int32)
        rows, columns = np.nonzero((body > 0) & (number <= count[:, None]))
        ends = np.zeros((len(body), 2 * self.most), np.int64)
        ends[rows, number[rows, columns] - 1] = columns
        return ends

    def _remainders(self, data: np.ndarray, start: np.ndarray, stride: np.ndarray) -> np.ndarray:
        """Numbers of ``stride`` bits each, at most 33, one after another from the bit ``start``: int64 ``(n, most)``."""
        at = start + np.arange(self.most) * stride[:, None]
        byte, word = at >> 3, np.zeros(at.shape, np.int64)
        for each in range(5):
            word = word << 8 | np.take_along_axis(data, np.minimum(byte + each, data.shape[1] - 1), axis=1)
        return word >> (40 - (at & 7) - stride[:, None]) & _ones(stride)[:, None]


def _ones(bits: np.ndarray) -> np.ndarray:
    return (1 << bits) - 1


def _few(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The bits of remainders that suit so many numbers of this sum (of geometric ones: Kiely 2004), as a whole number."""
    bits = np.zeros(len(count), np.int64)
    for r in range(31):
        bits += 25 * (2 * total + count) >= (104 * count << r)
    return bits


def _excess(number: np.ndarray, k: np.ndarray) -> np.ndarray:
    """How far each of the first ``k`` numbers, which rise, lies below the k-th; 0 for the others."""
    return np.maximum(np.take_along_axis(number, k[:, None] - 1, axis=1) - number, 0)
