"""Counter-based randomness: every number is a function of its keys, never of order, rank or worker.

:func:`draws` gives a stream for a tuple of keys (BLAKE2b in counter mode, so the numbers are the same on
every machine and with every library version). :class:`Permutation` shuffles ``0 … n-1`` without an array
(a Feistel network with cycle walking).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Key = int | str


def _encode(keys: tuple[Key, ...]) -> bytes:
    parts = []
    for key in keys:
        raw = key.encode() if isinstance(key, str) else str(key).encode()
        parts.append((b"s" if isinstance(key, str) else b"i") + struct.pack("<I", len(raw)) + raw)
    return b"".join(parts)


def hash64(*keys: Key) -> int:
    """64 uniform bits for the keys."""
    return int.from_bytes(hashlib.blake2b(_encode(keys), digest_size=8).digest(), "little")


@dataclass
class Draws:
    """A stream of numbers for one tuple of keys; see :func:`draws`."""

    words: Iterator[int]

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in ``[low, high)`` with 53 random bits."""
        return low + (high - low) * ((next(self.words) >> 11) * 2.0**-53)

    def integer(self, count: int) -> int:
        """An integer in ``0 … count-1`` (bias below ``count``/2⁶⁴)."""
        return (next(self.words) * count) >> 64


def draws(*keys: Key) -> Draws:
    """The stream of random numbers that belongs to ``keys``."""
    return Draws(_words(_encode(keys)))


def _words(data: bytes) -> Iterator[int]:
    block = 0
    while True:
        raw = hashlib.blake2b(data, digest_size=64, salt=block.to_bytes(16, "little")).digest()
        yield from struct.unpack("<8Q", raw)
        block += 1


_ROUNDS = 6
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A keyed bijection of ``0 … n-1``, vectorised and reversible.

    A balanced Feistel network of six rounds over the next even power of two, walked along its cycle until
    the value falls below ``n`` (at most four steps on average).
    """

    def __init__(self, n: int, *keys: Key):
        self.n = n
        half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        self._keys = [np.uint64(hash64("feistel", r, *keys)) for r in range(_ROUNDS)]

    def forward(self, index: np.ndarray) -> np.ndarray:
        """int64 positions of the given indices; shape kept."""
        return self._walk(index, self._keys, inverse=False)

    def inverse(self, position: np.ndarray) -> np.ndarray:
        """int64 indices at the given positions: ``inverse(forward(i)) == i``."""
        return self._walk(position, self._keys[::-1], inverse=True)

    def _walk(self, value: np.ndarray, keys: list[np.uint64], *, inverse: bool) -> np.ndarray:
        start = np.asarray(value)
        if start.size and (start.min() < 0 or start.max() >= self.n):
            raise IndexError(f"index out of range for a permutation of {self.n}")
        out = self._network(start.astype(np.uint64).ravel(), keys, inverse)
        while (outside := np.flatnonzero(out >= np.uint64(self.n))).size:
            out[outside] = self._network(out[outside], keys, inverse)
        return out.astype(np.int64).reshape(start.shape)

    def _network(self, x: np.ndarray, keys: list[np.uint64], inverse: bool) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in keys:
            if inverse:
                left, right = right ^ self._round(left, key), left
            else:
                left, right = right, left ^ self._round(right, key)
        return (left << self._half) | right

    def _round(self, x: np.ndarray, key: np.uint64) -> np.ndarray:
        x = x ^ key
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
        return (x ^ (x >> np.uint64(31))) & self._mask


def in_turn(n: int, turn: int, *keys: Key) -> int:
    """Whose turn it is among ``0 … n-1``: in every ``n`` turns each has one, in an order of that round's own."""
    cycle, place = divmod(turn, n)
    return int(Permutation(n, *keys, cycle).inverse(np.array(place)))
